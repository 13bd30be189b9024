// Vectors, products of small matrices and 2^x: what all kernels are made of. Everything is float32, nothing is approximate.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using Index = int64_t;
#ifdef __AVX512F__
constexpr int LANES = 16, TALL = 8;  // of a vector; rows that are multiplied at once, so that their sums stay in registers
#else
constexpr int LANES = 8, TALL = 4;
#endif
constexpr Index TILE = 16;  // queries at once
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr int WIDTH = 16;   // rows of numbers are filled up to a multiple of it, whatever the vectors
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES), aligned(4)));

inline Index up(Index n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }
inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline void store(float* x, Vector v) { *reinterpret_cast<Vector*>(x) = v; }
inline Vector all(float x) { return x - Vector{}; }  // x + 0 would not be x where it is -0
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// Each lane's own number, counted from `first`.
inline Mask counted(Index first) {
  Mask lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  return lane + int32_t(first);
}

// The halves of a vector and of its halves, folded by f until one number is left.
template <int SIZE = LANES, class F>
inline float folded(const float* x, const F& f) {
  float half[SIZE / 2];
  for (int i = 0; i < SIZE / 2; i++) half[i] = f(x[i], x[i + SIZE / 2]);
  if constexpr (SIZE == 2)
    return half[0];
  else
    return folded<SIZE / 2>(half, f);
}

inline float sum(Vector v) {
  return folded(reinterpret_cast<const float*>(&v), [](float a, float b) { return a + b; });
}

inline float largest(Vector v) {
  return folded(reinterpret_cast<const float*>(&v), [](float a, float b) { return a > b ? a : b; });
}

inline float dot(const float* a, const float* b, Index size) {
  Vector sums = Vector{};
  Index j = 0;
  for (; j + LANES <= size; j += LANES) sums += load(a + j) * load(b + j);
  float found = sum(sums);
  for (; j < size; j++) found += a[j] * b[j];
  return found;
}

