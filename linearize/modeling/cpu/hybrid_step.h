// One token of a mixer like the default, or of a window alone, with slots behind it or without: it takes its place, what leaves the
// window competes for slots, what they give up goes into the memory, and its queries read all of them as one softmax.
#pragma once
#include "tiles.h"

// Exact slots (B, h, m, .) as they are stored, and their tokens' scores (B, h, m); none where m is 0.
struct SlotPlaces {
  void *k, *v;
  float* score;
  Index size, heads;
};

struct HybridStep {
  const float *q, *far_q;                   // (B, H, D)
  const float *k, *v, *far_k;               // (B, G, .) of the new token
  const Index* count;                       // (B): tokens before it
  void *held_k, *held_v;                    // (B, G, W + s, .): a ring and sinks, as they are stored
  float* held_far;                          // (B, G, W, D), or null where a key is the far half's too
  void* state;                              // (B, G, K, V + 1), or null: then what leaves is gone
  const float *weight_q, *weight_k;         // (H, D, F) and (G, D, F)
  const float *slope, *bias, *slant;        // of the far mass: (H, D), (H), (H) or null
  float* out;                               // (B, H, V)
  Index batch, groups, repeats, dim, width, sinks, window, columns;
  float scale;  // of scores of base 2
  int bits;     // of a stored channel: 8, 16 or 32
  bool short_state;  // in bfloat16
  SlotPlaces slots{}, more{};      // between the window and the memory; further ones, for what the first give up
  const Index* more_of = nullptr;  // (G): which of the heads that have further ones this is, or -1
  int slot_bits = 0;               // of a channel there: 4, 8 or 32
  float* scores = nullptr;         // (B, G, W, 1 or 2) of tokens in the ring: the largest attention they got, what was known of them
  const float *hidden = nullptr, *up = nullptr, *shift = nullptr, *rate = nullptr;  // of a new one, where scores are learnt, W x + b +
  Index inputs = 0;                // rate count is known, of the layer's input x (B, N), W (G, N), b and rate (G)
  const float* gains = nullptr;    // (G, 2) of log attention and its square, or null: attention itself is the score
};

void take_step(const HybridStep& s);

// One kv head of one row of it, of B G, in memory of this thread's own.
void take_head(const HybridStep& s, Index problem);
