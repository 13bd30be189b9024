// How exact keys and values are stored, as storage.py has it, bit for bit: 8 bits a channel, or 4 between two bounds a block.
#pragma once
#include "tiles.h"

namespace storage {

constexpr Index BLOCK = 32, STEPS = 15, LEVELS = 127;
constexpr float WHOLE = 12582912.0f;  // 1.5 * 2^23: to add and take it rounds to the nearest integer, of two the even one

// bfloat16 as the upper half of a float: rounded to the nearest, of two the even one.
inline uint16_t shorten(float x) {
  if (x != x) return 0x7FC0;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline float as_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(uint16_t half) { return as_float(int32_t(uint32_t(half) << 16)); }

// The bits of floats as integers of the same order, or back; what is not a number comes last, or first.
inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & INT32_MAX); }

// The values of codes between two bounds.
inline void interpolate(const float* codes, float low, float high, float* values) {
  const float apart = high - low;
  for (Index i = 0; i < BLOCK; i++) {
    const float weight = codes[i] / STEPS, rising = std::fma(weight, apart, low), falling = std::fma(weight - 1, apart, high);
    values[i] = weight < 0.5f ? rising : falling;
  }
}

// Codes of a block of x, and its bounds.
inline void divide(const float* x, float* codes, uint16_t* bounds) {
  int32_t first = INT32_MAX, last = INT32_MIN;
  for (Index i = 0; i < BLOCK; i++) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    first = std::min(first, ordered(bits)), last = std::max(last, ordered(bits));
  }
  const float least = as_float(ordered(first)), greatest = as_float(ordered(last));
  bounds[0] = shorten(least), bounds[1] = shorten(greatest);
  const float low = widen(bounds[0]), step = (widen(bounds[1]) - low) / STEPS;
  const Vector by = all(step > 0 ? step : 1), none = Vector{}, full = all(STEPS);
  for (Index i = 0; i < BLOCK; i += LANES) {
    const Vector v = load(x + i), code = larger((v - low) / by, none);  // what is not a number: 0
    const Vector whole = ((code < full ? code : full) + WHOLE) - WHOLE, filled = v == all(greatest) ? full : whole;
    store(codes + i, v == all(least) ? none : filled);
  }
  if (step == 0) std::fill_n(codes, BLOCK, 0.0f);
}

struct Four {
  static Index bytes(Index channels) { return channels / 2 + (channels + BLOCK - 1) / BLOCK * 2 * sizeof(uint16_t); }

  // Either of `bytes` and `values` may be null.
  static void keep(const float* x, Index channels, uint8_t* bytes, float* values, std::vector<float>& held) {
    const Index blocks = (channels + BLOCK - 1) / BLOCK, half = channels / 2;
    float *filled = room(held, 3 * blocks * BLOCK), *codes = filled + blocks * BLOCK, *found = codes + blocks * BLOCK;
    std::memcpy(filled, x, channels * sizeof(float));
    std::fill(filled + channels, filled + blocks * BLOCK, x[channels - 1]);
    for (Index b = 0; b < blocks; b++) {
      uint16_t bounds[2];
      divide(filled + b * BLOCK, codes + b * BLOCK, bounds);
      if (values) interpolate(codes + b * BLOCK, widen(bounds[0]), widen(bounds[1]), found + b * BLOCK);
      if (bytes) std::memcpy(bytes + half + b * sizeof bounds, bounds, sizeof bounds);
    }
    for (Index c = 0; bytes && c < half; c++) bytes[c] = uint8_t(int32_t(codes[c]) | int32_t(codes[c + half]) << 4);
    for (Index c = 0; values && c < channels; c++) values[c] = found[c] + (x[c] - x[c]);
  }

  static void open(const uint8_t* bytes, Index channels, float* values, std::vector<float>& held) {
    const Index blocks = (channels + BLOCK - 1) / BLOCK, half = channels / 2;
    float *codes = room(held, 2 * blocks * BLOCK), *found = codes + blocks * BLOCK;
    for (Index c = 0; c < half; c++) codes[c] = bytes[c] & STEPS, codes[c + half] = bytes[c] >> 4;
    std::fill(codes + channels, codes + blocks * BLOCK, 0.0f);
    for (Index b = 0; b < blocks; b++) {
      uint16_t bounds[2];
      std::memcpy(bounds, bytes + half + b * sizeof bounds, sizeof bounds);
      interpolate(codes + b * BLOCK, widen(bounds[0]), widen(bounds[1]), found + b * BLOCK);
    }
    std::memcpy(values, found, channels * sizeof(float));
  }
};

struct Eight {
  static Index bytes(Index channels) { return channels + sizeof(uint16_t); }

  static void keep(const float* x, Index channels, uint8_t* bytes, float* values, std::vector<float>& held) {
    int32_t most = 0;  // |x| as integers are in the same order, and what is not a number comes last
    for (Index c = 0; c < channels; c++) {
      int32_t bits;
      std::memcpy(&bits, x + c, sizeof bits);
      most = std::max(most, bits & INT32_MAX);
    }
    const uint16_t scale = shorten(as_float(most) / LEVELS);
    const float wide = widen(scale), by = wide > 0 ? wide : 1;
    float* codes = room(held, channels);
    for (Index c = 0; c < channels; c++) {
      const float code = x[c] / by, number = code == code ? code : 0, lower = number < LEVELS ? number : LEVELS;
      codes[c] = ((lower > -LEVELS ? lower : -LEVELS) + WHOLE) - WHOLE;
    }
    for (Index c = 0; values && c < channels; c++) values[c] = codes[c] * wide + (x[c] - x[c]);
    for (Index c = 0; bytes && c < channels; c++) bytes[c] = uint8_t(int32_t(codes[c]));
    if (bytes) std::memcpy(bytes + channels, &scale, sizeof scale);
  }

  static void open(const uint8_t* bytes, Index channels, float* values, std::vector<float>&) {
    uint16_t scale;
    std::memcpy(&scale, bytes + channels, sizeof scale);
    for (Index c = 0; c < channels; c++) values[c] = float(int8_t(bytes[c])) * widen(scale);
  }
};

// As they are computed.
struct Plain {
  static Index bytes(Index channels) { return channels * sizeof(float); }
  static void open(const uint8_t* bytes, Index channels, float* values, std::vector<float>&) {
    std::memcpy(values, bytes, channels * sizeof(float));
  }
};

}  // namespace storage
