#include "additive_step.h"

namespace {

// into = a x + b y of so many numbers
inline void blend(float* into, float a, const float* x, float b, const float* y, Index size) {
  Index j = 0;
  for (; j + LANES <= size; j += LANES) store(into + j, a * load(x + j) + b * load(y + j));
  for (; j < size; j++) into[j] = a * x[j] + b * y[j];
}

}  // namespace

void enter_and_read(const AdditiveStep& s) {
#pragma omp parallel for if (s.problems * s.keys * s.width > 1 << 14)
  for (Index p = 0; p < s.problems; p++) {
    float* out = s.out + p * s.readers * s.width;
    std::fill_n(out, s.readers * s.width, 0.0f);
    for (Index i = 0; i < s.keys; i++) {
      const Index row = p * s.keys + i;
      const float decay = s.g ? std::exp(s.g[s.channelwise ? row : p]) : 1.0f;
      float* after = s.after + row * s.width;
      blend(after, decay, s.state + row * s.width, s.k[row], s.v + p * s.width, s.width);
      for (Index r = 0; r < s.readers; r++) add(out + r * s.width, after, s.width, s.q[(p * s.readers + r) * s.keys + i]);
    }
  }
}
