// Rotary position embeddings: what kernels beside them call.
#pragma once
#include "tiles.h"

enum RopeKind { TRANSPOSED = 1, INVERSE = 2 };

extern "C" void rope(const float* x, const float* cos, const float* sin, float* y, Index of_batch, Index of_head, Index of_token,
                     Index batch, Index heads, Index time, Index dim, Index width, Index shift, Index kind);
