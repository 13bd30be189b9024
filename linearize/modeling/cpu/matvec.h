// A few rows times a matrix whose rows are weights: it is read once, at the speed of memory.
#pragma once
#include "bf16.h"

struct Product {
  const void *x, *weight;     // (M, K) of the kind of the output, (N, K)
  const float *scale, *bias;  // (N) or null: of the rows of weights in 8 bits, and what is added
  void* y;                    // (M, N)
  Index rows, out, depth;
  bool half;  // x and y are bfloat16, else float32
  int bits;   // of a weight: 8, 16 or 32
};

void multiply(const Product& p);

// down(silu(gate(x)) up(x)), each rounded as the output is: y of `gate` holds what `down` takes.
void multiply(const Product& gate, const Product& up, const Product& down);
