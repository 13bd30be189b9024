// Exact softmax of a tile of queries over sinks and a window of recent tokens.
#pragma once
#include "tiles.h"

// Keys and values of one kv head, as products take them: `lead` earlier tokens, then the new ones.
struct Packed {
  Right keys, sink_keys;
  const float *values, *sink_values;
};

// Which of the keys from j on, LANES of them, a query sees: sinks first, filled up, then those of a window.
struct Visible {
  int32_t sinks, sink_width, least, most;
  Mask operator()(Index j) const {
    const Mask at = counted(j);
    return j < sink_width ? at < sinks : (at >= least) & (at <= most);
  }
};

struct Window {
  Index time, lead, dim, width, sinks, size, terraced;  // `size` tokens, `width` channels of a value
  float scale;                                         // of scores of base 2

  Index length() const { return lead + time; }
  Index packed() const { return up(length()) * dim + length() * up(width) + up(sinks) * dim + sinks * up(width); }

  Index first(Index seen, Index i) const {  // the first key that query i sees, after `seen` tokens, as an index of the keys
    const Index position = seen + i;
    const Index begin = terraced ? (position / size - 1) * size : position - size + 1;
    return std::max<Index>(std::max(begin, sinks) - seen + lead, 0);
  }

  // What query i sees after `seen` tokens, of the sinks and the keys from `from` on.
  Visible shown(Index seen, Index i, Index from) const {
    Visible s;
    const Index shift = up(sinks) - from;
    s.sinks = std::min(sinks, seen + i + 1), s.sink_width = up(sinks);
    s.least = first(seen, i) + shift, s.most = lead + i + shift;
    return s;
  }

  Packed pack(const float* k, const float* v, const float* sink_k, const float* sink_v, float* into) const {
    Packed found;
    found.keys = transposed(k, length(), dim, dim, into);
    into += up(length()) * dim;
    found.values = padded(v, length(), width, width, into).data;
    into += length() * up(width);
    found.sink_keys = transposed(sink_k, sinks, dim, dim, into);
    found.sink_values = padded(sink_v, sinks, width, width, into + up(sinks) * dim).data;
    return found;
  }
};

// The softmax of a row of scores of base 2, of those that `seen` shows, LANES at a time; the others become 0.
template <class Seen>
inline void soften(float* s, Index width, const Seen& seen, float* denominator, float* top) {
  Vector most = all(-INFINITY);
  for (Index j = 0; j < width; j += LANES) {
    const Vector x = seen(j) ? load(s + j) : all(-INFINITY);
    store(s + j, x);
    most = larger(most, x);
  }
  *top = largest(most);
  const float base = std::max(*top, -3.0e38f);
  Vector total = Vector{};
  for (Index j = 0; j < width; j += LANES) {
    const Vector weight = power_of_two(load(s + j) - base);
    store(s + j, weight);
    total += weight;
  }
  *denominator = sum(total);
}

// The largest share of a query's attention that each key gets, at least what it got; `real` queries count.
struct Received {
  float* most = nullptr;
  Index real = 0;
};

// What queries from `start` on, of rows of `step` floats, get: out (rows, up(width)), denominator and top of base 2 (rows).
inline void attend(const Window& w, const Packed& own, const float* queries, Index step, Index seen, Index start, Index rows,
                   float* out, float* denominator, float* top, std::vector<float>& scratch, Received received = {}) {
  const Index last = w.lead + start + rows - 1, from = w.first(seen, start) / WIDTH * WIDTH, length = last + 1 - from;
  const Index sink_width = up(w.sinks), width = sink_width + up(length), wide = up(w.width);
  float *q = room(scratch, TILE * (w.dim + width) + up(length)), *s = q + TILE * w.dim, *shares = s + TILE * width;
  std::fill_n(shares, received.most ? length : 0, 0.0f);
  for (Index i = 0; i < rows; i++)
    for (Index d = 0; d < w.dim; d++) q[i * w.dim + d] = queries[i * step + d] * w.scale;
  product({q, w.dim, 1}, own.sink_keys, rows, sink_width / LANES, w.dim, s, width, false);
  product({q, w.dim, 1}, own.keys.from(from / LANES), rows, up(length) / LANES, w.dim, s + sink_width, width, false);
  for (Index i = 0; i < rows; i++) {
    soften(s + i * width, width, w.shown(seen, start + i, from), denominator + i, top + i);
    const Index far = received.most && start + i < received.real ? w.lead + start + i - from - w.size / 8 : 0;  // keys far enough
    for (Index j = 0; j < far; j++) shares[j] = std::max(shares[j], s[i * width + sink_width + j] / denominator[i]);
  }
  if (received.most) {
#pragma omp critical(received)
    for (Index j = 0; j < length; j++) received.most[from + j] = std::max(received.most[from + j], shares[j]);
  }
  product({s, width, 1}, {own.sink_values, wide, LANES}, rows, wide / LANES, w.sinks, out, wide, false);
  product({s + sink_width, width, 1}, {own.values + from * wide, wide, LANES}, rows, wide / LANES, length, out, wide, true);
}
