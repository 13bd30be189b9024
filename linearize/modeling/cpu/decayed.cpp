// The additive engine with decays a channel: S_t = diag(e^g_t) S_{t-1} + k_t v_t^T, read as q_t^T S, in chunks.
#include "decayed.h"

namespace {

Vector decay_of(Vector log) {
  const Vector x = log * 1.44269504f, found = power_of_two(x);
  return x == x ? found : x;  // a NaN stays one
}

// What a chunk adds to the state at its end, and its decays.
void enter(const Decayed& e, float* states, float* totals, Index p, Index n, Scratch& scratch) {
  const Index tokens = e.tokens(n);
  float* k = room(scratch[1], e.size * e.keys);
  until(e.key(p, n), e.decay(p, n), tokens, e.keys, k, totals + (p * e.chunks() + n) * e.keys);
  const Right values = padded(e.value(p, n), tokens, e.values, e.values, room(scratch[2], e.size * e.wide()));
  product({k, 1, e.keys}, values, e.keys, e.wide() / LANES, tokens, e.border(states, p, n + 1), e.wide(), false);
}

// scores (rows, .) of a step's queries with its own keys, from column `start` on: q_i . (k_j times the decays after j up to i).
void own_scores(const float* q, const float* k, const float* d, Index rows, Index keys, float* run, float* scores, Index width) {
  for (Index j = 0; j < rows; j++) {
    std::memcpy(run, k + j * keys, keys * sizeof(float));
    scores[j * width + j] = dot(q + j * keys, run, keys);
    for (Index i = 0; i < j; i++) scores[i * width + j] = 0.0f;
    for (Index i = j + 1; i < rows; i++) {
      Vector sums = Vector{};
      for (Index c = 0; c < keys; c += LANES) {
        const Vector x = load(run + c) * load(d + i * keys + c);
        store(run + c, x);
        sums += x * load(q + i * keys + c);
      }
      scores[i * width + j] = sum(sums);
    }
  }
}

void read(const Decayed& e, float* states, float* kept, float* out, Index p, Index n, Scratch& scratch) {
  const Index tokens = e.tokens(n), keys = e.keys, wide = e.wide(), width = up(tokens), panels = wide / LANES;
  const Right state{e.border(states, p, n), wide, LANES};
  const Right values = padded(e.value(p, n), tokens, e.values, e.values, room(scratch[0], tokens * wide));
  float *own = room(scratch[2], TILE * keys), *earlier = room(scratch[3], width * keys);
  float *local = room(scratch[4], TILE * keys), *q = room(scratch[5], TILE * keys), *run = room(scratch[6], 2 * keys);
  float *before = room(scratch[7], keys), *unkept = room(scratch[8], TILE * width);
  std::fill_n(before, keys, 1.0f);
  for (Index start = 0; start < tokens; start += TILE) {
    const Index rows = std::min(TILE, tokens - start), seen = start + rows;
    const float *k = e.key(p, n) + start * keys, *own_d = e.decay(p, n) + start * keys;
    float* total = run + keys;
    for (Index r = 0; r < e.readers; r++) {
      const Index row = e.queries(p, r, n) + start;
      float* scores = kept ? kept + row * e.size : unkept;
      const Index stride = kept ? e.size : width;
      since(e.q + row * keys, own_d, rows, keys, local, total);
      scaled(local, before, rows, keys, q);
      product({q, keys, 1}, state, rows, panels, keys, out + row * wide, wide, false);
      product({local, keys, 1}, {earlier, LANES, keys * LANES}, rows, start / LANES, keys, scores, stride, false);
      own_scores(e.q + row * keys, k, own_d, rows, keys, run, scores + start, stride);
      product({scores, stride, 1}, values, rows, panels, seen, out + row * wide, wide, true);
    }
    for (Index j = 0; j < start; j += LANES)  // earlier keys, as the step after this one sees them
      for (Index c = 0; c < keys; c++) store(earlier + (j * keys + c * LANES), total[c] * load(earlier + (j * keys + c * LANES)));
    until(k, own_d, rows, keys, own, run);
    transposed(own, rows, keys, keys, earlier + start * keys);
    scaled(before, total, 1, keys, before);
  }
}

}  // namespace

// g (P, T, G), G = K or 1, are logarithms of decays d (P, T, K). `states` (P, N + 1, K, up(V)) has the first state in its first
// border; totals (P, N, K) are the chunks' decays; scores (P, R, T, size), or null, are kept for the way back; out (P, R, T, up(V)).
extern "C" void decayed_forward(const float* q, const float* k, const float* v, const float* g, float* d, float* states,
                                float* totals, float* scores, float* out, Index problems, Index readers, Index time, Index keys,
                                Index values, Index gates, Index size) {
  const Decayed e{{q, k, v, problems, readers, time, keys, values, size, 0}, d};
#pragma omp parallel
  {
    Scratch scratch;
#pragma omp for
    for (Index i = 0; i < problems * time; i++)
      for (Index c = 0; c < keys; c += LANES) store(d + i * keys + c, decay_of(gates == 1 ? all(g[i]) : load(g + i * keys + c)));
    each_chunk(e, [&](Index p, Index n) { enter(e, states, totals, p, n, scratch); });
    accumulate(e, states, totals, true);
    each_chunk(e, [&](Index p, Index n) { read(e, states, scores, out, p, n, scratch); });
  }
}
