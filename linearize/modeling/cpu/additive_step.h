// One token enters an additive memory and is read for, in one pass over the state.
#pragma once
#include "tiles.h"

struct AdditiveStep {
  const float *q, *k, *v, *g, *state;  // (P, R, K), (P, K), (P, V), (P) or (P, K) or null, (P, K, V)
  float *out, *after;                  // (P, R, V), (P, K, V)
  Index problems, readers, keys, width;
  bool channelwise;
};

void enter_and_read(const AdditiveStep& s);
