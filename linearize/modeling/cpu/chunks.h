// The additive engine's sizes, and what goes from chunk to chunk.
#pragma once
#include "tiles.h"

// q (P, R, T, K), k (P, T, K), v (P, T, V); K is a multiple of WIDTH. States (P, N + 1, K, up(V)) are those at the chunks' borders.
struct Engine {
  const float *q, *k, *v;
  Index problems, readers, time, keys, values, size, terraced;

  Index chunks() const { return (time + size - 1) / size; }
  Index wide() const { return up(values); }
  Index state() const { return keys * wide(); }
  Index start(Index n) const { return n * size; }
  Index tokens(Index n) const { return std::min(size, time - start(n)); }
  Index queries(Index p, Index r, Index n) const { return (p * readers + r) * time + start(n); }
  const float* key(Index p, Index n) const { return k + (p * time + start(n)) * keys; }
  const float* value(Index p, Index n) const { return v + (p * time + start(n)) * values; }
  float* border(float* states, Index p, Index n) const { return states + (p * (chunks() + 1) + n) * state(); }
};

using Scratch = std::vector<float>[20];

// Calls f(p, n) for each chunk, shared among the threads of a team.
template <class F>
inline void each_chunk(const Engine& e, const F& f) {
#pragma omp for
  for (Index u = 0; u < e.problems * e.chunks(); u++) f(u / e.chunks(), u % e.chunks());
}

// Adds what each border has to the next one, forwards or backwards, with the decays (P, N, K) of the chunk between them.
inline void accumulate(const Engine& e, float* states, const float* decays, bool forwards) {
  const Index parts = e.keys / WIDTH, wide = e.wide();
#pragma omp for
  for (Index unit = 0; unit < e.problems * parts; unit++) {
    const Index p = unit / parts, first = unit % parts * WIDTH;
    for (Index i = 0; i < e.chunks(); i++) {
      const Index n = forwards ? i : e.chunks() - 1 - i;
      const float *other = e.border(states, p, forwards ? n : n + 1), *decay = decays ? decays + (p * e.chunks() + n) * e.keys : nullptr;
      float* into = e.border(states, p, forwards ? n + 1 : n);
      for (Index c = first; c < first + WIDTH; c++) add(into + c * wide, other + c * wide, wide, decay ? decay[c] : 1.0f);
    }
  }
}
