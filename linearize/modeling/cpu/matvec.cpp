// PyTorch's own kernels for one row read 7 to 18 GB/s of weights where memory gives two threads 30 to 50.
#include "matvec.h"

#include <immintrin.h>
#include <omp.h>

#include "storage.h"

struct Eighth {
  int8_t steps;
};
// GCC widens bytes one by one.
#ifdef __AVX512F__
inline Vector load(const Eighth* x) {
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
#else
inline Vector load(const Eighth* x) {
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}
#endif

namespace {

constexpr Index AHEAD = 4096;  // bytes that are asked for before they are needed: rows are longer than the processor looks ahead

inline float single(float x) { return x; }
inline float single(Eighth x) { return x.steps; }
inline float single(Half x) { return storage::widen(x.bits); }

// x . w in float32: four sums, so that none waits for the one before.
template <class W>
float along(const float* x, const W* w, Index depth) {
  Vector sums[4] = {};
  Index k = 0;
  for (; k + 4 * LANES <= depth; k += 4 * LANES) {
    for (size_t at = 0; at < 4 * LANES * sizeof(W); at += 64) _mm_prefetch(reinterpret_cast<const char*>(w + k) + AHEAD + at, _MM_HINT_T0);
    for (Index i = 0; i < 4; i++) sums[i] += load(x + k + i * LANES) * load(w + k + i * LANES);
  }
  for (; k + LANES <= depth; k += LANES) sums[0] += load(x + k) * load(w + k);
  float found = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < depth; k++) found += x[k] * single(w[k]);
  return found;
}

// The same of two in bfloat16, by the processor's own products of pairs: exact ones, added up in float32.
#ifdef __AVX512F__
__attribute__((target("avx512bf16"))) float in_pairs(const Half* x, const Half* w, Index depth) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const auto at = [](const Half* p) { return (__m512bh)_mm512_loadu_si512(p); };
  Index k = 0;
  for (; k + 64 <= depth; k += 64)
    for (Index i = 0; i < 2; i++) sums[i] = _mm512_dpbf16_ps(sums[i], at(w + k + 32 * i), at(x + k + 32 * i));
  float found = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
  for (; k < depth; k++) found += single(x[k]) * single(w[k]);
  return found;
}
bool pairs() { return __builtin_cpu_supports("avx512bf16"); }
#else
float in_pairs(const Half*, const Half*, Index) { return 0; }
bool pairs() { return false; }
#endif

template <class W, class X, class F>
void rows_of(const Product& p, const X* x, const F& dot, Index from, Index to) {
  const W* weight = static_cast<const W*>(p.weight);
  for (Index n = from; n < to; n++)
    for (Index m = 0; m < p.rows; m++) {
      float found = dot(x + m * p.depth, weight + n * p.depth, p.depth);
      found = (p.scale ? found * p.scale[n] : found) + (p.bias ? p.bias[n] : 0.0f);
      if (!p.half) static_cast<float*>(p.y)[m * p.out + n] = found;
      else static_cast<Half*>(p.y)[m * p.out + n].bits = storage::shorten(found);
    }
}

bool paired(const Product& p) { return p.half && p.bits == 16 && pairs(); }

// x as rows are multiplied: as it is, or in float32.
const void* readable(const Product& p, std::vector<float>& held) {
  if (!p.half || paired(p)) return p.x;
  float* wide = room(held, p.rows * p.depth);
  for (Index i = 0; i < p.rows * p.depth; i++) wide[i] = single(static_cast<const Half*>(p.x)[i]);
  return wide;
}

void some(const Product& p, const void* x, Index from, Index to) {
  const float* wide = static_cast<const float*>(x);
  if (paired(p)) rows_of<Half>(p, static_cast<const Half*>(x), in_pairs, from, to);
  else if (p.bits == 8) rows_of<Eighth>(p, wide, along<Eighth>, from, to);
  else if (p.bits == 16) rows_of<Half>(p, wide, along<Half>, from, to);
  else rows_of<float>(p, wide, along<float>, from, to);
}

// What this thread takes of so many, in whole steps.
struct Share {
  Index from, to;
  explicit Share(Index size, Index step = 1) : from(part(size / step, 0) * step), to(part(size / step, 1) * step) {}
  static Index part(Index steps, Index more) { return steps * (omp_get_thread_num() + more) / omp_get_num_threads(); }
};

template <class T>
void pass(const Product& gate, const Product& up, const Share& own) {
  for (Index m = 0; m < gate.rows; m++) {
    T *into = static_cast<T*>(gate.y) + m * gate.out, *by = static_cast<T*>(up.y) + m * up.out;
    for (Index n = own.from; n < own.to; n += LANES) store(into + n, gated<T>(load(into + n), load(by + n)));
  }
}

}  // namespace

void multiply(const Product& p) {
  static thread_local std::vector<float> wide;
  const void* x = readable(p, wide);
#pragma omp parallel if (p.out * p.depth > 1 << 14)
  {
    const Share own(p.out);
    some(p, x, own.from, own.to);
  }
}

void multiply(const Product& gate, const Product& up, const Product& down) {
  static thread_local std::vector<float> wide, inner;
  const void *x = readable(gate, wide), *between = nullptr;
  std::vector<float>& held = inner;  // of the caller
#pragma omp parallel if (gate.out * gate.depth > 1 << 14)
  {
    const Share own(gate.out, WIDTH), last(down.out);
    some(gate, x, own.from, own.to);
    some(up, x, own.from, own.to);
    gate.half ? pass<Half>(gate, up, own) : pass<float>(gate, up, own);
#pragma omp barrier
#pragma omp single
    between = readable(down, held);
    some(down, between, last.from, last.to);
  }
}
