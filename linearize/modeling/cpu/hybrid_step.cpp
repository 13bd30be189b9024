#include "hybrid_step.h"

#include "hedgehog.h"
#include "slots.h"
#include "storage.h"
#include "window.h"

namespace {

constexpr float FLOOR = 1e-3f;   // of attention, before its logarithm; slot_scores.py
constexpr Index MANY = 256;      // exact tokens of a kv head that take longer than others need to begin
constexpr Index FEW = 8;         // kv heads of all rows that one thread is done with before others have begun

// phi (2 columns) of one x (dim) by W (dim, columns).
void features_of(const float* x, const float* weight, Index dim, Index columns, std::vector<float>& held, float* phi) {
  float* y = room(held, columns);
  if (columns % LANES == 0) return ::features({x, dim, 1}, weight, 1, dim, columns, y, phi);
  std::fill_n(y, columns, 0.0f);
  for (Index d = 0; d < dim; d++) add(y, weight + d * columns, columns, x[d]);
  for (const float sign : {1.0f, -1.0f}) {
    float most = -INFINITY, total = 0;
    for (Index j = 0; j < columns; j++) most = std::max(most, y[j] * sign);
    for (Index j = 0; j < columns; j++) total += phi[j] = std::exp(y[j] * sign - most);
    for (Index j = 0; j < columns; j++) phi[j] /= total;
    phi += columns;
  }
}

struct Scratch {
  std::vector<float> slots[4], scaled;
  std::vector<uint8_t> out_k, out_v;
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

  Index slot_bytes(Index channels) const { return s.slot_bits == 4 ? storage::Four::bytes(channels) : Form::bytes(channels); }

  SlotHead of(const SlotPlaces& places, Index head) const {
    const Index first = head * places.size;
    return {static_cast<uint8_t*>(places.k) + first * slot_bytes(s.dim), static_cast<uint8_t*>(places.v) + first * slot_bytes(s.width),
            places.score + first, places.size};
  }
  Index further() const { return s.more.size ? s.more_of[g] : -1; }
  SlotHead own_slots() const { return of(s.slots, p); }
  SlotHead more_slots() const { return of(s.more, p / s.groups * s.more.heads + further()); }

  float worth() const {
    const float* own = s.scores + (p * s.window + at) * (s.gains ? 2 : 1);
    if (!s.gains) return own[0];
    const float log = std::log(std::max(own[0], FLOOR));
    return own[1] + (log * s.gains[2 * g] + log * log * s.gains[2 * g + 1]);
  }

  // A stored vector of the ring as slots keep it, and one of those in float32.
  void to_slot(const uint8_t* bytes, Index channels, std::vector<uint8_t>& into) const {
    uint8_t* kept = room(into, slot_bytes(channels));
    if (s.slot_bits != 4) return void(std::memcpy(kept, bytes, Form::bytes(channels)));
    float* values = room(own.keys, channels);
    Form::open(bytes, channels, values, own.coded);
    storage::Four::keep(values, channels, kept, nullptr, own.coded);
  }
  void from_slot(const uint8_t* bytes, Index channels, float* values) const {
    s.slot_bits == 4 ? storage::Four::open(bytes, channels, values, own.coded) : Form::open(bytes, channels, values, own.coded);
  }

  // What leaves the window competes for slots; whether one is pushed out of all, and then its features (F) and value (V).
  bool pushed_out(float* phi, float* value) const {
    to_slot(k + at * Form::bytes(s.dim), s.dim, own.out_k), to_slot(v + at * Form::bytes(s.width), s.width, own.out_v);
    float score = worth();
    const auto admitted = [&](SlotHead slots) {
      return slots.admit(own.out_k.data(), slot_bytes(s.dim), own.out_v.data(), slot_bytes(s.width), score);
    };
    if (!admitted(own_slots()) || (further() >= 0 && !admitted(more_slots()))) return false;
    if (!s.state) return true;
    float* key = room(own.keys, s.dim);
    from_slot(own.out_k.data(), s.dim, key), from_slot(own.out_v.data(), s.width, value);
    features_of(key, s.weight_k + g * s.dim * s.columns, s.dim, s.columns, own.y, phi);
    return true;
  }

