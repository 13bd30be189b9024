// PyTorch's own kernels for one row read 7 to 18 GB/s of weights where memory gives two threads 30 to 50.
#include "matvec.h"

#include "planes.h"
#include "storage.h"

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

constexpr int STREAMS = 4;  // rows that are read at once, far from each other: one stream waits for memory wherever a page ends

inline float single(float x) { return x; }
inline float single(Eighth x) { return x.steps; }
inline float single(Half x) { return storage::widen(x.bits); }

// x . w of so many rows of weights, `apart` numbers from each to the next: two sums a row, so that none waits for the one before.
struct InFloat {
  static Index stride(Index depth) { return depth; }
  template <int ROWS, class W>
  static void dot(const float* x, const W* w, Index depth, Index apart, float* found) {
    Vector sums[ROWS][2] = {};
    Index k = 0;
    for (; k + 2 * LANES <= depth; k += 2 * LANES) {
      const Vector first = load(x + k), second = load(x + k + LANES);
      for (int i = 0; i < ROWS; i++) {
        sums[i][0] += first * load(w + i * apart + k);
        sums[i][1] += second * load(w + i * apart + k + LANES);
      }
    }
    for (int i = 0; i < ROWS; i++) {
      const W* row = w + i * apart;
      Index j = k;
      for (; j + LANES <= depth; j += LANES) sums[i][0] += load(x + j) * load(row + j);
      found[i] = sum(sums[i][0] + sums[i][1]);
      for (; j < depth; j++) found[i] += x[j] * single(row[j]);
    }
  }
};

// The same of two in bfloat16, by the processor's own products of pairs: exact ones, added up in float32.
struct InPairs {
  static Index stride(Index depth) { return depth; }
#ifdef __AVX512F__
  template <int ROWS, class W>
  __attribute__((target("avx512bf16"))) static void dot(const Half* x, const W* w, Index depth, Index apart, float* found) {
    __m512 sums[ROWS][2] = {};
    const auto at = [](const Half* p) { return (__m512bh)_mm512_loadu_si512(p); };
    Index k = 0;
    for (; k + 64 <= depth; k += 64) {
      const __m512bh first = at(x + k), second = at(x + k + 32);
      for (int i = 0; i < ROWS; i++) {
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], at(w + i * apart + k), first);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], at(w + i * apart + k + 32), second);
      }
    }
    for (int i = 0; i < ROWS; i++) {
      found[i] = _mm512_reduce_add_ps(_mm512_add_ps(sums[i][0], sums[i][1]));
      for (Index j = k; j < depth; j++) found[i] += single(x[j]) * single(w[i * apart + j]);
    }
  }
  static bool known() { return __builtin_cpu_supports("avx512bf16"); }
#else
  template <int ROWS, class W>
  static void dot(const Half*, const W*, Index, Index, float*) {}
  static bool known() { return false; }
#endif
};

void keep(const Product& p, Index row, Index n, float found) {
  found = (p.scale ? found * p.scale[n] : found) + (p.bias ? p.bias[n] : 0.0f);
  if (!p.half) static_cast<float*>(p.y)[row * p.out + n] = found;
  else static_cast<Half*>(p.y)[row * p.out + n].bits = storage::shorten(found);
}

template <class Dots, int ROWS, class W, class X>
void some(const Product& p, const X* x, Index from, Index to) {
  const Index each = (to - from) / ROWS;
  float found[ROWS];
  for (Index n = from; n < from + each; n++)
    for (Index m = 0; m < p.rows; m++) {
      Dots::template dot<ROWS>(x + m * Dots::stride(p.depth), static_cast<const W*>(p.weight) + n * p.depth, p.depth, each * p.depth, found);
      for (int i = 0; i < ROWS; i++) keep(p, m, n + i * each, found[i]);
    }
  if constexpr (ROWS > 1) some<Dots, 1, W>(p, x, from + each * ROWS, to);
}

bool paired(const Product& p) { return p.half && p.bits == 16 && InPairs::known(); }

template <class T>
void let_through(const Product& gate, const Product& up, const Share& own) {
  for (Index m = 0; m < gate.rows; m++) {
    T *into = static_cast<T*>(gate.y) + m * gate.out, *by = static_cast<T*>(up.y) + m * up.out;
    for (Index n = own.from; n < own.to; n += LANES) store(into + n, gated<T>(load(into + n), load(by + n)));
  }
}

}  // namespace

const void* readable(const Product& p, std::vector<float>& held) {
  if (!p.half || paired(p)) return p.x;
  if (InBytes::takes(p)) {
    const Index bytes = InBytes::stride(p.depth);
    auto* rows = reinterpret_cast<uint8_t*>(room(held, p.rows * bytes / sizeof(float)));
    for (Index m = 0; m < p.rows; m++) InBytes::prepare(static_cast<const Half*>(p.x) + m * p.depth, p.depth, rows + m * bytes);
    return rows;
  }
  float* wide = room(held, p.rows * p.depth);
  for (Index i = 0; i < p.rows * p.depth; i++) wide[i] = single(static_cast<const Half*>(p.x)[i]);
  return wide;
}

void multiply(const Product& p, const void* x, const Share& own) {
  const float* wide = static_cast<const float*>(x);
  if (paired(p)) some<InPairs, STREAMS, Half>(p, static_cast<const Half*>(x), own.from, own.to);
  else if (InBytes::takes(p)) some<InBytes, STREAMS, Eighth>(p, static_cast<const uint8_t*>(x), own.from, own.to);
  else if (p.bits == 8) some<InFloat, STREAMS, Eighth>(p, wide, own.from, own.to);
  else if (p.bits == 16) some<InFloat, STREAMS, Half>(p, wide, own.from, own.to);
  else some<InFloat, STREAMS, float>(p, wide, own.from, own.to);
}

void pass(const Product& gate, const Product& up, const Share& own) {
  gate.half ? let_through<Half>(gate, up, own) : let_through<float>(gate, up, own);
}

void multiply(const Product& p) {
  static thread_local std::vector<float> wide;
  const void* x = readable(p, wide);
#pragma omp parallel if (p.out * p.depth > 1 << 14)
  multiply(p, x, Share(p.out));
}

void multiply(const Product& gate, const Product& up, const Product& down) {
  static thread_local std::vector<float> wide, wider, inner;
  const void *x = readable(gate, wide), *again = readable(up, wider), *between = nullptr;
  std::vector<float>& held = inner;  // of the caller
#pragma omp parallel if (gate.out * gate.depth > 1 << 14)
  {
    const Share own(gate.out, WIDTH);
    multiply(gate, x, own);
    multiply(up, again, own);
    pass(gate, up, own);
#pragma omp barrier
#pragma omp single
    between = readable(down, held);
    multiply(down, between, Share(down.out));
  }
}
