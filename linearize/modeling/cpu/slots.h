// Exact slots of one kv head, for one token: which stays of those there and one that comes, and what queries read of them.
#pragma once
#include "tiles.h"

// (m) tokens in the order in which they came, as they are stored, with scores, -inf where a place is empty: those come last.
struct SlotHead {
  uint8_t *k, *v;
  float* score;
  Index size;

  // A token comes, and becomes the one that is pushed out: of those with the lowest score the youngest. False where none is.
  bool admit(uint8_t* own_k, Index k_bytes, uint8_t* own_v, Index v_bytes, float& own_score);
};

// Numerators (R, V), denominators and maxima of base 2 of scaled queries q (R, D) on slots that are stored in 4, 8 or 32 bits.
void read_slots(const SlotHead& slots, Index dim, Index width, int bits, const float* q, Index repeats, float* numerator,
                float* denominator, float* top, std::vector<float> (&held)[4]);
