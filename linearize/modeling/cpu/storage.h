// How exact keys and values are stored, as storage.py has it, bit for bit: 8 bits a channel, or 4 with a scale and an offset a block.
#pragma once
#include "tiles.h"

namespace storage {

constexpr Index BLOCK = 32, LEVELS = 127;
constexpr int32_t STEPS = 15, FURTHEST = 113, CUT = 20, FIRST = (127 - 20) << 3, NO_NUMBER = 255;
constexpr int32_t NEAREST = 1 << (CUT - 1), WHOLE_POWER = (1 << 23) - 1;
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

// The byte of a scale x >= 0: its eighths of a power of two beyond 2^-20, once `more` is added to the bits that are cut off.
inline int32_t scale_of(float x, int32_t more) {
  if (!(x < INFINITY)) return NO_NUMBER;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::min(std::max(((bits + more) >> CUT) - FIRST, 0), NO_NUMBER - 1);
}

inline float step_of(int32_t scale) {
  return scale == NO_NUMBER ? NAN : scale == 0 ? 0.0f : as_float((scale + FIRST) << CUT);
}

// The values of a block's codes.
inline void spread(const float* codes, const uint8_t* bounds, float* values) {
  const float half = step_of(bounds[0]) / 2, offset = int8_t(bounds[1]);
  for (Index i = 0; i < BLOCK; i++) values[i] = half * (2 * codes[i] + offset);
}

// Codes of a block of x, its scale and its offset.
inline void divide(const float* x, float* codes, uint8_t* bounds) {
  int32_t first = INT32_MAX, last = INT32_MIN;
  for (Index i = 0; i < BLOCK; i++) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    first = std::min(first, ordered(bits)), last = std::max(last, ordered(bits));
  }
  const float least = as_float(ordered(first)), greatest = as_float(ordered(last)), span = greatest - least, twice = greatest + least;
  const int32_t scale = std::max(scale_of(span / STEPS, NEAREST), scale_of(std::fabs(twice) / FURTHEST, WHOLE_POWER) & ~7);
  const float step = step_of(scale), most = 8 * FURTHEST / (8 + (scale & 7));
  float top = 0, offset = 0, by = 1;
  if (step > 0) {
    by = step, top = span > (STEPS - 1) * step ? STEPS : (span / by + WHOLE) - WHOLE;
    offset = (std::min(std::max(twice / by, -most), most) + WHOLE) - WHOLE - top;
  }
  bounds[0] = uint8_t(scale), bounds[1] = uint8_t(int8_t(offset));
  const Vector low = all(step * offset / 2), none = Vector{}, full = all(top);
  for (Index i = 0; i < BLOCK; i += LANES) {
    const Vector v = load(x + i), code = larger((v - low) / by, none);  // what is not a number: 0
    const Vector whole = ((code < full ? code : full) + WHOLE) - WHOLE, filled = v == all(greatest) ? full : whole;
    store(codes + i, v == all(least) ? none : filled);
  }
}

struct Four {
  static Index bytes(Index channels) { return channels / 2 + (channels + BLOCK - 1) / BLOCK * 2; }

  // Either of `bytes` and `values` may be null.
  static void keep(const float* x, Index channels, uint8_t* bytes, float* values, std::vector<float>& held) {
    const Index blocks = (channels + BLOCK - 1) / BLOCK, half = channels / 2;
    float *filled = room(held, 3 * blocks * BLOCK), *codes = filled + blocks * BLOCK, *found = codes + blocks * BLOCK;
    std::memcpy(filled, x, channels * sizeof(float));
    std::fill(filled + channels, filled + blocks * BLOCK, x[channels - 1]);
    for (Index b = 0; b < blocks; b++) {
      uint8_t bounds[2];
      divide(filled + b * BLOCK, codes + b * BLOCK, bounds);
      if (values) spread(codes + b * BLOCK, bounds, found + b * BLOCK);
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
    for (Index b = 0; b < blocks; b++) spread(codes + b * BLOCK, bytes + half + 2 * b, found + b * BLOCK);
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
  static void keep(const float* x, Index channels, uint8_t* bytes, float*, std::vector<float>&) {
    std::memcpy(bytes, x, channels * sizeof(float));
  }
  static void open(const uint8_t* bytes, Index channels, float* values, std::vector<float>&) {
    std::memcpy(values, bytes, channels * sizeof(float));
  }
};

// In bfloat16.
struct Sixteen {
  static Index bytes(Index channels) { return channels * sizeof(uint16_t); }
  static void keep(const float* x, Index channels, uint8_t* bytes, float*, std::vector<float>&) {
    for (Index c = 0; c < channels; c++) reinterpret_cast<uint16_t*>(bytes)[c] = shorten(x[c]);
  }
  static void open(const uint8_t* bytes, Index channels, float* values, std::vector<float>&) {
    for (Index c = 0; c < channels; c++) values[c] = widen(reinterpret_cast<const uint16_t*>(bytes)[c]);
  }
};

// An element of a memory in bfloat16 after `count` tokens, as memory.py dithers it: what is cut off is carried on the average.
inline uint16_t dithered(float x, Index count, Index element) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return uint16_t((uint32_t(bits) + (uint32_t(count * 40503 + element * 25717) & 0xFFFF)) >> 16);
}

}  // namespace storage
