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

using Maybe = std::optional<at::Tensor>;

// What a step of a mixer changes in place: see memory.py; what a mixer does not have is none.
struct Held {
  const at::Tensor &k, &v;
  const Maybe &far_k, &far, &scores, &slot_k, &slot_v, &slot_score, &more_k, &more_v, &more_score;
};

// What it reads: maps, terms of the far mass, W, b, rate and gains of learnt slot scores; which of the heads with further slots each is.
struct Read {
  const Maybe &weight_q, &weight_k, &slope, &bias, &slant, &up, &shift, &rate, &gains;
  at::IntArrayRef more_of;
  int64_t window;
  double scale;
};

// Numbers in float32, kept as long as this.
struct Floats {
  std::vector<at::Tensor> kept;
  const float* operator()(const Maybe& x) { return numbers(kept.emplace_back(wide(x))); }
};

// All of it but what is made of the new token.
HybridStep mixer_of(const at::Tensor& count, const Held& held, const Read& read, Floats& floats, Index batch, Index heads, Index width) {
  for (const auto* x : {&held.far_k, &held.far, &held.scores, &held.slot_k, &held.slot_v, &held.slot_score, &held.more_k, &held.more_v,
                        &held.more_score})
    TORCH_CHECK(!*x || (*x)->is_contiguous(), "contiguous states are needed");
  TORCH_CHECK(held.k.is_contiguous() && held.v.is_contiguous(), "contiguous states are needed");
  const at::Tensor& counts = floats.kept.emplace_back(count.expand({batch}).contiguous());
  const auto places = [](const Maybe& k, const Maybe& v, const Maybe& score) {
    return score ? SlotPlaces{k->mutable_data_ptr(), v->mutable_data_ptr(), score->mutable_data_ptr<float>(), score->size(2), score->size(1)}
                 : SlotPlaces{};
  };
  HybridStep step{};
  step.count = counts.const_data_ptr<int64_t>(), step.batch = batch, step.groups = held.k.size(1), step.repeats = heads / held.k.size(1);
  step.width = width, step.window = read.window, step.sinks = held.k.size(2) - read.window, step.scale = float(read.scale);
  step.held_k = held.k.mutable_data_ptr(), step.held_v = held.v.mutable_data_ptr(), step.bits = int(8 * held.k.element_size());
  step.held_far = held.far_k ? held.far_k->mutable_data_ptr<float>() : nullptr;
  step.state = held.far ? held.far->mutable_data_ptr() : nullptr;
  step.short_state = held.far && held.far->scalar_type() == at::kBFloat16, step.columns = held.far ? read.weight_q->size(2) : 0;
  step.weight_q = floats(read.weight_q), step.weight_k = floats(read.weight_k);
  step.slope = floats(read.slope), step.bias = floats(read.bias), step.slant = floats(read.slant);
  step.slots = places(held.slot_k, held.slot_v, held.slot_score), step.more = places(held.more_k, held.more_v, held.more_score);
  step.more_of = read.more_of.data(), step.scores = held.scores ? held.scores->mutable_data_ptr<float>() : nullptr;
  if (held.slot_k) step.slot_bits = held.slot_k->scalar_type() == at::kByte ? 4 : int(8 * held.slot_k->element_size());
  step.up = floats(read.up), step.shift = floats(read.shift), step.rate = floats(read.rate), step.gains = floats(read.gains);
  return step;
}

// One token of `Mixer`: (B, 1, H, V) of q (B, H, 1, D), k, v and far_k (B, G, 1, .), hidden (B, 1, N) and what is held, which changes
// in place. Where cos and sin are given, the far half takes queries and keys before that rotation.
at::Tensor mixer_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& far_q, const at::Tensor& far_k,
                      const Maybe& cos, const Maybe& sin, const Maybe& hidden, const at::Tensor& count, const at::Tensor& held_k,
                      const at::Tensor& held_v, const Maybe& held_far, const Maybe& far, const Maybe& scores, const Maybe& slot_k,
                      const Maybe& slot_v, const Maybe& slot_score, const Maybe& more_k, const Maybe& more_v, const Maybe& more_score,
                      const Maybe& weight_q, const Maybe& weight_k, const Maybe& slope, const Maybe& bias, const Maybe& slant,
                      const Maybe& up, const Maybe& shift, const Maybe& rate, const Maybe& gains, at::IntArrayRef more_of,
                      int64_t window, double scale) {
  const at::Tensor queries = wide(q), keys = wide(k), values = wide(v);
  at::Tensor own_q = far_q.is_same(q) ? queries : wide(far_q), own_k = far_k.is_same(k) ? keys : wide(far_k);
  if (cos) own_q = unturned(own_q, wide(cos), wide(sin)), own_k = unturned(own_k, wide(cos), wide(sin));
  const Index batch = q.size(0), width = v.size(3);
  at::Tensor out = at::empty({batch, 1, q.size(1), width}, queries.options());
  Floats floats;
  HybridStep step = mixer_of(count, {held_k, held_v, held_far, far, scores, slot_k, slot_v, slot_score, more_k, more_v, more_score},
                             {weight_q, weight_k, slope, bias, slant, up, shift, rate, gains, more_of, window, scale}, floats, batch,
                             q.size(1), width);
  step.q = numbers(queries), step.k = numbers(keys), step.v = numbers(values), step.far_q = numbers(own_q), step.far_k = numbers(own_k);
  step.dim = q.size(3), step.hidden = floats(hidden), step.inputs = hidden ? hidden->size(-1) : 0;
  step.out = out.mutable_data_ptr<float>();
  take_step(step);
  return out.to(q.scalar_type());
}

