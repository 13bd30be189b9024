// One softmax over a near half and a far memory's read, and its gradients.
#include "tiles.h"

namespace {

// Numerator (B, H, T, V), denominator and top (B, H, T) of the near half, read (B, H, T, V + 1) with steps of its own, whose last
// column is the memory's mass, and the log of the factor on it (B, H, T); all of base e. Gradients are in the order of read.
struct Merge {
  const float *numerator, *denominator, *top, *read, *factor;
  Index batch, heads, time, width, of_batch, of_head, of_token;

  struct Row {
    const float *near, *far;
    float mass, of_near, of_far;  // what both halves are multiplied by
  };

  Row row(Index n) const {
    const Rows rows{read, of_batch, of_head, of_token};
    const float* far = rows.at(n / time / heads, n / time % heads, n % time);
    const float mass = far[width], other = mass > 0 ? factor[n] : -INFINITY, most = std::max(top[n], other);
    const float a = std::exp(top[n] - most), b = std::exp(other - most), whole = denominator[n] * a + mass * b;
    return {numerator + n * width, far, mass, a / whole, mass > 0 ? b / whole : 0};
  }

  // Of a tensor (B, T, H, V), where row n of (B, H, T) has its place.
  Index place(Index n) const { return ((n / time / heads * time + n % time) * heads + n / time % heads) * width; }
};

}  // namespace

extern "C" void merge_forward(const float* numerator, const float* denominator, const float* top, const float* read,
                              const float* factor, float* out, Index batch, Index heads, Index time, Index width, Index of_batch,
                              Index of_head, Index of_token) {
  const Merge m{numerator, denominator, top, read, factor, batch, heads, time, width, of_batch, of_head, of_token};
#pragma omp parallel for
  for (Index n = 0; n < batch * heads * time; n++) {
    const Merge::Row r = m.row(n);
    float* into = out + m.place(n);
    for (Index j = 0; j < width; j++) into[j] = r.near[j] * r.of_near + r.far[j] * r.of_far;
  }
}

// `out` is what the forward pass gave, `grad` its gradient (B, T, H, V); those of the near half may both be null.
extern "C" void merge_backward(const float* numerator, const float* denominator, const float* top, const float* read,
                               const float* factor, const float* out, const float* grad, float* grad_numerator,
                               float* grad_denominator, float* grad_read, float* grad_factor, Index batch, Index heads, Index time, Index width, Index of_batch, Index of_head, Index of_token) {
  const Merge m{numerator, denominator, top, read, factor, batch, heads, time, width, of_batch, of_head, of_token};
#pragma omp parallel for
  for (Index n = 0; n < batch * heads * time; n++) {
    const Merge::Row r = m.row(n);
    const float* own = grad + m.place(n);
    const float of_out = dot(own, out + m.place(n), width), of_read = dot(own, r.far, width);
    float* into = grad_read + n * (width + 1);
    for (Index j = 0; j < width; j++) into[j] = own[j] * r.of_far;
    into[width] = -r.of_far * of_out;
    grad_factor[n] = r.of_far * (of_read - r.mass * of_out);
    if (!grad_numerator) continue;
    for (Index j = 0; j < width; j++) grad_numerator[n * width + j] = own[j] * r.of_near;
    grad_denominator[n] = -r.of_near * of_out;
  }
}
