// Kernels that PyTorch calls by itself, without Python between: a compiled step has some two hundred of them a token.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "additive_step.h"
#include "matvec.h"

namespace {

// In float32, or nothing.
at::Tensor wide(const std::optional<at::Tensor>& x) { return x ? x->to(at::kFloat).contiguous() : at::Tensor(); }

const float* numbers(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

// x (..., K) W^T + b of weights (N, K) in x's dtype, or in int8 with a scale (N) each: (..., N).
at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                  const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && weight.dim() == 2 && x.size(-1) == weight.size(1),
              "matvec: contiguous x (..., K) and weights (N, K) are needed");
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  at::Tensor y = at::empty(sizes, x.options());
  const at::Tensor scales = wide(scale), added = wide(bias);
  const bool half = x.scalar_type() == at::kBFloat16;
  multiply({x.const_data_ptr(), weight.const_data_ptr(), numbers(scales), numbers(added), y.mutable_data_ptr(),
            x.numel() / weight.size(1), weight.size(0), weight.size(1), half, int(8 * weight.element_size())});
  return y;
}

// S' = e^g S + k v^T and q S' of q (B, M, R, K), k (B, M, K), v (B, M, V), g none, (B, M) or (B, M, K), S (B, M, K, V).
std::tuple<at::Tensor, at::Tensor> additive_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                 const std::optional<at::Tensor>& g, const at::Tensor& state) {
  for (const auto* x : {&q, &k, &v, &state}) TORCH_CHECK(x->is_contiguous(), "additive_step: contiguous tensors are needed");
  const Index problems = k.size(0) * k.size(1), keys = k.size(2), width = v.size(2), readers = q.size(2);
  at::Tensor out = at::empty({q.size(0), q.size(1), readers, width}, q.options()), after = at::empty(state.sizes(), state.options());
  enter_and_read({q.const_data_ptr<float>(), k.const_data_ptr<float>(), v.const_data_ptr<float>(), numbers(g ? *g : at::Tensor()),
                  state.const_data_ptr<float>(), out.mutable_data_ptr<float>(), after.mutable_data_ptr<float>(), problems, readers,
                  keys, width, g && g->dim() == 3});
  return {out, after};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(linearize, m) {
  m.def("additive_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor state) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def("matvec(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(linearize, CPU, m) {
  m.impl("matvec", matvec);
  m.impl("additive_step", additive_step);
}