// A layer around it, of x (B, 1, N): norms, weights of q, k, v, o, gate, up and down with scales and biases, and the rotation
// (B or 1, 1, W) of queries and keys, which the far half takes `undone` or not.
at::Tensor layer_step(const at::Tensor& x, at::TensorList norms, at::ArrayRef<double> eps, at::TensorList weights,
                      const c10::List<Maybe>& scales, const c10::List<Maybe>& biases, const at::Tensor& cos, const at::Tensor& sin,
                      bool undone, const at::Tensor& count, const at::Tensor& held_k, const at::Tensor& held_v, const Maybe& held_far,
                      const Maybe& far, const Maybe& scores, const Maybe& slot_k, const Maybe& slot_v, const Maybe& slot_score,
                      const Maybe& more_k, const Maybe& more_v, const Maybe& more_score, const Maybe& weight_q, const Maybe& weight_k,
                      const Maybe& slope, const Maybe& bias, const Maybe& slant, const Maybe& up, const Maybe& shift, const Maybe& rate,
                      const Maybe& gains, at::IntArrayRef more_of, int64_t window, double scale) {
  Floats floats;
  const auto product = [&](int i) {
    const at::Tensor& w = weights[i];
    TORCH_CHECK(w.is_contiguous(), "layer_step: contiguous weights are needed");
    const float *by = floats(scales[i]), *more = floats(biases[i]);
    return Product{nullptr, w.const_data_ptr(), by, more, nullptr, x.size(0), w.size(0), w.size(1), x.scalar_type() == at::kBFloat16,
                   int(8 * w.element_size())};
  };
  const at::Tensor own_cos = cos.contiguous(), own_sin = sin.contiguous();
  const Index width = weights[2].size(0) / held_k.size(1), heads = weights[3].size(1) / width;
  at::Tensor y = at::empty(x.sizes(), x.options());
  HybridStep mixer = mixer_of(count, {held_k, held_v, held_far, far, scores, slot_k, slot_v, slot_score, more_k, more_v, more_score},
                              {weight_q, weight_k, slope, bias, slant, up, shift, rate, gains, more_of, window, scale}, floats,
                              x.size(0), heads, width);
  mixer.dim = weights[0].size(0) / heads;
  LayerStep step{x.const_data_ptr(), y.mutable_data_ptr(), {norms[0].const_data_ptr(), norms[1].const_data_ptr()},
                 {float(eps[0]), float(eps[1])}, product(0), product(1), product(2), product(3), product(4), product(5), product(6),
                 mixer, own_cos.const_data_ptr(), own_sin.const_data_ptr(), own_cos.size(-1),
                 own_cos.size(0) == 1 ? 0 : own_cos.size(-1), undone};
  take_layer(step);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(linearize, m) {
  m.def("additive_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor state) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  const std::string mixer =
      "Tensor count, Tensor(a!) held_k, Tensor(b!) held_v, Tensor(c!)? held_far, Tensor(d!)? far, Tensor(e!)? scores, "
      "Tensor(f!)? slot_k, Tensor(g!)? slot_v, Tensor(h!)? slot_score, Tensor(i!)? more_k, Tensor(j!)? more_v, Tensor(k!)? more_score, "
      "Tensor? weight_q, Tensor? weight_k, Tensor? slope, Tensor? bias, Tensor? slant, Tensor? up, Tensor? shift, Tensor? rate, "
      "Tensor? gains, int[] more_of, int window, float scale) -> Tensor";
  const std::string step = "mixer_step(Tensor q, Tensor k, Tensor v, Tensor far_q, Tensor far_k, Tensor? cos, Tensor? sin, Tensor? hidden, ";
  m.def((step + mixer).c_str(), {at::Tag::pt2_compliant_tag});
  const std::string layer =
      "layer_step(Tensor x, Tensor[] norms, float[] eps, Tensor[] weights, Tensor?[] scales, Tensor?[] biases, Tensor cos, Tensor sin, "
      "bool undone, ";
  m.def((layer + mixer).c_str(), {at::Tag::pt2_compliant_tag});
  m.def(
      "feed_forward(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_scale, Tensor? up_scale, Tensor? down_scale) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("matvec(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(linearize, CPU, m) {
  m.impl("feed_forward", feed_forward);
  m.impl("mixer_step", mixer_step);
  m.impl("layer_step", layer_step);
  m.impl("matvec", matvec);
  m.impl("additive_step", additive_step);
}
