// Sinks, a sliding window, and behind it a linear memory of Hedgehog features under one denominator, in one pass over the tokens:
// what the kernels of its parts give, without the features, numerators and reads between them.
#include "hedgehog.h"
#include "window.h"

// The pointers and sizes of a call; native_ops.py has the same fields.
struct Call {
  const float *q, *far_q;                        // (B, H, T, D), with steps of their own
  const float *k, *v, *far_k, *sink_k, *sink_v;  // (B, G, lead + T, .) and (B, G, s, .)
  const Index* count;                            // (B): tokens seen before
  const float *weight_q, *weight_k;              // (H, D, F) and (G, D, F)
  const float *slope, *bias, *slant;             // log2 of the far mass's factor is slope q + bias + slant top
  float *state, *out;                            // (B, G, K, V + 1), taken and left; (B, T, H, V)
  Index q_batch, q_head, q_token, far_batch, far_head, far_token;
  Index batch, groups, repeats, time, lead, dim, width, sinks, window, columns;
  float scale;
};

namespace {

constexpr Index CHUNK = 64;                              // tokens
constexpr Index AT_ONCE = 512, LEAST = 128, ALL = 4096;  // that stay in the caches between two passes: of a row, and of all rows

// Kept from call to call: memory that is given back comes again one page at a time.
struct Workspace {
  std::vector<float> packed, phi, states, sums;
  std::vector<Packed> keys;
};

struct Scratch {
  std::vector<float> scores, y, phi, inside, near, far, keys;
};

float total(const float* a, Index size) {
  Vector sums = Vector{};
  for (Index j = 0; j < size; j += LANES) sums += load(a + j);
  return sum(sums);
}

// Some of a call's tokens, from `begin` on.
struct Segment {
  const Call& c;
  Workspace& w;
  Index begin;
  Window window;
  Index features, wide, chunks, problems;

  Segment(const Call& call, Workspace& workspace, Index from, Index most)
      : c(call), w(workspace), begin(from),
        window{std::min(most, c.time - from), c.lead, c.dim, c.width, c.sinks, c.window, 0, c.scale},
        features(2 * c.columns), wide(up(c.width)), chunks((window.time + CHUNK - 1) / CHUNK), problems(c.batch * c.groups) {}

  Index tokens(Index n) const { return std::min(CHUNK, window.time - n * CHUNK); }
  Index held(Index p) const { return p * (c.lead + c.time) + begin; }  // the first row of keys and values
  Index seen(Index p) const { return c.count[p / c.groups] + begin; }
  float* state(Index p, Index n) const { return w.states.data() + (p * (chunks + 1) + n) * features * wide; }
  float* sums(Index p, Index n) const { return w.sums.data() + (p * (chunks + 1) + n) * features; }
  float* entering(Index p, Index n) const { return w.phi.data() + (p * window.time + n * CHUNK) * features; }

  void reserve() const {
    room(w.packed, problems * window.packed());
    room(w.keys, problems);
    room(w.phi, problems * window.time * features);
    room(w.states, problems * (chunks + 1) * features * wide);
    room(w.sums, problems * (chunks + 1) * features);
  }

  void pack(Index p) const {
    float* into = w.packed.data() + p * window.packed();
    w.keys[p] = window.pack(c.k + held(p) * c.dim, c.v + held(p) * c.width, c.sink_k + p * c.sinks * c.dim,
                            c.sink_v + p * c.sinks * c.width, into);
  }

  // The state goes to the first border, or comes from the last.
  void take(Index p, bool first) const {
    for (Index j = 0; j < features; j++) {
      float* own = c.state + (p * features + j) * (c.width + 1);
      float *row = state(p, first ? 0 : chunks) + j * wide, *all = sums(p, first ? 0 : chunks) + j;
      if (first) {
        std::memcpy(row, own, c.width * sizeof(float));
        std::fill(row + c.width, row + wide, 0.0f);
        *all = own[c.width];
      } else {
        std::memcpy(own, row, c.width * sizeof(float));
        own[c.width] = *all;
      }
    }
  }

  // How many of the first tokens that leave with chunk n do not enter: they are sinks, or come before the text.
  Index kept_out(Index p, Index n) const {
    return std::clamp<Index>(c.sinks - (seen(p) + n * CHUNK - c.window), 0, tokens(n));
  }

  // Features of the tokens that leave the window beside the queries of a chunk, and what they add to the state.
  void enter(Index p, Index n, Scratch& s) const {
    const Index length = tokens(n), out = kept_out(p, n), from = c.lead + n * CHUNK - c.window + out;
    float *own = entering(p, n), *into = sums(p, n + 1);
    std::fill_n(own, out * features, 0.0f);
    std::fill_n(into, features, 0.0f);
    const Left k{c.far_k + (held(p) + from) * c.dim, c.dim, 1};
    ::features(k, c.weight_k + p % c.groups * c.dim * c.columns, length - out, c.dim, c.columns, room(s.y, CHUNK * c.columns),
               own + out * features);
    for (Index i = out; i < length; i++) add(into, own + i * features, features);
    const Right values{w.keys[p].values + from * wide, wide, LANES};
    product({own + out * features, 1, features}, values, features, wide / LANES, length - out, state(p, n + 1), wide, false);
  }

