#include "hybrid_step.h"

#include "hedgehog.h"
#include "storage.h"
#include "window.h"

namespace {

constexpr Index FEW = 8;  // kv heads of all rows that one thread is done with before others have begun

struct Scratch {
  std::vector<float> keys, values, scores, phi, y, read, state, coded;
};

// One kv head of one row, whose keys and values are stored in a Form.
template <class Form>
struct Head {
  const HybridStep& s;
  Scratch& own;
  const Index p, g, count, at, places, features, row;  // its number among all rows', the place that is taken, a row of the memory
  uint8_t *const k, *const v;

  Head(const HybridStep& step, Index problem, Scratch& scratch)
      : s(step), own(scratch), p(problem), g(p % s.groups), count(s.count[p / s.groups]), at(count % s.window),
        places(s.window + s.sinks), features(2 * s.columns), row(s.width + 1),
        k(static_cast<uint8_t*>(s.held_k) + p * places * Form::bytes(s.dim)),
        v(static_cast<uint8_t*>(s.held_v) + p * places * Form::bytes(s.width)) {}

  // So many rows as they are stored, in float32.
  const float* opened(const uint8_t* bytes, Index rows, Index channels, std::vector<float>& held) const {
    if constexpr (std::is_same_v<Form, storage::Plain>) return reinterpret_cast<const float*>(bytes);
    float* values = room(held, rows * channels);
    for (Index i = 0; i < rows; i++) Form::open(bytes + i * Form::bytes(channels), channels, values + i * channels, own.coded);
    return values;
  }

  float* far_key() const { return s.held_far + (p * s.window + at) * s.dim; }

  bool leaves() const { return count - s.window >= s.sinks; }

  // Features (F) and value (V) of the token that leaves.
  void leave(float* phi, float* value) const {
    const float* key = s.held_far ? far_key() : opened(k + at * Form::bytes(s.dim), 1, s.dim, own.keys);
    ::features({key, s.dim, 1}, s.weight_k + g * s.dim * s.columns, 1, s.dim, s.columns, room(own.y, s.columns), phi);
    Form::open(v + at * Form::bytes(s.width), s.width, value, own.coded);
  }

  void arrive() const {
    const auto put = [&](uint8_t* into, const float* x, Index channels) {
      Form::keep(x + p * channels, channels, into + at * Form::bytes(channels), nullptr, own.coded);
      if (count < s.sinks)
        std::memcpy(into + (s.window + count) * Form::bytes(channels), into + at * Form::bytes(channels), Form::bytes(channels));
    };
    put(k, s.k, s.dim);
    put(v, s.v, s.width);
    if (s.held_far) std::memcpy(far_key(), s.far_k + p * s.dim, s.dim * sizeof(float));
  }

  // Of the ring what is not a sink, and of the sinks what is there.
  bool sees(Index place) const {
    const Index age = at - place + (place > at ? s.window : 0);
    return place < s.window ? count - age >= s.sinks : place - s.window <= count;
  }

  // Numerators (R, V), denominators and maxima (R) of ring and sinks, in one pass over keys and one over values.
  void attend(float* near, float* denominator, float* top) const {
    const float *keys = opened(k, places, s.dim, own.keys), *values = opened(v, places, s.width, own.values);
    const float* q = s.q + p * s.repeats * s.dim;
    const Index wide = up(places);
    float* scores = room(own.scores, s.repeats * wide);
    std::fill_n(scores, s.repeats * wide, -INFINITY);
    for (Index j = 0; j < places; j++)
      for (Index r = 0; r < s.repeats && sees(j); r++) scores[r * wide + j] = dot(q + r * s.dim, keys + j * s.dim, s.dim) * s.scale;
    for (Index r = 0; r < s.repeats; r++)
      soften(scores + r * wide, wide, [](Index) { return counted(0) >= 0; }, denominator + r, top + r);
    for (Index j = 0; j < places; j++)
      for (Index r = 0; r < s.repeats; r++) add(near + r * s.width, values + j * s.width, s.width, scores[r * wide + j]);
  }

  // What leaves goes in, row by row of the memory, and queries' features (R, F) read: (R, V + 1).
  void remember(float* state, bool enters, const float* phi, const float* value, const float* queries, float* found) const {
    for (Index i = 0; i < features; i++, state += row) {
      if (enters) add(state, value, s.width, phi[i]), state[s.width] += phi[i];
      for (Index r = 0; r < s.repeats; r++) add(found + r * row, state, row, queries[r * features + i]);
    }
  }

  // (near e^top + far e^factor) / (denominator e^top + mass e^factor)
  void merge(Index r, const float* near, float denominator, float top, const float* found) const {
    const Index head = g * s.repeats + r, query = p * s.repeats + r;
    const float slope = s.slope ? dot(s.far_q + query * s.dim, s.slope + head * s.dim, s.dim) : 0, mass = found[s.width];
    const float factor = (slope + (s.bias ? s.bias[head] : 0)) * LOG2E + (s.slant ? s.slant[head] : 1) * top;
    const float there = mass > 0 ? factor : -INFINITY, most = std::max(top, there);
    const float a = std::exp2(top - most), b = std::exp2(there - most), share = 1 / (denominator * a + mass * b);
    for (Index j = 0; j < s.width; j++) s.out[query * s.width + j] = (near[j] * a + found[j] * b) * share;
  }

  void run() const {
    const Index size = features * row, heads = s.repeats;
    float* state = static_cast<float*>(s.state) + p * size;
    uint16_t* stored = static_cast<uint16_t*>(s.state) + p * size;
    if (s.short_state) {
      state = room(own.state, size);
      for (Index i = 0; i < size; i++) state[i] = storage::widen(stored[i]);
    }
    float *phi = room(own.phi, (heads + 1) * features + s.width), *value = phi + (heads + 1) * features;
    float *near = room(own.read, heads * (s.width + row + 2)), *found = near + heads * s.width;
    float *denominator = found + heads * row, *top = denominator + heads;
    std::fill_n(near, heads * (s.width + row), 0.0f);
    if (leaves()) leave(phi + heads * features, value);
    arrive();
    attend(near, denominator, top);
    for (Index r = 0; r < heads; r++) {
      const Index head = g * heads + r;
      const Left far{s.far_q + (p * heads + r) * s.dim, s.dim, 1};
      ::features(far, s.weight_q + head * s.dim * s.columns, 1, s.dim, s.columns, room(own.y, s.columns), phi + r * features);
    }
    remember(state, leaves(), phi + heads * features, value, phi, found);
    for (Index r = 0; r < heads; r++) merge(r, near + r * s.width, denominator[r], top[r], found + r * row);
    for (Index i = 0; s.short_state && i < size; i++) stored[i] = storage::dithered(state[i], count + 1, g * size + i);
  }
};

}  // namespace

void take_head(const HybridStep& s, Index problem) {
  static thread_local Scratch own;
  if (s.bits == 8) Head<storage::Eight>(s, problem, own).run();
  else if (s.bits == 16) Head<storage::Sixteen>(s, problem, own).run();
  else Head<storage::Plain>(s, problem, own).run();
}

void take_step(const HybridStep& s) {
#pragma omp parallel for if (s.batch * s.groups > FEW)
  for (Index p = 0; p < s.batch * s.groups; p++) take_head(s, p);
}
