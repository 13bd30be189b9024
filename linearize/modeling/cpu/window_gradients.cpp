// Gradients of the numerator and the denominator of a softmax over sinks and a window; its maximum has none.
#include "window.h"
#include "workspace.h"

namespace {

constexpr Index SEGMENT = 128;  // queries whose keys' gradients are summed in one place

struct Call {
  Window w;
  Rows queries;
  const float *k, *v, *sink_k, *sink_v;
  const Index* count;
  const float *top, *grad, *grad_mass;
  float* of_q;
  Index batch, groups, repeats, segments;

  Index wide() const { return up(w.width); }
  Index deep() const { return up(w.dim); }
  Index last(Index n) const { return w.lead + std::min((n + 1) * SEGMENT, w.time); }  // end of a segment's keys
  Index from(Index p, Index n) const { return w.first(count[p / groups], n * SEGMENT) / WIDTH * WIDTH; }
  Index keys(Index p, Index n) const { return up(w.sinks) + up(last(n) - from(p, n)); }
};

struct Scratch {
  std::vector<float> keys, values, rows, sink_keys, sink_values, sink_rows, q, padded_q, scores, slopes, grad, of_q;
};

// A segment's keys and values, from `from` on, as products take them.
struct Sides {
  Right keys, values, rows, sink_keys, sink_values, sink_rows;
};

Sides sides(const Call& c, Index p, Index from, Index length, Scratch& s) {
  const Window& w = c.w;
  const float *k = c.k + (p * w.length() + from) * w.dim, *v = c.v + (p * w.length() + from) * w.width;
  const float *sink_k = c.sink_k + p * w.sinks * w.dim, *sink_v = c.sink_v + p * w.sinks * w.width;
  return {transposed(k, length, w.dim, w.dim, room(s.keys, up(length) * w.dim)),
          transposed(v, length, w.width, w.width, room(s.values, up(length) * w.width)),
          padded(k, length, w.dim, w.dim, room(s.rows, length * c.deep())),
          transposed(sink_k, w.sinks, w.dim, w.dim, room(s.sink_keys, up(w.sinks) * w.dim)),
          transposed(sink_v, w.sinks, w.width, w.width, room(s.sink_values, up(w.sinks) * w.width)),
          padded(sink_k, w.sinks, w.dim, w.dim, room(s.sink_rows, w.sinks * c.deep()))};
}

// Queries from `start` on of one head: of_q, and what they add to the gradients of a segment's keys and values, sinks first.
void tile(const Call& c, const Sides& own, Index p, Index r, Index start, Index rows, Index from, float* of_k, float* of_v, Scratch& s) {
  const Window& w = c.w;
  const Index b = p / c.groups, head = p % c.groups * c.repeats + r, seen = c.count[b], deep = c.deep(), wide = c.wide();
  const Index begin = w.first(seen, start) / WIDTH * WIDTH, length = w.lead + start + rows - begin, skip = begin - from;
  const Index sink_width = up(w.sinks), width = sink_width + up(length), row = (p * c.repeats + r) * w.time + start;
  float *q = room(s.q, TILE * deep), *scores = room(s.scores, TILE * width), *slopes = room(s.slopes, TILE * width);
  float *grad = room(s.grad, TILE * wide), *of_q = room(s.of_q, TILE * deep);
  padded(c.queries.at(b, head, start), rows, w.dim, c.queries.of_token, q);
  padded(c.grad + row * w.width, rows, w.width, w.width, grad);
  product({q, deep, 1}, own.sink_keys, rows, sink_width / LANES, w.dim, scores, width, false);
  product({q, deep, 1}, own.keys.from(skip / LANES), rows, up(length) / LANES, w.dim, scores + sink_width, width, false);
  product({grad, wide, 1}, own.sink_values, rows, sink_width / LANES, w.width, slopes, width, false);
  product({grad, wide, 1}, own.values.from(skip / LANES), rows, up(length) / LANES, w.width, slopes + sink_width, width, false);
  for (Index i = 0; i < rows; i++) {
    const Visible visible = w.shown(seen, start + i, begin);
    const float base = std::max(c.top[row + i], -3.0e38f), mass = c.grad_mass[row + i];
    for (Index j = 0; j < width; j += LANES) {
      const Vector x = load(scores + i * width + j) * w.scale - base, weight = visible(j) ? power_of_two(x) : Vector{};
      store(scores + i * width + j, weight);
      store(slopes + i * width + j, weight * (load(slopes + i * width + j) + mass) * (w.scale * LN2));
    }
  }
  const auto add = [&](const float* left, const Right& right, Index panels, float* sinks, Index step) {  // += left^T right
    product({left, 1, width}, right, w.sinks, panels, rows, sinks, step, true);
    product({left + sink_width, 1, width}, right, length, panels, rows, sinks + (sink_width + skip) * step, step, true);
  };
  add(slopes, {q, deep, LANES}, deep / LANES, of_k, deep);
  add(scores, {grad, wide, LANES}, wide / LANES, of_v, wide);
  product({slopes, width, 1}, own.sink_rows, rows, deep / LANES, w.sinks, of_q, deep, false);
  const Right keys{own.rows.data + skip * deep, own.rows.row, own.rows.panel};
  product({slopes + sink_width, width, 1}, keys, rows, deep / LANES, length, of_q, deep, true);
  for (Index i = 0; i < rows; i++) std::memcpy(c.of_q + (row + i) * w.dim, of_q + i * deep, w.dim * sizeof(float));
}

// into (size) += the segments' sums for key j of head p, rows of `step` floats; segments are added in order.
void gathered(const Call& c, const Workspace& sums, const std::vector<Index>& begins, Index p, Index j, Index step,
              Index size, float* into) {
  std::fill_n(into, size, 0.0f);
  for (Index n = std::max<Index>(j - c.w.lead, 0) / SEGMENT; n < c.segments && c.from(p, n) <= j; n++) {
    const float* own = sums.data + (begins[p * c.segments + n] + up(c.w.sinks) + j - c.from(p, n)) * step;
    for (Index d = 0; d < size; d++) into[d] += own[d];
  }
}

void gathered_sinks(const Call& c, const Workspace& sums, const std::vector<Index>& begins, Index p, Index step, Index size,
                    float* into) {
  std::fill_n(into, c.w.sinks * size, 0.0f);
  for (Index n = 0; n < c.segments; n++)
    for (Index i = 0; i < c.w.sinks; i++)
      for (Index d = 0; d < size; d++) into[i * size + d] += sums.data[(begins[p * c.segments + n] + i) * step + d];
}

}  // namespace

