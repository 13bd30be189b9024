// A causal convolution of each channel over time, and its gradients.
#include "tiles.h"

namespace {

constexpr Index MOST = 8;  // taps

// x (P, T + n - 1, D), P = B H, with D a multiple of WIDTH; weight (n, H, D); y (P, T, D): y_t = sum_i w_i x_{t+i}.
struct Taps {
  const float *x, *weight;
  Index problems, heads, time, dim, taps;
  const float* row(Index p, Index t) const { return x + (p * (time + taps - 1) + t) * dim; }
  const float* tap(Index i, Index p) const { return weight + (i * heads + p % heads) * dim; }
};

// The gradient of one head's taps in LANES channels.
void of_weight(const Taps& s, const float* grad, Index h, Index c, float* into) {
  Vector sums[MOST] = {};
  for (Index p = h; p < s.problems; p += s.heads)
    for (Index t = 0; t < s.time; t++) {
      const Vector g = load(grad + (p * s.time + t) * s.dim + c);
      for (Index i = 0; i < s.taps; i++) sums[i] += g * load(s.row(p, t + i) + c);
    }
  for (Index i = 0; i < s.taps; i++) store(into + (i * s.heads + h) * s.dim + c, sums[i]);
}

}  // namespace

extern "C" void convolution_forward(const float* x, const float* weight, float* y, Index problems, Index heads, Index time,
                                    Index dim, Index taps) {
  const Taps s{x, weight, problems, heads, time, dim, taps};
#pragma omp parallel for
  for (Index u = 0; u < problems * time; u++)
    for (Index c = 0; c < dim; c += LANES) {
      Vector sum = Vector{};
      for (Index i = 0; i < taps; i++) sum += load(s.tap(i, u / time) + c) * load(s.row(u / time, u % time + i) + c);
      store(y + u * dim + c, sum);
    }
}

// grad (P, T, D) of y; grad_x (P, T + n - 1, D) may be null.
extern "C" void convolution_backward(const float* x, const float* weight, const float* grad, float* grad_weight, float* grad_x,
                                     Index problems, Index heads, Index time, Index dim, Index taps) {
  const Taps s{x, weight, problems, heads, time, dim, taps};
  const Index panels = dim / LANES, length = time + taps - 1;
#pragma omp parallel
  {
#pragma omp for
    for (Index u = 0; u < heads * panels; u++) of_weight(s, grad, u / panels, u % panels * LANES, grad_weight);
#pragma omp for
    for (Index u = 0; u < (grad_x ? problems * length : 0); u++)
      for (Index c = 0; c < dim; c += LANES) {
        const Index p = u / length, t = u % length;
        Vector sum = Vector{};
        for (Index i = std::max<Index>(t - time + 1, 0); i < std::min(taps, t + 1); i++)
          sum += load(s.tap(i, p) + c) * load(grad + (p * time + t - i) * dim + c);
        store(grad_x + u * dim + c, sum);
      }
  }
}
