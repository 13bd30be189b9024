// The gradients of decayed.cpp's engine. That of a log-decay is a sum over what it stands between: nothing is subtracted again.
#include "decayed.h"

namespace {

struct Gradients {
  const float *out, *totals, *scores;  // out (P, R, T, V); the others as the way there left them, scores null where v is
  float *states, *borders;             // borders are those of the state at each border
  float *q, *k, *v, *g;                // v may be null; v (P, T, up(V)), g (P, T, K)
};

// What the queries of a chunk ask of the state at its start.
void ask(const Decayed& e, const Gradients& b, Index p, Index n, Scratch& scratch) {
  const Index tokens = e.tokens(n);
  float *q = room(scratch[1], e.size * e.keys), *total = room(scratch[2], e.keys);
  for (Index r = 0; r < e.readers; r++) {
    const Index row = e.queries(p, r, n);
    since(e.q + row * e.keys, e.decay(p, n), tokens, e.keys, q, total);
    const Right own = padded(b.out + row * e.values, tokens, e.values, e.values, room(scratch[3], e.size * e.wide()));
    product({q, 1, e.keys}, own, e.keys, e.wide() / LANES, tokens, e.border(b.borders, p, n), e.wide(), r > 0);
  }
}

// A chunk on its way back, step by step from the last to the first. Frames: earlier keys are decayed until where they are read.
struct Chunk {
  const Decayed& e;
  const Gradients& b;
  Index p, n, tokens;
  const float* d;                   // (C, K): decays
  float *own, *grad, *later;        // (C, K): keys until the end of their step; gradients by keys as they are read now; scratch
  float *before, *totals, *reach;   // (steps, K): decays before a step, of it, and from its end to the current frame
  float *through, *asked;           // (K): gradient of the decays of a whole step; of what later queries read of the first state
  Right state, values;              // transposed
  float *local, *read, *out, *of_scores, *spare;
};

// Gradients of what a step's queries read of its own keys, a key after another, from those of the scores; all are added.
void own_part(const Chunk& c, const float* q, const float* k, const float* d, const float* of_scores, Index width, Index rows,
              float* grad_q, float* grad_k, float* grad_g) {
  const Index keys = c.e.keys;
  for (Index at = 0; at < keys; at += LANES) {
    Vector queries[TILE], decay[TILE], of_q[TILE], of_g[TILE], run[TILE];
    for (Index i = 0; i < rows; i++) {
      queries[i] = load(q + i * keys + at), decay[i] = load(d + i * keys + at);
      of_q[i] = load(grad_q + i * keys + at), of_g[i] = load(grad_g + i * keys + at);
    }
    for (Index j = 0; j < rows; j++) {
      run[j] = load(k + j * keys + at);
      of_q[j] += of_scores[j * width + j] * run[j];
      for (Index i = j + 1; i < rows; i++) {
        run[i] = run[i - 1] * decay[i];
        of_q[i] += of_scores[i * width + j] * run[i];
      }
      Vector back = Vector{};
      for (Index i = rows - 1; i > j; i--) {
        back += of_scores[i * width + j] * queries[i];
        of_g[i] += back * run[i];
        back *= decay[i];
      }
      store(grad_k + j * keys + at, load(grad_k + j * keys + at) + back + of_scores[j * width + j] * queries[j]);
    }
    for (Index i = 0; i < rows; i++) store(grad_q + i * keys + at, of_q[i]), store(grad_g + i * keys + at, of_g[i]);
  }
}

// What passes through the whole of step a and what its own keys give to later steps: gradients of its decays and keys.
void passing(const Chunk& c, Index a, Index rows, float* grad_k, float* grad_g) {
  const Index keys = c.e.keys, start = a * TILE;
  for (Index s = 0; s < a; s++) {
    std::fill_n(c.spare, keys, 0.0f);
    for (Index j = s * TILE; j < (s + 1) * TILE; j++) gather(c.spare, c.own + j * keys, c.grad + j * keys, keys);
    gather(c.through, c.spare, c.reach + s * keys, keys);
  }
  for (Index j = 0; j < rows; j++) {
    std::memcpy(grad_g + j * keys, c.through, keys * sizeof(float));
    gather(c.through, c.own + (start + j) * keys, c.grad + (start + j) * keys, keys);
  }
  until(c.grad + start * keys, c.d + start * keys, rows, keys, grad_k, c.spare);
}

// One reader's queries of step a: what they read of the first state, of earlier steps and of their own.
void reader(const Chunk& c, Index a, Index r, Index rows, float* grad_k, float* grad_g, float* grad_v) {
  const Decayed& e = c.e;
  const Index keys = e.keys, start = a * TILE, seen = start + rows, row = e.queries(c.p, r, c.n) + start, width = up(seen);
  const Index panels = keys / LANES;
  const float *q = e.q + row * keys, *d = c.d + start * keys;
  float* grad_q = c.b.q + row * keys;
  const Right out = padded(c.b.out + row * e.values, rows, e.values, e.values, c.out);
  since(q, d, rows, keys, c.local, c.spare);
  product({c.out, e.wide(), 1}, c.state, rows, panels, e.values, c.read, keys, false);
  scaled(c.read, c.before + a * keys, rows, keys, c.read);
  for (Index i = 0; i < rows; i++) gather(c.asked, c.local + i * keys, c.read + i * keys, keys);
  product({c.out, e.wide(), 1}, c.values, rows, width / LANES, e.values, c.of_scores, width, false);
  product({c.of_scores, width, 1}, {c.later, keys, LANES}, rows, panels, start, c.read, keys, true);
  product({c.of_scores, 1, width}, {c.local, keys, LANES}, start, panels, rows, c.grad, keys, true);
  std::fill_n(c.spare, keys, 0.0f);
  for (Index i = rows - 1; i >= 0; i--) {
    gather(c.spare, c.local + i * keys, c.read + i * keys, keys);
    add(grad_g + i * keys, c.spare, keys);
  }
  since(c.read, d, rows, keys, grad_q, c.spare);
  own_part(c, q, e.key(c.p, c.n) + start * keys, d, c.of_scores + start, width, rows, grad_q, grad_k, grad_g);
  if (grad_v) product({c.b.scores + row * e.size, 1, e.size}, out, seen, e.wide() / LANES, rows, grad_v, e.wide(), true);
}

// Decays before each step and of it, keys until the end of their step; what all of them give to the state at the chunk's end.
void begin(const Chunk& c, float* grad_v, Scratch& scratch) {
  const Decayed& e = c.e;
  const Index keys = e.keys, wide = e.wide();
  const float *k = e.key(c.p, c.n), *last = e.border(c.b.borders, c.p, c.n + 1), *state = e.border(c.b.states, c.p, c.n);
  std::fill_n(c.before, keys, 1.0f);
  for (Index a = 0; a < e.steps(c.n); a++) {
    const Index start = a * TILE, rows = std::min(TILE, c.tokens - start);
    until(k + start * keys, c.d + start * keys, rows, keys, c.own + start * keys, c.totals + a * keys);
    if (a + 1 < e.steps(c.n)) scaled(c.before + a * keys, c.totals + a * keys, 1, keys, c.before + (a + 1) * keys);
  }
  const float* total = c.b.totals + (c.p * e.chunks() + c.n) * keys;
  for (Index i = 0; i < keys; i++) c.asked[i] = total[i] * dot(state + i * wide, last + i * wide, wide);
  const Right own = transposed(last, keys, e.values, wide, room(scratch[16], keys * e.values));
  product({e.value(c.p, c.n), e.values, 1}, own, c.tokens, keys / LANES, e.values, c.grad, keys, false);
  if (!grad_v) return;
  until(k, c.d, c.tokens, keys, c.later, c.spare);
  product({c.later, keys, 1}, {last, wide, LANES}, c.tokens, wide / LANES, keys, grad_v, wide, false);
}

// What decays from each step before `frame` to where that one begins.
void reaching(const Chunk& c, Index frame) {
  const Index keys = c.e.keys;
  if (frame > 0) std::fill_n(c.reach + (frame - 1) * keys, keys, 1.0f);
  for (Index s = frame - 2; s >= 0; s--) scaled(c.reach + (s + 1) * keys, c.totals + (s + 1) * keys, 1, keys, c.reach + s * keys);
}

void differentiate(const Decayed& e, const Gradients& b, Index p, Index n, Scratch& scratch) {
  const Index tokens = e.tokens(n), keys = e.keys, steps = e.steps(n), width = up(tokens), first = p * e.time + e.start(n);
  auto space = [&](int i, Index size) { return room(scratch[i], size); };
  const Chunk c{e, b, p, n, tokens,
                e.decay(p, n), space(1, width * keys), space(2, width * keys), space(3, width * keys),
                space(4, steps * keys), space(5, steps * keys), space(6, steps * keys), space(7, keys), space(8, keys),
                transposed(e.border(b.states, p, n), keys, e.values, e.wide(), space(9, keys * e.values)),
                transposed(e.value(p, n), tokens, e.values, e.values, space(10, width * e.values)),
                space(11, TILE * keys), space(12, TILE * keys), space(13, TILE * e.wide()), space(14, TILE * width), space(15, keys)};
  float* grad_v = b.v ? b.v + first * e.wide() : nullptr;
  begin(c, grad_v, scratch);
  reaching(c, steps);
  for (Index a = steps - 1; a >= 0; a--) {
    const Index start = a * TILE, rows = std::min(TILE, tokens - start);
    float *grad_k = b.k + (first + start) * keys, *grad_g = b.g + (first + start) * keys;
    std::memcpy(c.through, c.asked, keys * sizeof(float));
    passing(c, a, rows, grad_k, grad_g);
    scaled(c.grad, c.totals + a * keys, start, keys, c.grad);  // now as the queries of this step read them
    reaching(c, a);
    for (Index s = 0; s < a; s++) scaled(c.own + s * TILE * keys, c.reach + s * keys, TILE, keys, c.later + s * TILE * keys);
    for (Index r = 0; r < e.readers; r++) reader(c, a, r, rows, grad_k, grad_g, grad_v);
  }
}

}  // namespace

// `borders` (P, N + 1, K, up(V)) has the last state's gradient in its last border and gets those of all.
extern "C" void decayed_backward(const float* q, const float* k, const float* v, const float* d, float* states, const float* totals,
                                 const float* scores, const float* grad, float* borders, float* grad_q, float* grad_k,
                                 float* grad_v, float* grad_g, Index problems, Index readers, Index time, Index keys, Index values,
                                 Index size) {
  const Decayed e{{q, k, v, problems, readers, time, keys, values, size, 0}, d};
  const Gradients b{grad, totals, scores, states, borders, grad_q, grad_k, grad_v, grad_g};
#pragma omp parallel
  {
    Scratch scratch;
    each_chunk(e, [&](Index p, Index n) { ask(e, b, p, n, scratch); });
    accumulate(e, borders, totals, false);
    each_chunk(e, [&](Index p, Index n) { differentiate(e, b, p, n, scratch); });
  }
}