// Arguments as of window_attend; `top` is what it gave, grad (B, G, R, T, V) of its numerator, grad_mass (B, G, R, T) of its
// denominator. of_q (B, G, R, T, D), of_k, of_v (B, G, lead + T, .), of_sink_k, of_sink_v (B, G, s, .).
extern "C" void window_backward(const float* q, Index of_batch, Index of_head, Index of_token, const float* k, const float* v,
                                const float* sink_k, const float* sink_v, const Index* count, const float* top, const float* grad,
                                const float* grad_mass, float* of_q, float* of_k, float* of_v, float* of_sink_k, float* of_sink_v,
                                Index batch, Index groups, Index repeats, Index time, Index lead, Index dim, Index width,
                                Index sinks, Index window, Index terraced, float scale) {
  const Window w{time, lead, dim, width, sinks, window, terraced, scale};
  const Index segments = (time + SEGMENT - 1) / SEGMENT, units = batch * groups * segments, length = w.length();
  const Call c{w, {q, of_batch, of_head, of_token}, k, v, sink_k, sink_v, count, top, grad, grad_mass, of_q, batch, groups, repeats,
               segments};
  std::vector<Index> begins(units + 1, 0);
  for (Index u = 0; u < units; u++) begins[u + 1] = begins[u] + c.keys(u / segments, u % segments);
  const Workspace keys(begins[units] * c.deep()), values(begins[units] * c.wide());
#pragma omp parallel
  {
    Scratch s;
#pragma omp for schedule(dynamic)
    for (Index u = 0; u < units; u++) {
      const Index p = u / segments, n = u % segments, from = c.from(p, n), end = std::min((n + 1) * SEGMENT, time);
      const Sides own = sides(c, p, from, c.last(n) - from, s);
      const Index seen = begins[u + 1] - begins[u];
      float *own_k = keys.data + begins[u] * c.deep(), *own_v = values.data + begins[u] * c.wide();
      std::fill_n(own_k, seen * c.deep(), 0.0f), std::fill_n(own_v, seen * c.wide(), 0.0f);
      for (Index r = 0; r < repeats; r++)
        for (Index start = n * SEGMENT; start < end; start += TILE)
          tile(c, own, p, r, start, std::min(TILE, end - start), from, own_k, own_v, s);
    }
#pragma omp for
    for (Index u = 0; u < batch * groups * length; u++) {
      gathered(c, keys, begins, u / length, u % length, c.deep(), dim, of_k + u * dim);
      gathered(c, values, begins, u / length, u % length, c.wide(), width, of_v + u * width);
    }
#pragma omp for
    for (Index p = 0; p < batch * groups; p++) {
      gathered_sinks(c, keys, begins, p, c.deep(), dim, of_sink_k + p * sinks * dim);
      gathered_sinks(c, values, begins, p, c.wide(), width, of_sink_v + p * sinks * width);
    }
  }
}
