// One softmax over a near half and a far memory's read, and its gradients.
#include "tiles.h"

namespace {

// Numerator (B, H, T, V), denominator and top (B, H, T) of the near half, and of all queries but the first `lead` read
// (B, H, T - lead, V + 1) with steps of its own, whose last column is the memory's mass, and the log of the factor on it
// (B, H, T - lead); all of base e. Gradients are in the order of read.
struct Merge {
  const float *numerator, *denominator, *top, *read, *factor;
  Index batch, heads, time, width, lead, of_batch, of_head, of_token;

  struct Row {
    const float *near, *far;      // the second is null for the first queries
    float mass, of_near, of_far;  // what both halves are multiplied by
    Index place;                  // of the factor
  };

  Row row(Index n) const {
    const float* near = numerator + n * width;
    if (n % time < lead) return {near, nullptr, 0, 1 / denominator[n], 0, 0};
    const Rows rows{read, of_batch, of_head, of_token};
    const float* far = rows.at(n / time / heads, n / time % heads, n % time - lead);
    const Index place = n - (n / time + 1) * lead;
    const float mass = far[width], other = mass > 0 ? factor[place] : -INFINITY, most = std::max(top[n], other);
    const float a = std::exp(top[n] - most), b = std::exp(other - most), whole = denominator[n] * a + mass * b;
    return {near, far, mass, a / whole, mass > 0 ? b / whole : 0, place};
  }

  // Of a tensor (B, T, H, V), where row n of (B, H, T) has its place.
  Index place(Index n) const { return ((n / time / heads * time + n % time) * heads + n / time % heads) * width; }
};

}  // namespace

extern "C" void merge_forward(const float* numerator, const float* denominator, const float* top, const float* read,
                              const float* factor, float* out, Index batch, Index heads, Index time, Index width, Index lead,
                              Index of_batch, Index of_head, Index of_token) {
  const Merge m{numerator, denominator, top, read, factor, batch, heads, time, width, lead, of_batch, of_head, of_token};
#pragma omp parallel for
  for (Index n = 0; n < batch * heads * time; n++) {
    const Merge::Row r = m.row(n);
    float* into = out + m.place(n);
    if (!r.far)
      for (Index j = 0; j < width; j++) into[j] = r.near[j] * r.of_near;
    else
      for (Index j = 0; j < width; j++) into[j] = r.near[j] * r.of_near + r.far[j] * r.of_far;
  }
}

// `out` is what the forward pass gave, `grad` its gradient (B, T, H, V); those of the near half may both be null.
extern "C" void merge_backward(const float* numerator, const float* denominator, const float* top, const float* read,
                               const float* factor, const float* out, const float* grad, float* grad_numerator,
                               float* grad_denominator, float* grad_read, float* grad_factor, Index batch, Index heads,
                               Index time, Index width, Index lead, Index of_batch, Index of_head, Index of_token) {
  const Merge m{numerator, denominator, top, read, factor, batch, heads, time, width, lead, of_batch, of_head, of_token};
#pragma omp parallel for
  for (Index n = 0; n < batch * heads * time; n++) {
    const Merge::Row r = m.row(n);
    const float* own = grad + m.place(n);
    const float of_out = dot(own, out + m.place(n), width);
    if (r.far) {
      float* into = grad_read + r.place * (width + 1);
      for (Index j = 0; j < width; j++) into[j] = own[j] * r.of_far;
      into[width] = -r.of_far * of_out;
      grad_factor[r.place] = r.of_far * (dot(own, r.far, width) - r.mass * of_out);
    }
    if (!grad_numerator) continue;
    for (Index j = 0; j < width; j++) grad_numerator[n * width + j] = own[j] * r.of_near;
    grad_denominator[n] = -r.of_near * of_out;
  }
}
