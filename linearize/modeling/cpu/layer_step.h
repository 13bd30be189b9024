// A whole layer of a decoder, x + o(mixer(norm(x))) and a gate behind it, for one token of each row.
#pragma once
#include "hybrid_step.h"
#include "matvec.h"

struct LayerStep {
  const void* x;                  // (B, N) in the model's dtype, as all that is not of the mixer
  void* y;                        // (B, N)
  const void* norms[2];           // (N) before the mixer and before the gate
  float eps[2];
  Product q, k, v, o, gate, up, down;  // what they read and where they write is up to the kernel
  HybridStep mixer;                    // so are its queries, keys, values and its output
  const void *cos, *sin;  // (B or 1, W) of the W channels that turn
  Index turned, shift;    // W, and the numbers from a row to the next
  bool undone;            // the far half takes queries and keys before that
};

void take_layer(LayerStep& s);
