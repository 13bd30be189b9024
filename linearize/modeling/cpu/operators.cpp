// Kernels that PyTorch calls by itself, without Python between: a compiled step has some two hundred of them a token.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "additive_step.h"
#include "hybrid_step.h"
#include "layer_step.h"
#include "matvec.h"
#include "rope.h"

namespace {

// In float32, or nothing.
at::Tensor wide(const std::optional<at::Tensor>& x) { return x ? x->to(at::kFloat).contiguous() : at::Tensor(); }

const float* numbers(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

// x (rows, K) W^T + b of weights (N, K) in x's dtype, or in int8 with a scale (N) each.
struct FewRows {
  at::Tensor y, scales, added;
  Product product;
  FewRows(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
          const std::optional<at::Tensor>& bias)
      : scales(wide(scale)), added(wide(bias)) {
    TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && weight.dim() == 2 && x.size(-1) == weight.size(1),
                "contiguous x (..., K) and weights (N, K) are needed");
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    y = at::empty(sizes, x.options());
    product = {x.const_data_ptr(), weight.const_data_ptr(), numbers(scales), numbers(added), y.mutable_data_ptr(),
               x.numel() / weight.size(1), weight.size(0), weight.size(1), x.scalar_type() == at::kBFloat16,
               int(8 * weight.element_size())};
  }
};

at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                  const std::optional<at::Tensor>& bias) {
  const FewRows own(x, weight, scale, bias);
  multiply(own.product);
  return own.y;
}

// down(silu(gate(x)) up(x)) of x (..., K), weights (N, K) twice and (K, N), N a multiple of WIDTH.
at::Tensor feed_forward(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down,
                        const std::optional<at::Tensor>& gate_scale, const std::optional<at::Tensor>& up_scale,
                        const std::optional<at::Tensor>& down_scale) {
  const FewRows first(x, gate, gate_scale, {}), second(x, up, up_scale, {}), last(first.y, down, down_scale, {});
  multiply(first.product, second.product, last.product);
  return last.y;
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

// x (B, h, 1, D), in float32, before rope.cpp's rotation.
at::Tensor unturned(const at::Tensor& y, const at::Tensor& cos, const at::Tensor& sin) {
  at::Tensor x = at::empty(y.sizes(), y.options());
  const Index heads = y.size(1), dim = y.size(3), width = cos.size(-1);
  rope(numbers(y), numbers(cos), numbers(sin), x.mutable_data_ptr<float>(), heads * dim, dim, dim, y.size(0), heads, 1, dim, width,
       cos.size(0) == 1 ? 0 : width, INVERSE);
  return x;
}

void check_states(const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& held_far, const at::Tensor& far) {
  for (const auto* x : {&k, &v, &far}) TORCH_CHECK(x->is_contiguous(), "contiguous states are needed");
  TORCH_CHECK(!held_far || held_far->is_contiguous(), "contiguous states are needed");
}

// One token of `Mixer` with the default's halves: (B, 1, H, V) of q (B, H, 1, D), k, v and far_k (B, G, 1, .) and what is held,
// which changes in place. Where cos and sin are given, the far half takes queries and keys before that rotation.
at::Tensor hybrid_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& far_q,
                       const at::Tensor& far_k, const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin, const at::Tensor& count,
                       at::Tensor held_k, at::Tensor held_v, const std::optional<at::Tensor>& held_far, at::Tensor far,
                       const at::Tensor& weight_q, const at::Tensor& weight_k, const std::optional<at::Tensor>& slope,
                       const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& slant, int64_t window, double scale) {
  check_states(held_k, held_v, held_far, far);
  const at::Tensor queries = wide(q), keys = wide(k), values = wide(v), counts = count.expand({q.size(0)}).contiguous();
  at::Tensor own_q = far_q.is_same(q) ? queries : wide(far_q), own_k = far_k.is_same(k) ? keys : wide(far_k);
  if (cos) own_q = unturned(own_q, wide(cos), wide(sin)), own_k = unturned(own_k, wide(cos), wide(sin));
  const Index batch = q.size(0), groups = k.size(1), width = v.size(3);
  at::Tensor out = at::empty({batch, 1, q.size(1), width}, queries.options());
  take_step({numbers(queries), numbers(own_q), numbers(keys), numbers(values), numbers(own_k), counts.const_data_ptr<int64_t>(),
             held_k.mutable_data_ptr(), held_v.mutable_data_ptr(), held_far ? held_far->mutable_data_ptr<float>() : nullptr,
             far.mutable_data_ptr(), numbers(wide(weight_q)), numbers(wide(weight_k)), numbers(wide(slope)), numbers(wide(bias)),
             numbers(wide(slant)), out.mutable_data_ptr<float>(), batch, groups, q.size(1) / groups, q.size(3), width,
             held_k.size(2) - window, window, weight_q.size(2), float(scale), int(8 * held_k.element_size()),
             far.scalar_type() == at::kBFloat16});
  return out.to(q.scalar_type());
}

