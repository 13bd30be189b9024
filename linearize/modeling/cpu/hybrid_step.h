// One token of a mixer like the default: it takes its place, the one that leaves goes into the memory, and its queries read both.
#pragma once
#include "tiles.h"

struct HybridStep {
  const float *q, *far_q;                   // (B, H, D)
  const float *k, *v, *far_k;               // (B, G, .) of the new token
  const Index* count;                       // (B): tokens before it
  void *held_k, *held_v;                    // (B, G, W + s, .): a ring and sinks, as they are stored
  float* held_far;                          // (B, G, W, D), or null where a key is the far half's too
  void* state;                              // (B, G, K, V + 1)
  const float *weight_q, *weight_k;         // (H, D, F) and (G, D, F)
  const float *slope, *bias, *slant;        // of the far mass: (H, D), (H), (H) or null
  float* out;                               // (B, H, V)
  Index batch, groups, repeats, dim, width, sinks, window, columns;
  float scale;  // of scores of base 2
  int bits;     // of a stored channel: 8, 16 or 32
  bool short_state;  // in bfloat16
};

void take_step(const HybridStep& s);

// One kv head of one row of it, of B G, in memory of this thread's own.
void take_head(const HybridStep& s, Index problem);
