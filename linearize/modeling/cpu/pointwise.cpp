// What a model does between its products, in one pass each: its norm, and the gate of its feed-forward layers.
#include "bf16.h"

namespace {

constexpr Index FEW = 1 << 14;  // numbers that one thread is done with before others have begun

// y = w (x / sqrt(mean x^2 + eps)), rounded as PyTorch rounds between the two products.
template <class T>
void rms_norm(const T* x, const T* weight, T* y, Index rows, Index width, float eps) {
#pragma omp parallel for if (rows * width > FEW)
  for (Index i = 0; i < rows; i++) {
    const T* from = x + i * width;
    T* into = y + i * width;
    Vector squares = Vector{};
    for (Index j = 0; j < width; j += LANES) {
      const Vector own = load(from + j);
      squares += own * own;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / width + eps);
    for (Index j = 0; j < width; j += LANES) store(into + j, load(weight + j) * rounded<T>(load(from + j) * scale));
  }
}

template <class T>
void swiglu(const T* x, const T* u, T* y, Index size) {
#pragma omp parallel for if (size > FEW)
  for (Index j = 0; j < size; j += LANES) store(y + j, gated<T>(load(x + j), load(u + j)));
}

}  // namespace

// x and y (rows, width), weight (width), width a multiple of WIDTH
extern "C" void rms_norm_float(const float* x, const float* weight, float* y, Index rows, Index width, float eps) {
  rms_norm(x, weight, y, rows, width, eps);
}
extern "C" void rms_norm_half(const Half* x, const Half* weight, Half* y, Index rows, Index width, float eps) {
  rms_norm(x, weight, y, rows, width, eps);
}

// x, u and y of so many numbers, a multiple of WIDTH
extern "C" void swiglu_float(const float* x, const float* u, float* y, Index size) { swiglu(x, u, y, size); }
extern "C" void swiglu_half(const Half* x, const Half* u, Half* y, Index size) { swiglu(x, u, y, size); }
