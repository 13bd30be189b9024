// What the queries of a softmax give each key: the most while it is in their window, and the most or the squares once it has left it.
#include <omp.h>

#include "window.h"
#include "workspace.h"

namespace {

constexpr Index BLOCK = 32;  // queries at once

// first (T): the first key in each query's window, below 0 where all are; of `sinks` before it a query's window has its share too.
struct Call {
  Rows q;
  const int64_t* first;
  Index groups, repeats, time, dim, sinks, apart;
  float scale;
  bool squares;
};

// log2 sum 2^s of a row's scores from `least` to `most`; -inf of none.
float log_mass(const float* s, Index least, Index most) {
  if (least > most) return -INFINITY;
  const Index from = least / LANES * LANES;
  const auto at = [&](Index j) {
    const Mask key = counted(j);
    return (key >= int32_t(least)) & (key <= int32_t(most)) ? load(s + j) : all(-INFINITY);
  };
  Vector highest = all(-INFINITY), total = Vector{};
  for (Index j = from; j <= most; j += LANES) highest = larger(highest, at(j));
  const float top = largest(highest);
  for (Index j = from; j <= most; j += LANES) total += power_of_two(at(j) - top);
  return top + std::log2(sum(total));
}

float together(float a, float b) {
  const float top = std::max(a, b);
  return top + std::log2(std::exp2(a - top) + std::exp2(b - top));
}

void note(float* most, const float* s, float mass, Index least, Index end) {
  for (Index j = least; j < end; j++) most[j] = std::max(most[j], s[j] - mass);
}

void add_squares(float* sums, const float* s, float mass, Index end) {
  for (Index j = 0; j < end; j += LANES) {
    const Vector square = power_of_two(2 * (load(s + j) - mass));
    store(sums + j, load(sums + j) + (counted(j) < int32_t(end) ? square : Vector{}));
  }
}

// Queries from `start` on of one reader: what they give, as powers of two, where it is more than what is there; or squares beyond.
void block(const Call& c, const Right& keys, Index p, Index r, Index start, float* inside, float* beyond, std::vector<float>& held) {
  const Index rows = std::min(BLOCK, c.time - start), width = up(start + rows), stride = width | WIDTH;
  float *q = room(held, BLOCK * (c.dim + stride)), *scores = q + BLOCK * c.dim;
  const float* queries = c.q.at(p / c.groups, p % c.groups * c.repeats + r, start);
  for (Index i = 0; i < rows; i++)
    for (Index d = 0; d < c.dim; d++) q[i * c.dim + d] = queries[i * c.q.of_token + d] * c.scale;
  product({q, c.dim, 1}, keys, rows, width / LANES, c.dim, scores, stride, false);
  for (Index i = 0; i < rows; i++) {
    const float* s = scores + i * stride;
    const Index t = start + i, first = std::max<Index>(c.first[t], 0), sinks = std::min(c.sinks, first);
    const float near = together(log_mass(s, first, t), log_mass(s, 0, sinks - 1));
    note(inside, s, near, 0, std::min(sinks, t - c.apart));
    note(inside, s, near, first, t - c.apart);
    if (c.squares)
      add_squares(beyond, s, log_mass(s, 0, t), first);
    else
      note(beyond, s, log_mass(s, 0, t), 0, first);
  }
}

}  // namespace

// q (B, G R, T, D) with steps of its own, k (B, G, T, D); for each key (B, G, T) logarithms of base 2: inside, from queries more
// than `apart` tokens away, and beyond, from those whose window it has left. Or the sum of their squares, in an order that the number
// of threads tells.
extern "C" void attention_received(const float* q, Index of_batch, Index of_head, Index of_token, const float* k, Index k_batch,
                                   Index k_head, Index k_token, const int64_t* first, float* inside, float* beyond, Index batch,
                                   Index groups, Index repeats, Index time, Index dim, Index sinks, Index apart, Index squares,
                                   float scale) {
  const Call c{{q, of_batch, of_head, of_token}, first, groups, repeats, time, dim, sinks, apart, scale, squares != 0};
  const Rows keys{k, k_batch, k_head, k_token};
  const Index problems = batch * groups, blocks = (time + BLOCK - 1) / BLOCK, size = problems * time;
  const float none = squares ? 0.0f : -INFINITY;
  const Workspace packed(problems * up(time) * dim);
  std::vector<std::vector<float>> shares(omp_get_max_threads());
#pragma omp parallel
  {
    std::vector<float> held, &own = shares[omp_get_thread_num()];
    own.assign(size, -INFINITY);
    own.resize(2 * size + LANES, none);
#pragma omp for
    for (Index p = 0; p < problems; p++)
      transposed(keys.at(p / groups, p % groups, 0), time, dim, k_token, packed.data + p * up(time) * dim);
#pragma omp for schedule(static, 1)
    for (Index u = problems * blocks - 1; u >= 0; u--) {
      const Index p = u % problems;
      const Right right{packed.data + p * up(time) * dim, LANES, dim * LANES};
      for (Index r = 0; r < repeats; r++)
        block(c, right, p, r, u / problems * BLOCK, own.data() + p * time, own.data() + size + p * time, held);
    }
  }
  std::fill_n(inside, size, -INFINITY);
  std::fill_n(beyond, size, none);
  for (const std::vector<float>& own : shares)
    for (Index j = 0; j < (own.empty() ? 0 : size); j++) {
      inside[j] = std::max(inside[j], own[j]);
      beyond[j] = squares ? beyond[j] + own[size + j] : std::max(beyond[j], own[size + j]);
    }
}
