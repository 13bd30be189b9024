// The additive engine without decay: S_t = S_{t-1} + k_t v_t^T, read as q_t^T S, in chunks, and its gradients.
#include "chunks.h"

namespace {

void read(const Engine& e, float* states, float* out, Index p, Index n, Scratch& scratch) {
  const Index tokens = e.tokens(n), wide = e.wide(), width = up(tokens);
  const Right state{e.border(states, p, e.terraced ? n + 1 : n), wide, LANES};
  float* scores = room(scratch[0], TILE * width);
  Right keys{}, values{};
  if (!e.terraced) {
    keys = transposed(e.key(p, n), tokens, e.keys, e.keys, room(scratch[1], width * e.keys));
    values = padded(e.value(p, n), tokens, e.values, e.values, room(scratch[2], tokens * wide));
  }
  for (Index r = 0; r < e.readers; r++)
    for (Index start = 0; start < tokens; start += TILE) {
      const Index rows = std::min(TILE, tokens - start), seen = std::min(start + TILE, tokens), row = e.queries(p, r, n) + start;
      const Left q{e.q + row * e.keys, e.keys, 1};
      product(q, state, rows, wide / LANES, e.keys, out + row * wide, wide, false);
      if (e.terraced) continue;
      product(q, keys, rows, up(seen) / LANES, e.keys, scores, up(seen), false);
      causal(scores, start, rows, up(seen));
      product({scores, up(seen), 1}, values, rows, wide / LANES, seen, out + row * wide, wide, true);
    }
}

struct Gradients {
  const float* out;             // (P, R, T, V)
  float *states, *borders;      // of the state at each border
  float *q, *k, *v;             // k or v may be null; v (P, T, up(V))
};

void differentiate(const Engine& e, const Gradients& g, Index p, Index n, Scratch& scratch) {
  const Index tokens = e.tokens(n), wide = e.wide(), width = up(tokens), panels = e.keys / LANES;
  const float *k = e.key(p, n), *later = e.border(g.borders, p, n + 1);
  float* grad_k = g.k ? g.k + (p * e.time + e.start(n)) * e.keys : nullptr;
  float* grad_v = g.v ? g.v + (p * e.time + e.start(n)) * wide : nullptr;
  const Right state = transposed(e.border(g.states, p, e.terraced ? n + 1 : n), e.keys, e.values, wide,
                                 room(scratch[0], e.keys * e.values));
  const Right values = e.terraced ? Right{} : transposed(e.value(p, n), tokens, e.values, e.values, room(scratch[1], width * e.values));
  if (grad_k) {
    const Right own = transposed(later, e.keys, e.values, wide, room(scratch[2], e.keys * e.values));
    product({e.value(p, n), e.values, 1}, own, tokens, panels, e.values, grad_k, e.keys, false);
  }
  if (grad_v) product({k, e.keys, 1}, {later, wide, LANES}, tokens, wide / LANES, e.keys, grad_v, wide, false);
  const Right keys = grad_v && !e.terraced ? transposed(k, tokens, e.keys, e.keys, room(scratch[3], width * e.keys)) : Right{};
  float *scores = room(scratch[4], TILE * width), *own = room(scratch[5], TILE * wide);
  for (Index r = 0; r < e.readers; r++)
    for (Index start = 0; start < tokens; start += TILE) {
      const Index rows = std::min(TILE, tokens - start), seen = std::min(start + TILE, tokens), row = e.queries(p, r, n) + start;
      const Right out = padded(g.out + row * e.values, rows, e.values, e.values, own), q{e.q + row * e.keys, e.keys, LANES};
      float* grad_q = g.q + row * e.keys;
      product({own, wide, 1}, state, rows, panels, e.values, grad_q, e.keys, false);
      if (e.terraced) continue;
      const Index length = up(seen);
      product({own, wide, 1}, values, rows, length / LANES, e.values, scores, length, false);
      causal(scores, start, rows, length);
      product({scores, length, 1}, {k, e.keys, LANES}, rows, panels, seen, grad_q, e.keys, true);
      if (grad_k) product({scores, 1, length}, q, seen, panels, rows, grad_k, e.keys, true);
      if (!grad_v) continue;
      product({e.q + row * e.keys, e.keys, 1}, keys, rows, length / LANES, e.keys, scores, length, false);
      causal(scores, start, rows, length);
      product({scores, 1, length}, out, seen, wide / LANES, rows, grad_v, wide, true);
    }
}

}  // namespace

// `states` (P, N + 1, K, up(V)) has the first state in its first border; out (P, R, T, up(V)).
extern "C" void additive_forward(const float* q, const float* k, const float* v, float* states, float* out, Index problems,
                                 Index readers, Index time, Index keys, Index values, Index size, Index terraced) {
  const Engine e{q, k, v, problems, readers, time, keys, values, size, terraced};
#pragma omp parallel
  {
    Scratch scratch;
    each_chunk(e, [&](Index p, Index n) {
      const Index tokens = e.tokens(n);
      const Right own = padded(e.value(p, n), tokens, values, values, room(scratch[0], size * e.wide()));
      product({e.key(p, n), 1, keys}, own, keys, e.wide() / LANES, tokens, e.border(states, p, n + 1), e.wide(), false);
    });
    accumulate(e, states, nullptr, true);
    each_chunk(e, [&](Index p, Index n) { read(e, states, out, p, n, scratch); });
  }
}

// `borders` (P, N + 1, K, up(V)) has the last state's gradient in its last border and gets those of all; k, v may be null.
extern "C" void additive_backward(const float* q, const float* k, const float* v, float* states, const float* grad, float* borders,
                                  float* grad_q, float* grad_k, float* grad_v, Index problems, Index readers, Index time, Index keys,
                                  Index values, Index size, Index terraced) {
  const Engine e{q, k, v, problems, readers, time, keys, values, size, terraced};
  const Gradients g{grad, states, borders, grad_q, grad_k, grad_v};
#pragma omp parallel
  {
    Scratch scratch;
    each_chunk(e, [&](Index p, Index n) {
      const Index tokens = e.tokens(n);
      if (terraced && n == 0) std::fill_n(e.border(borders, p, 0), e.state(), 0.0f);
      for (Index r = 0; r < readers; r++) {
        const Index row = e.queries(p, r, n);
        const Right own = padded(grad + row * values, tokens, values, values, room(scratch[0], size * e.wide()));
        float* border = e.border(borders, p, terraced ? n + 1 : n);
        product({q + row * keys, 1, keys}, own, keys, e.wide() / LANES, tokens, border, e.wide(), r > 0 || n == e.chunks() - terraced);
      }
    });
    accumulate(e, borders, nullptr, false);
    each_chunk(e, [&](Index p, Index n) { differentiate(e, g, p, n, scratch); });
  }
}
