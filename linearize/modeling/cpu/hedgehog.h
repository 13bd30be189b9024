// The Hedgehog map phi(x) = [softmax(y), softmax(-y)], y = Wx.
#pragma once
#include "tiles.h"

// out = softmax(sign * y) of one row of `width` numbers.
inline void soften(const float* y, float sign, Index width, float* out) {
  Vector most = load(y) * sign;
  for (Index j = LANES; j < width; j += LANES) most = larger(most, load(y + j) * sign);
  const float top = largest(most);
  Vector total = Vector{};
  for (Index j = 0; j < width; j += LANES) {
    const Vector weight = power_of_two((load(y + j) * sign - top) * LOG2E);
    store(out + j, weight);
    total += weight;
  }
  const float share = 1 / sum(total);
  for (Index j = 0; j < width; j += LANES) store(out + j, load(out + j) * share);
}

// phi (rows, 2 columns) of x (rows, dim) and W (dim, columns); y is scratch (rows, columns).
inline void features(const Left& x, const float* weight, Index rows, Index dim, Index columns, float* y, float* phi) {
  product(x, {weight, columns, LANES}, rows, columns / LANES, dim, y, columns, false);
  for (Index i = 0; i < rows; i++) {
    soften(y + i * columns, 1, columns, phi + i * 2 * columns);
    soften(y + i * columns, -1, columns, phi + i * 2 * columns + columns);
  }
}
