// Rows in bfloat16 as whole numbers of 24 bits, each in three bytes: the processor multiplies those by weights in 8 bits as they are.
#pragma once
#include <immintrin.h>

#include <utility>

#include "matvec.h"

#define BYTES __attribute__((target("avx512vnni"), always_inline)) inline

struct Eighth {
  int8_t steps;
};

// A row is its step, a power of two, and from HEAD on a plane of bytes for each of LOW, MIDDLE and HIGH: x = (u - 2^23) step, where u
// is exact unless x is below 2^-15 of the row's largest number, and within 2^-23 of that one else, but no step is below 2^-122. Sums
// of a lane's products are exact; lanes, and the planes in each, are added up in float32.
struct InBytes {
  static constexpr Index HEAD = 64, STEP = 64, MOST = 1 << 20;  // of MOST products none of the sums leaves 32 bits
  static constexpr int BIAS = 127, LEAST = -100;  // of exponents; with lesser ones 1 / step were infinite
  static Index plane(Index depth) { return (depth + STEP - 1) / STEP * STEP; }
  static Index stride(Index depth) { return HEAD + 3 * plane(depth); }
#ifdef __AVX512F__
  static bool takes(const Product& p) { return p.half && p.bits == 8 && p.depth < MOST && __builtin_cpu_supports("avx512vnni"); }

  static __m512 wide(const Half* x, Index left) {
    const __mmask16 here = left < 16 ? (1u << left) - 1 : 0xFFFF;
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, x)), 16));
  }

  static void prepare(const Half* x, Index depth, uint8_t* row) {
    __m512i largest = _mm512_setzero_si512();  // as bits: of numbers that are none as well
    for (Index k = 0; k < depth; k += 16)
      largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(wide(x + k, depth - k))));
    const int exponent = std::max<int>((_mm512_reduce_max_epu32(largest) >> 23) - BIAS, LEAST);
    const float step = exponent > BIAS ? NAN : std::ldexp(1.0f, exponent - 22);
    std::memcpy(row, &step, sizeof step);
    const __m512 steps = _mm512_set1_ps(std::ldexp(1.0f, 22 - exponent));
    uint8_t* into = row + HEAD;
    for (Index k = 0; k < depth; k += 16, into += 16) {
      const __m512i u = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(wide(x + k, depth - k), steps)), _mm512_set1_epi32(1 << 23));
      _mm_storeu_si128((__m128i*)into, _mm512_cvtepi32_epi8(u));
      _mm_storeu_si128((__m128i*)(into + plane(depth)), _mm512_cvtepi32_epi8(_mm512_srli_epi32(u, 8)));
      _mm_storeu_si128((__m128i*)(into + 2 * plane(depth)), _mm512_cvtepi32_epi8(_mm512_srli_epi32(u, 16)));
    }
  }

  struct Sums {
    __m512i low, middle, high, all;

    BYTES void add(__m512i first, __m512i second, __m512i third, __m512i weights) {
      low = _mm512_dpbusd_epi32(low, first, weights), middle = _mm512_dpbusd_epi32(middle, second, weights);
      high = _mm512_dpbusd_epi32(high, third, weights), all = _mm512_dpbusd_epi32(all, _mm512_set1_epi8(1), weights);
    }

    BYTES float steps() const {
      const __m512 factor = _mm512_set1_ps(256), most = _mm512_cvtepi32_ps(_mm512_sub_epi32(high, _mm512_slli_epi32(all, 7)));
      const __m512 upper = _mm512_fmadd_ps(most, factor, _mm512_cvtepi32_ps(middle));
      return _mm512_reduce_add_ps(_mm512_fmadd_ps(upper, factor, _mm512_cvtepi32_ps(low)));
    }
  };

  template <int... I>
  __attribute__((target("avx512vnni"))) static void dots(std::integer_sequence<int, I...>, const uint8_t* row, const Eighth* w,
                                                         Index depth, Index apart, float* found) {
    const uint8_t *x = row + HEAD, *y = x + plane(depth), *z = y + plane(depth);
    Sums sums[sizeof...(I)] = {};  // by their numbers, not in a loop: those are in memory
    Index k = 0;
    for (; k + STEP <= depth; k += STEP) {
      const __m512i first = _mm512_loadu_si512(x + k), second = _mm512_loadu_si512(y + k), third = _mm512_loadu_si512(z + k);
      (sums[I].add(first, second, third, _mm512_loadu_si512(w + I * apart + k)), ...);
    }
    ((found[I] = sums[I].steps()), ...);
    float step;
    std::memcpy(&step, row, sizeof step);
    for (Index i = 0; i < Index(sizeof...(I)); i++) {
      for (Index j = k; j < depth; j++) found[i] += float((x[j] | y[j] << 8 | z[j] << 16) - (1 << 23)) * w[i * apart + j].steps;
      found[i] *= step;
    }
  }

  template <int ROWS>
  static void dot(const uint8_t* row, const Eighth* w, Index depth, Index apart, float* found) {
    dots(std::make_integer_sequence<int, ROWS>{}, row, w, depth, apart, found);
  }
#else
  static bool takes(const Product&) { return false; }
  static void prepare(const Half*, Index, uint8_t*) {}
  template <int ROWS>
  static void dot(const uint8_t*, const Eighth*, Index, Index, float*) {}
#endif
};
