// A call's own numbers, in memory from where tensors have theirs: it is not cleared, and used again where that is.
#pragma once
#include "tiles.h"

float* borrow(Index size);  // memory.cpp
void give(float* data);

struct Workspace {
  float* const data;
  explicit Workspace(Index size) : data(borrow(size)) {}
  ~Workspace() { give(data); }
  Workspace(const Workspace&) = delete;
};