  void read(Index p, Index n, Scratch& s) const {
    const Right entered = transposed(entering(p, n), tokens(n), features, features, room(s.keys, CHUNK * features));
    for (Index r = 0; r < c.repeats; r++)
      for (Index start = 0; start < tokens(n); start += TILE) read(p, n, r, start, entered, s);
  }

  // A tile of queries of one head reads the window, the state and what entered since; both halves become one softmax.
  void read(Index p, Index n, Index r, Index start, const Right& entered, Scratch& s) const {
    const Index b = p / c.groups, head = p % c.groups * c.repeats + r, length = tokens(n), out = kept_out(p, n);
    const Index rows = std::min(TILE, length - start), first = n * CHUNK + start, last = std::min(start + TILE, length);
    const float* q = Rows{c.q, c.q_batch, c.q_head, c.q_token}.at(b, head, begin + first);
    const float* far = Rows{c.far_q, c.far_batch, c.far_head, c.far_token}.at(b, head, begin + first);
    float denominator[TILE] = {}, top[TILE] = {}, mass[TILE] = {}, factor[TILE] = {};
    float *near = room(s.near, TILE * wide), *found = room(s.far, TILE * wide), *own = room(s.phi, TILE * features);
    float* inside = room(s.inside, TILE * CHUNK);
    attend(window, w.keys[p], q, c.q_token, seen(p), first, rows, near, denominator, top, s.scores);
    ::features({far, c.far_token, 1}, c.weight_q + head * c.dim * c.columns, rows, c.dim, c.columns, room(s.y, CHUNK * c.columns),
               own);
    product({own, features, 1}, {state(p, n), wide, LANES}, rows, wide / LANES, features, found, wide, false);
    product({own, features, 1}, entered, rows, up(last) / LANES, features, inside, up(last), false);
    causal(inside, start, rows, up(last));
    for (Index i = 0; i < rows; i++) {
      mass[i] = dot(own + i * features, sums(p, n), features) + total(inside + i * up(last), up(last));
      factor[i] = top[i] * (c.slant ? c.slant[head] : 1) + (c.bias ? c.bias[head] : 0);
      if (c.slope) factor[i] += dot(far + i * c.far_token, c.slope + head * c.dim, c.dim);
    }
    if (out < last) {
      const Right values{w.keys[p].values + (c.lead + n * CHUNK - c.window + out) * wide, wide, LANES};
      product({inside + out, up(last), 1}, values, rows, wide / LANES, last - out, found, wide, true);
    }
    float* into = c.out + ((b * c.time + begin + first) * c.groups * c.repeats + head) * c.width;
    merge(near, found, mass, denominator, top, factor, rows, into);
  }

  // (near e^top + far e^factor) / (denominator e^top + mass e^factor), row by row; an empty memory moves no maximum.
  void merge(float* near, const float* far, const float* mass, const float* denominator, const float* top, const float* factor,
             Index rows, float* out) const {
    float of_near[TILE], of_far[TILE];
    for (Index i = 0; i < TILE; i += LANES) {
      const Vector there = load(mass + i) > Vector{} ? load(factor + i) : all(-INFINITY), most = larger(load(top + i), there);
      const Vector a = power_of_two(load(top + i) - most), b = power_of_two(there - most);
      const Vector share = all(1.0f) / (load(denominator + i) * a + load(mass + i) * b);
      store(of_near + i, a * share);
      store(of_far + i, b * share);
    }
    for (Index i = 0; i < rows; i++) {
      float* row = near + i * wide;
      for (Index j = 0; j < wide; j += LANES) store(row + j, load(row + j) * of_near[i] + load(far + i * wide + j) * of_far[i]);
      std::memcpy(out + i * c.groups * c.repeats * c.width, row, c.width * sizeof(float));
    }
  }

  void run(Scratch& s) const {
    const Index units = problems * chunks, part = features / LANES;
#pragma omp for
    for (Index p = 0; p < problems; p++) {
      pack(p);
      take(p, true);
    }
#pragma omp for
    for (Index u = 0; u < units; u++) enter(u / chunks, u % chunks, s);
#pragma omp for
    for (Index u = 0; u < problems * part; u++)
      for (Index n = 0; n < chunks; n++) {
        const Index p = u / part, at = u % part * LANES;
        add(state(p, n + 1) + at * wide, state(p, n) + at * wide, LANES * wide);
        add(sums(p, n + 1) + at, sums(p, n) + at, LANES);
      }
#pragma omp for schedule(dynamic, 1)
    for (Index u = 0; u < units; u++) read(u / chunks, u % chunks, s);
#pragma omp for
    for (Index p = 0; p < problems; p++) take(p, false);
  }
};

}  // namespace

extern "C" void hybrid_forward(const Call* call) {
  thread_local Workspace workspace;
  Workspace& own = workspace;  // of the caller: the threads of a team have their own
  const Index most = std::clamp(ALL / call->batch / CHUNK * CHUNK, LEAST, AT_ONCE);
  Segment(*call, own, 0, most).reserve();
#pragma omp parallel
  {
    Scratch scratch;
    for (Index begin = 0; begin < call->time; begin += most) Segment(*call, own, begin, most).run(scratch);
  }
}
