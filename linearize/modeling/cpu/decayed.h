// The additive engine with decays a channel: sizes, and what both directions make of a chunk's decays.
#pragma once
#include "chunks.h"

// d (P, T, K) are the tokens' decays. Inside a chunk, TILE tokens are a step: what is between two tokens of a step is
// multiplied from token to token, what is between two steps as a whole. All factors are decays: none grows, however strong they are.
struct Decayed : Engine {
  const float* d;
  const float* decay(Index p, Index n) const { return d + (p * time + start(n)) * keys; }
  Index steps(Index n) const { return (tokens(n) + TILE - 1) / TILE; }
};

// into (rows, K) = x (rows, K) times the product of decays d (rows, K) up to each row or, backwards, after it; `total` (K) is that
// of all.
template <bool UNTIL, int PANELS>
inline void running(const float* x, const float* d, Index rows, Index keys, float* into, float* total) {
  Vector run[PANELS];
  for (auto& part : run) part = all(1.0f);
  for (Index at = 0; at < rows; at++) {
    const Index i = (UNTIL ? rows - 1 - at : at) * keys;
    for (int c = 0; c < PANELS; c++) {
      const Vector decay = load(d + i + c * LANES), next = run[c] * decay;
      store(into + i + c * LANES, load(x + i + c * LANES) * (UNTIL ? run[c] : next));
      run[c] = next;
    }
  }
  for (int c = 0; c < PANELS; c++) store(total + c * LANES, run[c]);
}

template <bool UNTIL>
inline void multiplied(const float* x, const float* d, Index rows, Index keys, float* into, float* total) {
  Index c = 0;
  for (; c + 4 * LANES <= keys; c += 4 * LANES) running<UNTIL, 4>(x + c, d + c, rows, keys, into + c, total + c);
  for (; c < keys; c += LANES) running<UNTIL, 1>(x + c, d + c, rows, keys, into + c, total + c);
}

inline void since(const float* x, const float* d, Index rows, Index keys, float* into, float* total) {
  multiplied<false>(x, d, rows, keys, into, total);
}

inline void until(const float* x, const float* d, Index rows, Index keys, float* into, float* total) {
  multiplied<true>(x, d, rows, keys, into, total);
}

// into (rows, K) = x (rows, K) times the factors (K) of the channels.
inline void scaled(const float* x, const float* factors, Index rows, Index keys, float* into) {
  for (Index i = 0; i < rows; i++)
    for (Index c = 0; c < keys; c += LANES) store(into + i * keys + c, load(x + i * keys + c) * load(factors + c));
}

// into (K) += the products of two rows.
inline void gather(float* into, const float* x, const float* y, Index keys) {
  for (Index c = 0; c < keys; c += LANES) store(into + c, load(into + c) + load(x + c) * load(y + c));
}