// The same of a window alone or of one with slots behind it, with a memory or without: what is not there is none. `more_of` (G) says
// which of the heads with further slots each is, or -1; `arrived` (B, G, 1, 1) and `gains` (G, 2) are of learnt scores.
at::Tensor slots_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& count, at::Tensor held_k,
                      at::Tensor held_v, const std::optional<at::Tensor>& far, const std::optional<at::Tensor>& scores,
                      const std::optional<at::Tensor>& slot_k, const std::optional<at::Tensor>& slot_v,
                      const std::optional<at::Tensor>& slot_score, const std::optional<at::Tensor>& more_k,
                      const std::optional<at::Tensor>& more_v, const std::optional<at::Tensor>& more_score,
                      const std::optional<at::Tensor>& weight_q, const std::optional<at::Tensor>& weight_k,
                      const std::optional<at::Tensor>& slope, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& slant, const std::optional<at::Tensor>& arrived,
                      const std::optional<at::Tensor>& gains, at::IntArrayRef more_of, int64_t window, double scale) {
  for (const auto* x : {&far, &scores, &slot_k, &slot_v, &slot_score, &more_k, &more_v, &more_score})
    TORCH_CHECK(!*x || (*x)->is_contiguous(), "slots_step: contiguous states are needed");
  check_states(held_k, held_v, std::nullopt, held_k);
  const at::Tensor queries = wide(q), keys = wide(k), values = wide(v), counts = count.expand({q.size(0)}).contiguous();
  const at::Tensor known = wide(arrived), factors = wide(gains), map_q = wide(weight_q), map_k = wide(weight_k), own_slope = wide(slope),
                   own_bias = wide(bias), own_slant = wide(slant);
  const Index batch = q.size(0), groups = k.size(1), width = v.size(3);
  at::Tensor out = at::empty({batch, 1, q.size(1), width}, queries.options());
  HybridStep step{numbers(queries), numbers(queries), numbers(keys), numbers(values), numbers(keys), counts.const_data_ptr<int64_t>(),
                  held_k.mutable_data_ptr(), held_v.mutable_data_ptr(), nullptr, far ? far->mutable_data_ptr() : nullptr,
                  numbers(map_q), numbers(map_k), numbers(own_slope), numbers(own_bias), numbers(own_slant),
                  out.mutable_data_ptr<float>(), batch, groups, q.size(1) / groups, q.size(3), width, held_k.size(2) - window, window,
                  far ? map_q.size(2) : 0, float(scale), int(8 * held_k.element_size()), far && far->scalar_type() == at::kBFloat16};
  const auto places = [](const auto& k, const auto& v, const auto& score) {
    if (!score) return SlotPlaces{};
    return SlotPlaces{k->mutable_data_ptr(), v->mutable_data_ptr(), score->template mutable_data_ptr<float>(), score->size(2), score->size(1)};
  };
  step.slots = places(slot_k, slot_v, slot_score), step.more = places(more_k, more_v, more_score);
  step.more_of = more_of.data(), step.gains = numbers(factors), step.arrived = numbers(known);
  step.scores = scores ? scores->mutable_data_ptr<float>() : nullptr;
  if (slot_k) step.slot_bits = slot_k->scalar_type() == at::kByte ? 4 : int(8 * slot_k->element_size());
  take_step(step);
  return out.to(q.scalar_type());
}