  // Features (F) and value (V) of the token that goes into the memory, if one does.
  bool leave(float* phi, float* value) const {
    if (!leaves()) return false;
    if (s.slots.size) return pushed_out(phi, value);
    if (!s.state) return true;
    const float* key = s.held_far ? far_key() : opened(k + at * Form::bytes(s.dim), 1, s.dim, own.keys);
    features_of(key, s.weight_k + g * s.dim * s.columns, s.dim, s.columns, own.y, phi);
    Form::open(v + at * Form::bytes(s.width), s.width, value, own.coded);
    return true;
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
    if (!s.scores) return;
    float* scores = s.scores + (p * s.window + at) * (s.gains ? 2 : 1);
    scores[0] = 0;
    if (s.gains) scores[1] = dot(s.hidden + p / s.groups * s.inputs, s.up + g * s.inputs, s.inputs) + s.shift[g] + s.rate[g] * count;
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

  // The largest share of one query's attention to window and sinks that keys of the ring got, of those far enough behind it.
  void receive(const float* denominator) const {
    const Index wide = up(places), step = s.gains ? 2 : 1;
    float* scores = s.scores + p * s.window * step;
    for (Index j = 0; j < s.window; j++) {
      const Index age = at - j + (j > at ? s.window : 0);
      for (Index r = 0; r < s.repeats && age > s.window / 8; r++)
        scores[j * step] = std::max(scores[j * step], own.scores[r * wide + j] / denominator[r]);
    }
  }

  // With what the same queries read of slots, as one softmax.
  void join(const SlotHead& slots, float* near, float* denominator, float* top) const {
    const Index heads = s.repeats;
    float *q = room(own.scaled, heads * (s.dim + s.width + 2)), *other = q + heads * s.dim, *its = other + heads * s.width;
    for (Index i = 0; i < heads * s.dim; i++) q[i] = s.q[p * heads * s.dim + i] * s.scale;
    read_slots(slots, s.dim, s.width, s.slot_bits, q, heads, other, its, its + heads, own.slots);
    for (Index r = 0; r < heads; r++) {
      const float most = std::max(top[r], its[heads + r]), a = std::exp2(top[r] - most), b = std::exp2(its[heads + r] - most);
      for (Index j = 0; j < s.width; j++) near[r * s.width + j] = near[r * s.width + j] * a + other[r * s.width + j] * b;
      denominator[r] = denominator[r] * a + its[r] * b, top[r] = most;
    }
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
    const Index heads = s.repeats;
    float *phi = room(own.phi, (heads + 1) * features + s.width), *value = phi + (heads + 1) * features;
    float *near = room(own.read, heads * (s.width + row + 2)), *found = near + heads * s.width;
    float *denominator = found + heads * row, *top = denominator + heads;
    std::fill_n(near, heads * (s.width + row), 0.0f);
    const bool enters = leave(phi + heads * features, value);
    arrive();
    attend(near, denominator, top);
    if (s.scores) receive(denominator);
    if (s.slots.size) join(own_slots(), near, denominator, top);
    if (further() >= 0) join(more_slots(), near, denominator, top);
    if (s.state) read_memory(enters, phi, value, found);
    for (Index r = 0; r < heads; r++) {
      float* out = s.out + (p * heads + r) * s.width;
      if (s.state) merge(r, near + r * s.width, denominator[r], top[r], found + r * row);
      else for (Index j = 0; j < s.width; j++) out[j] = near[r * s.width + j] / denominator[r];
    }
  }

  void read_memory(bool enters, float* phi, const float* value, float* found) const {
    const Index size = features * row, heads = s.repeats;
    float* state = static_cast<float*>(s.state) + p * size;
    uint16_t* stored = static_cast<uint16_t*>(s.state) + p * size;
    if (s.short_state) {
      state = room(own.state, size);
      for (Index i = 0; i < size; i++) state[i] = storage::widen(stored[i]);
    }
    for (Index r = 0; r < heads; r++) {
      const float* weight = s.weight_q + (g * heads + r) * s.dim * s.columns;
      features_of(s.far_q + (p * heads + r) * s.dim, weight, s.dim, s.columns, own.y, phi + r * features);
    }
    remember(state, enters, phi + heads * features, value, phi, found);
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
  const bool many = s.batch * s.groups > FEW || s.window + s.slots.size + s.more.size > MANY;
#pragma omp parallel for schedule(dynamic, 1) if (many)
  for (Index p = 0; p < s.batch * s.groups; p++) take_head(s, p);
}
