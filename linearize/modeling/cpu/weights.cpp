// Cross-entropy of a softmax teacher's weights and a linear student's, and its gradients, a tile of queries at a time.
#include "window.h"
#include "workspace.h"

namespace {

constexpr Index BLOCK = 32, DEPTH = 128;  // queries, and keys of their gradients, at once
constexpr float LEAST = 1e-12f;           // of a weight and of a sum of weights

// phi_q (B, M, R, T, K), phi_k (B, M, T, K), K a multiple of WIDTH; q (B, M R, T, D) and k (B, G, T, D) with steps of their own;
// first (B, T): the first key that each query sees, which its own is the last of.
struct Call {
  const float *phi_q, *phi_k;
  Rows q, k;
  const int64_t* first;
  Index batch, memories, readers, groups, time, keys, dim, begin, end, shares;
  float scale, factor;  // of scores of base 2; of the loss
};

struct Scratch {
  std::vector<float> q, teacher, student;
};

struct Keys {
  Right teacher, student;
};

// One query's loss. Of `teacher` (width), its scores, and `student`, products of features, the latter becomes the loss's gradient.
double row(float* teacher, float* student, Index width, int32_t least, int32_t most, float factor) {
  const auto seen = [&](Index j) {
    const Mask at = counted(j);
    return (at >= least) & (at <= most);
  };
  float denominator, top;
  soften(teacher, width, seen, &denominator, &top);
  Vector sums = Vector{}, logs = Vector{};
  for (Index j = 0; j < width; j += LANES) {
    const Vector x = seen(j) ? load(student + j) : Vector{};
    sums += x;
    logs += load(teacher + j) * logarithm(larger(x, all(LEAST)));
  }
  const float whole = sum(sums), share = whole > LEAST ? factor / whole : 0.0f, mean = 1 / denominator;
  for (Index j = 0; j < width; j += LANES) {
    const Vector x = load(student + j), own = x > LEAST ? load(teacher + j) * (factor * mean) / x : Vector{};
    store(student + j, seen(j) ? share - own : Vector{});
  }
  return factor * (std::log(std::max(whole, LEAST)) - double(sum(logs)) * mean);
}

// Queries from `start` on of one reader: their loss, and gradients by their features, set, and by the keys', added.
double block(const Call& c, const Keys& own, Index b, Index m, Index r, Index start, float* grad_q, float* grad_k, Scratch& s) {
  const Index rows = std::min(BLOCK, c.end - start), from = c.first[b * c.time + start] / WIDTH * WIDTH, last = start + rows;
  const Index width = up(last - from), stride = width | WIDTH;  // an odd number of lines, which spread over a cache
  const Index at = ((b * c.memories + m) * c.readers + r) * c.time + start;
  float *teacher = room(s.teacher, BLOCK * stride), *student = room(s.student, BLOCK * stride), *q = room(s.q, BLOCK * c.dim);
  const float* queries = c.q.at(b, m * c.readers + r, start);
  for (Index i = 0; i < rows; i++)
    for (Index d = 0; d < c.dim; d++) q[i * c.dim + d] = queries[i * c.q.of_token + d] * c.scale;
  product({q, c.dim, 1}, own.teacher.from(from / LANES), rows, width / LANES, c.dim, teacher, stride, false);
  const Left features{c.phi_q + at * c.keys, c.keys, 1};
  product(features, own.student.from(from / LANES), rows, width / LANES, c.keys, student, stride, false);
  double loss = 0;
  for (Index i = 0; i < rows; i++)
    loss += row(teacher + i * stride, student + i * stride, width, c.first[b * c.time + start + i] - from, start + i - from,
                c.factor);
  if (!grad_q) return loss;
  const Index panels = c.keys / LANES;
  for (Index j = 0; j < last - from; j += DEPTH) {
    const Index depth = std::min(DEPTH, last - from - j), key = (from + j) * c.keys;
    const float* keys = c.phi_k + (b * c.memories + m) * c.time * c.keys + key;
    product({student + j, stride, 1}, {keys, c.keys, LANES}, rows, panels, depth, grad_q + at * c.keys, c.keys, j > 0);
    product({student + j, 1, stride}, {features.data, c.keys, LANES}, depth, panels, rows, grad_k + key, c.keys, true);
  }
  return loss;
}

}  // namespace

// The sum over queries from `begin` to `end` of each share of each memory, losses (B, M, S); grad_q (B, M, R, T, K) and shares of
// grad_k (S, B, M, T, K), both null or neither.
extern "C" void weights_loss(const float* phi_q, const float* phi_k, const float* q, Index q_batch, Index q_head,
                             Index q_token, const float* k, Index k_batch, Index k_head, Index k_token, const int64_t* first,
                             double* losses, float* grad_q, float* grad_k, Index batch, Index memories, Index readers, Index groups,
                             Index time, Index keys, Index dim, Index begin, Index end, Index shares, float scale,
                             float factor) {
  const Rows queries{q, q_batch, q_head, q_token}, others{k, k_batch, k_head, k_token};
  const Call c{phi_q, phi_k, queries, others, first, batch, memories, readers,
               groups, time, keys, dim, begin, end, shares, scale, factor};
  const Workspace teacher(batch * groups * up(end) * dim), student(batch * memories * up(end) * keys);
#pragma omp parallel
  {
    Scratch s;
#pragma omp for nowait
    for (Index p = 0; p < batch * groups; p++)
      transposed(c.k.at(p / groups, p % groups, 0), end, dim, k_token, teacher.data + p * up(end) * dim);
#pragma omp for
    for (Index p = 0; p < batch * memories; p++)
      transposed(phi_k + p * time * keys, end, keys, keys, student.data + p * up(end) * keys);
#pragma omp for schedule(dynamic)
    for (Index u = 0; u < batch * memories * shares; u++) {
      const Index p = u / shares, b = p / memories, m = p % memories, g = m * groups / memories;
      const Keys own{{teacher.data + (b * groups + g) * up(end) * dim, LANES, dim * LANES},
                     {student.data + p * up(end) * keys, LANES, keys * LANES}};
      float* into = grad_k ? grad_k + (u % shares * batch * memories + p) * time * keys : nullptr;
      if (into) std::fill_n(into, time * keys, 0.0f);
      losses[u] = 0;
      for (Index t = begin + u % shares * BLOCK; t < end; t += shares * BLOCK)
        for (Index r = 0; r < readers; r++) losses[u] += block(c, own, b, m, r, t, grad_q, into, s);
    }
  }
}
