// Numbers as a model keeps them, float32 or bfloat16, and what an operation of PyTorch's leaves of a float in either.
#pragma once
#include "tiles.h"

struct Half {
  uint16_t bits;
};
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4)));

inline Vector load(const Half* x) {
  return reinterpret_cast<Vector>(__builtin_convertvector(*reinterpret_cast<const Halves*>(x), Bits) << 16);
}

// The upper half of each float, rounded to the nearest, of two the even one.
inline Bits shortened(Vector v) {
  const Bits bits = reinterpret_cast<Bits>(v), near = bits + 0x7FFF + (bits >> 16 & 1);
  return (v != v ? bits - bits + 0x7FC0 : near >> 16);
}

inline void store(Half* into, Vector v) { *reinterpret_cast<Halves*>(into) = __builtin_convertvector(shortened(v), Halves); }

template <class T>
inline Vector rounded(Vector v);
template <>
inline Vector rounded<float>(Vector v) {
  return v;
}
template <>
inline Vector rounded<Half>(Vector v) {
  return reinterpret_cast<Vector>(shortened(v) << 16);
}

// silu(x) u, with silu(x) = x / (1 + e^-x) rounded before the product.
template <class T>
inline Vector gated(Vector x, Vector u) {
  return rounded<T>(x / (1.0f + power_of_two(-larger(all(-127.0f), x * LOG2E)))) * u;
}