// A layer around it, of x (B, 1, N): norms, weights of q, k, v, o, gate, up and down with scales and biases, and the rotation
// (B or 1, 1, W) of queries and keys, which the far half takes `undone` or not.
at::Tensor layer_step(const at::Tensor& x, at::TensorList norms, at::ArrayRef<double> eps, at::TensorList weights,
                      const c10::List<std::optional<at::Tensor>>& scales, const c10::List<std::optional<at::Tensor>>& biases,
                      const at::Tensor& cos, const at::Tensor& sin, bool undone, const at::Tensor& count, at::Tensor held_k,
                      at::Tensor held_v, const std::optional<at::Tensor>& held_far, at::Tensor far, const at::Tensor& weight_q,
                      const at::Tensor& weight_k, const std::optional<at::Tensor>& slope, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& slant, int64_t window, double scale) {
  check_states(held_k, held_v, held_far, far);
  std::vector<at::Tensor> kept;
  const auto product = [&](int i) {
    const at::Tensor &w = weights[i], &by = kept.emplace_back(wide(scales[i])), &more = kept.emplace_back(wide(biases[i]));
    TORCH_CHECK(w.is_contiguous(), "layer_step: contiguous weights are needed");
    return Product{nullptr, w.const_data_ptr(), numbers(by), numbers(more), nullptr, x.size(0), w.size(0), w.size(1),
                   x.scalar_type() == at::kBFloat16, int(8 * w.element_size())};
  };
  kept.reserve(2 * weights.size() + 8);
  const auto floats = [&](const std::optional<at::Tensor>& x) { return numbers(kept.emplace_back(wide(x))); };
  const at::Tensor counts = count.expand({x.size(0)}).contiguous(), own_cos = cos.contiguous(), own_sin = sin.contiguous();
  const Index groups = held_k.size(1), width = far.size(3) - 1, dim = weight_q.size(1);
  at::Tensor y = at::empty(x.sizes(), x.options());
  LayerStep step{x.const_data_ptr(), y.mutable_data_ptr(), {norms[0].const_data_ptr(), norms[1].const_data_ptr()},
                 {float(eps[0]), float(eps[1])}, product(0), product(1), product(2), product(3), product(4), product(5), product(6),
                 {nullptr, nullptr, nullptr, nullptr, nullptr, counts.const_data_ptr<int64_t>(), held_k.mutable_data_ptr(),
                  held_v.mutable_data_ptr(), held_far ? held_far->mutable_data_ptr<float>() : nullptr, far.mutable_data_ptr(),
                  floats(weight_q), floats(weight_k), floats(slope), floats(bias), floats(slant), nullptr, x.size(0), groups,
                  weights[0].size(0) / dim / groups, dim, width, held_k.size(2) - window, window, weight_q.size(2), float(scale),
                  int(8 * held_k.element_size()), far.scalar_type() == at::kBFloat16},
                 own_cos.const_data_ptr(), own_sin.const_data_ptr(), own_cos.size(-1), own_cos.size(0) == 1 ? 0 : own_cos.size(-1), undone};
  take_layer(step);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(linearize, m) {
  m.def("additive_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor state) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def(
      "hybrid_step(Tensor q, Tensor k, Tensor v, Tensor far_q, Tensor far_k, Tensor? cos, Tensor? sin, Tensor count, "
      "Tensor(a!) held_k, Tensor(b!) held_v, Tensor(c!)? held_far, Tensor(d!) far, Tensor weight_q, Tensor weight_k, "
      "Tensor? slope, Tensor? bias, Tensor? slant, int window, float scale) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "feed_forward(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_scale, Tensor? up_scale, Tensor? down_scale) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "slots_step(Tensor q, Tensor k, Tensor v, Tensor count, Tensor(a!) held_k, Tensor(b!) held_v, Tensor(c!)? far, "
      "Tensor(d!)? scores, Tensor(e!)? slot_k, Tensor(f!)? slot_v, Tensor(g!)? slot_score, Tensor(h!)? more_k, Tensor(i!)? more_v, "
      "Tensor(j!)? more_score, Tensor? weight_q, Tensor? weight_k, Tensor? slope, Tensor? bias, Tensor? slant, Tensor? arrived, "
      "Tensor? gains, int[] more_of, int window, float scale) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "layer_step(Tensor x, Tensor[] norms, float[] eps, Tensor[] weights, Tensor?[] scales, Tensor?[] biases, Tensor cos, Tensor sin, "
      "bool undone, Tensor count, Tensor(a!) held_k, Tensor(b!) held_v, Tensor(c!)? held_far, Tensor(d!) far, Tensor weight_q, "
      "Tensor weight_k, Tensor? slope, Tensor? bias, Tensor? slant, int window, float scale) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("matvec(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(linearize, CPU, m) {
  m.impl("feed_forward", feed_forward);
  m.impl("hybrid_step", hybrid_step);
  m.impl("layer_step", layer_step);
  m.impl("slots_step", slots_step);
  m.impl("matvec", matvec);
  m.impl("additive_step", additive_step);
}
