// The Hedgehog map of each head, and its gradients.
#include "hedgehog.h"

namespace {

constexpr Index BLOCK = 64;

// x (B, H, T, D) with steps of its own, W (H, D, F) with F a multiple of WIDTH, phi (B, H, T, 2 F).
struct Map {
  const float *x, *weight;
  Index batch, heads, time, dim, columns, of_batch, of_head, of_token;
  Left tokens(Index b, Index h, Index t) const { return {x + b * of_batch + h * of_head + t * of_token, of_token, 1}; }
};

// The gradient of y (columns) of one row of phi = [softmax(y), softmax(-y)].
void harden(const float* phi, const float* grad, Index columns, float* into) {
  Vector up = Vector{}, down = Vector{};
  for (Index j = 0; j < columns; j += LANES) {
    up += load(phi + j) * load(grad + j);
    down += load(phi + columns + j) * load(grad + columns + j);
  }
  const float above = sum(up), below = sum(down);
  for (Index j = 0; j < columns; j += LANES)
    store(into + j, load(phi + j) * (load(grad + j) - above) - load(phi + columns + j) * (load(grad + columns + j) - below));
}

}  // namespace

extern "C" void hedgehog_forward(const float* x, const float* weight, float* phi, Index batch, Index heads, Index time, Index dim,
                                 Index columns, Index of_batch, Index of_head, Index of_token) {
  const Map m{x, weight, batch, heads, time, dim, columns, of_batch, of_head, of_token};
  const Index tiles = (time + BLOCK - 1) / BLOCK;
#pragma omp parallel
  {
    std::vector<float> y(BLOCK * columns);
#pragma omp for
    for (Index u = 0; u < batch * heads * tiles; u++) {
      const Index b = u / tiles / heads, h = u / tiles % heads, start = u % tiles * BLOCK, rows = std::min(BLOCK, time - start);
      float* out = phi + ((b * heads + h) * time + start) * 2 * columns;
      features(m.tokens(b, h, start), weight + h * dim * columns, rows, dim, columns, y.data(), out);
    }
  }
}

// Shares (H, S, D, F) of the gradient of W, of which each sums a part of the tokens; grad_x (B, H, T, D) may be null.
extern "C" void hedgehog_backward(const float* x, const float* weight, const float* phi, const float* grad, float* shares,
                                  float* grad_x, Index parts, Index batch, Index heads, Index time, Index dim, Index columns,
                                  Index of_batch, Index of_head, Index of_token) {
  const Map m{x, weight, batch, heads, time, dim, columns, of_batch, of_head, of_token};
  const Index tiles = (time + BLOCK - 1) / BLOCK, all = batch * tiles, length = (all + parts - 1) / parts;
#pragma omp parallel
  {
    std::vector<float> y(BLOCK * columns), back(up(dim) * columns), row(BLOCK * up(dim));
#pragma omp for
    for (Index u = 0; u < heads * parts; u++) {
      const Index h = u / parts;
      float* share = shares + u * dim * columns;
      std::fill_n(share, dim * columns, 0.0f);
      const Right turned = grad_x ? transposed(weight + h * dim * columns, dim, columns, columns, back.data()) : Right{};
      for (Index t = u % parts * length; t < std::min(all, (u % parts + 1) * length); t++) {
        const Index b = t / tiles, start = t % tiles * BLOCK, rows = std::min(BLOCK, time - start);
        const Index first = (b * heads + h) * time + start;
        for (Index i = 0; i < rows; i++) {
          const Index at = (first + i) * 2 * columns;
          harden(phi + at, grad + at, columns, y.data() + i * columns);
        }
        const Left own = m.tokens(b, h, start);
        product({own.data, own.column, own.row}, {y.data(), columns, LANES}, dim, columns / LANES, rows, share, columns, true);
        if (!grad_x) continue;
        product({y.data(), columns, 1}, turned, rows, up(dim) / LANES, columns, row.data(), up(dim), false);
        for (Index i = 0; i < rows; i++) std::memcpy(grad_x + (first + i) * dim, row.data() + i * up(dim), dim * sizeof(float));
      }
    }
  }
}
