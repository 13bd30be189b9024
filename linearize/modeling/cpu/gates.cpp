// Log-decays of a sigmoid gate, log sigmoid(y + bias) / divisor, and their gradients.
#include "tiles.h"

namespace {

// y (B, T, H F) with `step` numbers from a token to the next, bias (H F) or null; F a multiple of WIDTH.
struct Gate {
  const float *y, *bias;
  Index heads, time, width, step;
  Vector at(Index b, Index t, Index channel) const {
    const Vector x = load(y + (b * time + t) * step + channel);
    return bias ? x + load(bias + channel) : x;
  }
};

inline Vector size(Vector x) { return larger(x, -x); }

// log(1 + e^-|x|): what 1 + z is rounded by is put back, so that a small z is not lost.
inline Vector softened(Vector x) {
  const Vector z = power_of_two(size(x) * -LOG2E), u = 1.0f + z;
  return logarithm(u) + (z - (u - 1.0f)) / u;
}

// sigmoid(-x)
inline Vector closed(Vector x) {
  const Vector z = power_of_two(size(x) * -LOG2E);
  return (x < 0.0f ? all(1.0f) : z) / (1.0f + z);
}

}  // namespace

// out (B, H, T, F)
extern "C" void gate_forward(const float* y, const float* bias, float* out, Index batch, Index heads, Index time, Index width,
                             Index step, float divisor) {
  const Gate g{y, bias, heads, time, width, step};
  const float share = 1 / divisor;
#pragma omp parallel for
  for (Index u = 0; u < batch * time; u++)
    for (Index h = 0; h < heads; h++) {
      const Index b = u / time, t = u % time;
      float* into = out + ((b * heads + h) * time + t) * width;
      for (Index j = 0; j < width; j += LANES) {
        const Vector x = g.at(b, t, h * width + j);
        store(into + j, ((x < 0.0f ? x : Vector{}) - softened(x)) * share);
      }
    }
}

// Of grad (B, H, T, F) that by y, of_y (B, T, H F), and shares (S, H F) of that by the bias, each the sum of a part of the tokens.
extern "C" void gate_backward(const float* y, const float* bias, const float* grad, float* of_y, float* shares, Index parts,
                              Index batch, Index heads, Index time, Index width, Index step, float divisor) {
  const Gate g{y, bias, heads, time, width, step};
  const Index all = batch * time, length = (all + parts - 1) / parts;
  const float share = 1 / divisor;
#pragma omp parallel for
  for (Index p = 0; p < parts; p++) {
    float* sums = shares + p * heads * width;
    std::fill_n(sums, heads * width, 0.0f);
    for (Index u = p * length; u < std::min(all, (p + 1) * length); u++)
      for (Index h = 0; h < heads; h++) {
        const Index b = u / time, t = u % time;
        const float* from = grad + ((b * heads + h) * time + t) * width;
        for (Index j = 0; j < width; j += LANES) {
          const Index channel = h * width + j;
          const Vector found = load(from + j) * closed(g.at(b, t, channel)) * share;
          store(of_y + u * heads * width + channel, found);
          store(sums + channel, load(sums + channel) + found);
        }
      }
  }
}
