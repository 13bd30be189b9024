// One team of threads for all of a layer: no call between its parts, and each part begins where the one before has ended.
#include "layer_step.h"

#include <deque>

#include "rope.h"

extern "C" void rms_norm_float(const float* x, const float* weight, float* y, Index rows, Index width, float eps);
extern "C" void rms_norm_half(const Half* x, const Half* weight, Half* y, Index rows, Index width, float eps);
extern "C" void rope_half(const Half* x, const Half* cos, const Half* sin, Half* y, Index of_batch, Index of_head, Index of_token,
                          Index batch, Index heads, Index time, Index dim, Index width, Index shift);

namespace {

void norm(const float* x, const float* w, float* y, Index rows, Index width, float eps) { rms_norm_float(x, w, y, rows, width, eps); }
void norm(const Half* x, const Half* w, Half* y, Index rows, Index width, float eps) { rms_norm_half(x, w, y, rows, width, eps); }

// Of one row: x (heads, dim).
void turn(const float* x, const float* cos, const float* sin, float* y, Index heads, Index dim, Index width, Index kind = 0) {
  rope(x, cos, sin, y, 0, dim, 0, 1, heads, 1, dim, width, 0, kind);
}
void turn(const Half* x, const Half* cos, const Half* sin, Half* y, Index heads, Index dim, Index width) {
  rope_half(x, cos, sin, y, 0, dim, 0, 1, heads, 1, dim, width, 0);
}

// The same numbers in float32: those that are so already stay where they are.
const float* widened(const float* x, Index, float*) { return x; }
const float* widened(const Half* x, Index size, float* into) {
  for (Index i = 0; i < size; i += LANES) store(into + i, load(x + i));
  return into;
}
void narrowed(const float* x, Index size, Half* into) {
  for (Index i = 0; i < size; i += LANES) store(into + i, load(x + i));
}
void narrowed(const float*, Index, float*) {}

using Buffers = std::deque<std::vector<float>>;  // which stay where they are when one more comes

template <class T>
struct Layer {
  LayerStep& s;
  HybridStep& m;
  Buffers& buffers;
  size_t used = 0;
  const Index rows, width;
  T *normed, *middle, *q, *k, *v, *turned_q, *turned_k, *heads;
  float *wide_q, *wide_k, *wide_v, *far_q, *far_k, *hidden;
  const float *cos, *sin;
  std::vector<float> &read, &other, &third;

  std::vector<float>& one_more() {
    if (used == buffers.size()) buffers.emplace_back();
    return buffers[used++];
  }

  template <class A>
  A* fresh(Index size) {
    return reinterpret_cast<A*>(room(one_more(), size));
  }

  // What the kernel reads or writes in float32 of so many numbers: the same where they are so already.
  float* wide(T* x, Index size) {
    if constexpr (std::is_same_v<T, float>) return x;
    else return fresh<float>(size);
  }

  T* through(Product& p, const T* x) {
    p.x = x, p.y = fresh<T>(p.rows * p.out);
    return static_cast<T*>(p.y);
  }

  Layer(LayerStep& step, Buffers& kept)
      : s(step), m(step.mixer), buffers(kept), rows(step.q.rows), width(step.q.depth), normed(fresh<T>(rows * width)),
        middle(fresh<T>(rows * width)), q(through(s.q, normed)), k(through(s.k, normed)), v(through(s.v, normed)),
        turned_q(fresh<T>(rows * s.q.out)), turned_k(fresh<T>(rows * s.k.out)), heads(fresh<T>(rows * s.o.depth)),
        read(one_more()), other(one_more()), third(one_more()) {
    through(s.o, heads), through(s.up, normed), through(s.down, through(s.gate, normed));
    const Index turning = s.shift ? rows * s.turned : s.turned;
    cos = widened(static_cast<const T*>(s.cos), turning, fresh<float>(turning));
    sin = widened(static_cast<const T*>(s.sin), turning, fresh<float>(turning));
    m.q = wide_q = wide(turned_q, rows * s.q.out), m.k = wide_k = wide(turned_k, rows * s.k.out), m.v = wide_v = wide(v, rows * s.v.out);
    m.far_q = far_q = s.undone ? fresh<float>(rows * s.q.out) : wide_q;
    m.far_k = far_k = s.undone ? fresh<float>(rows * s.k.out) : wide_k;
    m.out = wide(heads, rows * s.o.depth);
    m.hidden = hidden = wide(normed, rows * width), m.inputs = width;
  }

  // One kv head of one row, from what the products left to what the next takes.
  void head(Index p) const {
    const Index row = p / m.groups, queries = m.repeats * m.dim, shift = row * s.shift, values = m.repeats * m.width;
    const T *c = static_cast<const T*>(s.cos) + shift, *r = static_cast<const T*>(s.sin) + shift;
    turn(q + p * queries, c, r, turned_q + p * queries, m.repeats, m.dim, s.turned);
    turn(k + p * m.dim, c, r, turned_k + p * m.dim, 1, m.dim, s.turned);
    widened(turned_q + p * queries, queries, wide_q + p * queries);
    widened(turned_k + p * m.dim, m.dim, wide_k + p * m.dim);
    widened(v + p * m.width, m.width, wide_v + p * m.width);
    if (s.undone) {
      turn(wide_q + p * queries, cos + shift, sin + shift, far_q + p * queries, m.repeats, m.dim, s.turned, INVERSE);
      turn(wide_k + p * m.dim, cos + shift, sin + shift, far_k + p * m.dim, 1, m.dim, s.turned, INVERSE);
    }
    take_head(m, p);
    narrowed(m.out + p * values, values, heads + p * values);
  }

  // into = x + W of this thread's columns.
  void add(const Product& p, const void* readable, const T* x, T* into) const {
    const Share part(p.out, WIDTH);
    multiply(p, readable, part);
    const T* found = static_cast<const T*>(p.y);
    for (Index i = 0; i < rows; i++)
      for (Index n = i * width + part.from; n < i * width + part.to; n += LANES) store(into + n, load(x + n) + load(found + n));
  }

  void run() {
    const T* x = static_cast<const T*>(s.x);
    norm(x, static_cast<const T*>(s.norms[0]), normed, rows, width, s.eps[0]);
    if (m.up) widened(normed, rows * width, hidden);
    const void *in = readable(s.q, read), *in_k = readable(s.k, other), *in_v = readable(s.v, third), *in_up = nullptr;
#pragma omp parallel if (s.gate.out * s.gate.depth > 1 << 14)
    {
      multiply(s.q, in, Share(s.q.out)), multiply(s.k, in_k, Share(s.k.out)), multiply(s.v, in_v, Share(s.v.out));
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
      for (Index p = 0; p < m.batch * m.groups; p++) head(p);
#pragma omp single
      in = readable(s.o, read);
      add(s.o, in, x, middle);
#pragma omp barrier
#pragma omp single
      {
        norm(middle, static_cast<const T*>(s.norms[1]), normed, rows, width, s.eps[1]);
        in = readable(s.gate, read), in_up = readable(s.up, other);
      }
      const Share part(s.gate.out, WIDTH);
      multiply(s.gate, in, part);
      multiply(s.up, in_up, part);
      pass(s.gate, s.up, part);
#pragma omp barrier
#pragma omp single
      in = readable(s.down, read);
      add(s.down, in, middle, static_cast<T*>(s.y));
    }
  }
};

}  // namespace

void take_layer(LayerStep& s) {
  static thread_local Buffers kept;
  if (s.q.half) Layer<Half>(s, kept).run();
  else Layer<float>(s, kept).run();
}
