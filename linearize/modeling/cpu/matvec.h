// A few rows times a matrix whose rows are weights: it is read once, at the speed of memory.
#pragma once
#include <omp.h>

#include "bf16.h"

struct Product {
  const void *x, *weight;     // (M, K) of the kind of the output, (N, K)
  const float *scale, *bias;  // (N) or null: of the rows of weights in 8 bits, and what is added
  void* y;                    // (M, N)
  Index rows, out, depth;
  bool half;  // x and y are bfloat16, else float32
  int bits;   // of a weight: 8, 16 or 32
};

// What this thread takes of so many, in whole steps.
struct Share {
  Index from, to;
  explicit Share(Index size, Index step = 1) : from(part(size / step, 0) * step), to(part(size / step, 1) * step) {}
  static Index part(Index steps, Index more) { return steps * (omp_get_thread_num() + more) / omp_get_num_threads(); }
};

void multiply(const Product& p);

// Of a team: x as these rows are multiplied, as it is, in float32 or in bytes; some rows of weights; what a gate lets through of `up`.
const void* readable(const Product& p, std::vector<float>& held);
void multiply(const Product& p, const void* readable, const Share& own);
void pass(const Product& gate, const Product& up, const Share& own);

// down(silu(gate(x)) up(x)), each rounded as the output is: y of `gate` holds what `down` takes.
void multiply(const Product& gate, const Product& up, const Product& down);