// 2^x for x <= 127; 0 below 2^-126. The polynomial errs by less than half of the last bit on [-1/2, 1/2].
inline Vector power_of_two(Vector x) {
  const Vector bounded = larger(x, all(-126.0f));
  const Vector whole = (bounded + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const Vector f = bounded - whole;
  Vector p = all(1.5252734e-5f);
  for (float c : {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) p = p * f + c;
  const Mask exponent = __builtin_convertvector(whole, Mask) << 23;
  const Vector found = reinterpret_cast<Vector>(reinterpret_cast<Mask>(p) + exponent);
  return x < all(-126.0f) ? Vector{} : found;
}

// The natural logarithm of normal x > 0, after Cephes: exact where x is 1, within two of the last bits elsewhere.
inline Vector logarithm(Vector x) {
  const Mask bits = reinterpret_cast<Mask>(x) - 0x3f3504f3;  // of sqrt(1/2): x = 2^e m, m from there to sqrt(2)
  const Mask exponent = bits >> 23;
  const Vector m = reinterpret_cast<Vector>((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const Vector e = __builtin_convertvector(exponent, Vector);
  Vector p = all(7.0376836292e-2f);
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f,
                  -2.4999993993e-1f, 3.3333331174e-1f})
    p = p * m + c;
  const Vector square = m * m;
  const Vector small = square * m * p + e * -2.12194440e-4f - 0.5f * square;  // ln 2 is 0.693359375 - 2.12194440e-4
  return e * 0.693359375f + (m + small);
}

// Rows (B, h, T, .) with steps of their own; channels lie side by side.
struct Rows {
  const float* data;
  Index of_batch, of_head, of_token;
  const float* at(Index b, Index h, Index t) const { return data + b * of_batch + h * of_head + t * of_token; }
};

// A matrix as the left factor: element (i, k) is at data[i * row + k * column].
struct Left {
  const float* data;
  Index row, column;
};

// A matrix as the right factor: LANES columns of row k, from the p-th LANES columns on, are at data[p * panel + k * row].
struct Right {
  const float* data;
  Index row, panel;
  Right from(Index panels) const { return {data + panels * panel, row, panel}; }
};

template <int ROWS, int PANELS>
inline void tile(const Left& a, const Right& b, Index depth, float* c, Index row, bool add) {
  Vector sums[ROWS][PANELS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < PANELS; j++) sums[i][j] = add ? load(c + i * row + j * LANES) : Vector{};
  const float* right = b.data;
  const float* left = a.data;
  for (Index k = 0; k < depth; k++, right += b.row, left += a.column) {
    Vector columns[PANELS];
    for (int j = 0; j < PANELS; j++) columns[j] = load(right + j * b.panel);
    for (int i = 0; i < ROWS; i++) {
      const Vector x = all(left[i * a.row]);
      for (int j = 0; j < PANELS; j++) sums[i][j] += x * columns[j];
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < PANELS; j++) store(c + i * row + j * LANES, sums[i][j]);
}

template <int PANELS>
inline void columns(Left a, const Right& b, Index rows, Index depth, float* c, Index row, bool add) {
  Index i = 0;
  for (; i + TALL <= rows; i += TALL, a.data += TALL * a.row, c += TALL * row) tile<TALL, PANELS>(a, b, depth, c, row, add);
  for (; i < rows; i++, a.data += a.row, c += row) tile<1, PANELS>(a, b, depth, c, row, add);
}

// c (rows, LANES * panels) = a b, or += where `add`; c has `row` floats a row.
inline void product(const Left& a, Right b, Index rows, Index panels, Index depth, float* c, Index row, bool add) {
  while (panels > 0) {
    const Index width = panels == 4 || panels == 2 ? 2 : std::min<Index>(panels, 3);
    if (width == 3) columns<3>(a, b, rows, depth, c, row, add);
    if (width == 2) columns<2>(a, b, rows, depth, c, row, add);
    if (width == 1) columns<1>(a, b, rows, depth, c, row, add);
    panels -= width;
    b = b.from(width);
    c += width * LANES;
  }
}

// Swaps the blocks of a square of vectors that are `WIDE` lanes off its diagonal; all widths together transpose it.
template <int WIDE>
inline void swapped(Vector* square) {
  Mask low, high;
  for (int i = 0; i < LANES; i++) low[i] = i & WIDE ? LANES + i - WIDE : i, high[i] = i & WIDE ? LANES + i : i + WIDE;
  for (int i = 0; i < LANES; i++) {
    if (i & WIDE) continue;
    const Vector a = square[i], b = square[i + WIDE];
    square[i] = __builtin_shuffle(a, b, low), square[i + WIDE] = __builtin_shuffle(a, b, high);
  }
  if constexpr (WIDE > 1) swapped<WIDE / 2>(square);
}

// Rows x (rows, width) as the right factor of depth `width`: x^T in panels of LANES rows, zero beyond the last.
inline Right transposed(const float* x, Index rows, Index width, Index row, float* into) {
  for (Index p = 0; p < up(rows) / LANES; p++) {
    const float* from = x + p * LANES * row;
    float* panel = into + p * width * LANES;
    Index k = 0;
    for (; (p + 1) * LANES <= rows && k + LANES <= width; k += LANES) {
      Vector square[LANES];
      for (int i = 0; i < LANES; i++) square[i] = load(from + i * row + k);
      swapped<LANES / 2>(square);
      for (int i = 0; i < LANES; i++) store(panel + (k + i) * LANES, square[i]);
    }
    for (Index at = k; at < width; at++)
      for (int i = 0; i < LANES; i++) panel[at * LANES + i] = p * LANES + i < rows ? from[i * row + at] : 0.0f;
  }
  return {into, LANES, width * LANES};
}

// x (rows, width) with rows of up(width) floats, zero beyond the last.
inline Right padded(const float* x, Index rows, Index width, Index row, float* into) {
  for (Index i = 0; i < rows; i++) {
    std::memcpy(into + i * up(width), x + i * row, width * sizeof(float));
    std::fill(into + i * up(width) + width, into + (i + 1) * up(width), 0.0f);
  }
  return {into, up(width), LANES};
}

// Of scores a (rows, width) of queries `start` and later, those of keys after the query become 0.
inline void causal(float* a, Index start, Index rows, Index width) {
  for (Index i = 0; i < rows; i++) std::fill(a + i * width + start + i + 1, a + (i + 1) * width, 0.0f);
}

inline void add(float* into, const float* other, Index size, float factor = 1.0f) {
  Index i = 0;
  for (; i + LANES <= size; i += LANES) store(into + i, load(into + i) + factor * load(other + i));
  for (; i < size; i++) into[i] += factor * other[i];
}

// Memory for so many numbers, kept from call to call.
template <class T>
T* room(std::vector<T>& held, Index size) {
  if (Index(held.size()) < size) held.resize(size);
  return held.data();
}
