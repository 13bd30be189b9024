// Rotary position embeddings of pairs of channels, W / 2 apart, undone too; and the transposed of both, which gradients take.
#include "rope.h"

#include "bf16.h"

namespace {

// One token's factors: y_1 = own_1 x_1 + other_1 x_2, y_2 = own_2 x_2 + other_2 x_1.
struct Factors {
  std::vector<float> own, other;
};

// cos, sin (W) of y_1 = x_1 cos_1 - x_2 sin_1, y_2 = x_2 cos_2 + x_1 sin_2.
void factors(const float* cos, const float* sin, Index half, Index kind, Factors& f) {
  float *own = room(f.own, 2 * half), *other = room(f.other, 2 * half);
  for (Index j = 0; j < half; j += LANES)
    for (Index side = 0; side < 2; side++) {
      const Index at = side * half + j, across = (1 - side) * half + j;
      const auto share = [&](Index i) {
        const Vector c = load(cos + i), s = load(sin + i);
        return kind & INVERSE ? 1.0f / (c * c + s * s) : all(1.0f);  // yarn scales cos and sin
      };
      const Index from = kind & TRANSPOSED ? across : at;
      const Index turns = (side == 0) + (kind & TRANSPOSED ? 1 : 0) + (kind & INVERSE ? 1 : 0);  // of the sign
      store(own + at, load(cos + at) * share(at));
      store(other + at, load(sin + from) * share(from) * (turns % 2 ? -1.0f : 1.0f));
    }
}

// y = x c + o s of LANES channels and the others o of their pairs, rounded as PyTorch does after each of the three.
inline void turn(const Half* x, const Half* cos, Vector other, const Half* sin, Half* y) {
  store(y, rounded<Half>(load(x) * load(cos)) + rounded<Half>(other * load(sin)));
}

}  // namespace

// x (B, H, T, D) with steps of its own, of which the first W channels turn, W a multiple of 2 WIDTH; cos, sin (B or 1, T, W) with
// `shift` numbers from a text to the next; y (B, H, T, D).
extern "C" void rope(const float* x, const float* cos, const float* sin, float* y, Index of_batch, Index of_head, Index of_token,
                     Index batch, Index heads, Index time, Index dim, Index width, Index shift, Index kind) {
  const Rows rows{x, of_batch, of_head, of_token};
  const Index half = width / 2;
#pragma omp parallel if (batch * time > 16)
  {
    Factors f;
#pragma omp for
    for (Index u = 0; u < batch * time; u++) {
      const Index b = u / time, t = u % time, at = b * shift + t * width;
      factors(cos + at, sin + at, half, kind, f);
      for (Index h = 0; h < heads; h++) {
        const float* from = rows.at(b, h, t);
        float* into = y + ((b * heads + h) * time + t) * dim;
        for (Index j = 0; j < half; j += LANES) {
          const Vector first = load(from + j), second = load(from + half + j);
          store(into + j, first * load(f.own.data() + j) + second * load(f.other.data() + j));
          store(into + half + j, second * load(f.own.data() + half + j) + first * load(f.other.data() + half + j));
        }
        std::memcpy(into + width, from + width, (dim - width) * sizeof(float));
      }
    }
  }
}

// The same of a model in bfloat16, neither undone nor transposed.
extern "C" void rope_half(const Half* x, const Half* cos, const Half* sin, Half* y, Index of_batch, Index of_head, Index of_token,
                          Index batch, Index heads, Index time, Index dim, Index width, Index shift) {
  const Index half = width / 2;
#pragma omp parallel for if (batch * time > 16)
  for (Index u = 0; u < batch * time; u++) {
    const Index b = u / time, t = u % time, at = t * width + b * shift;
    for (Index h = 0; h < heads; h++) {
      const Half* from = x + b * of_batch + h * of_head + t * of_token;
      Half* into = y + ((b * heads + h) * time + t) * dim;
      for (Index j = 0; j < half; j += LANES) {
        const Index second = half + j;
        turn(from + j, cos + at + j, -load(from + second), sin + at + j, into + j);
        turn(from + second, cos + at + second, load(from + j), sin + at + second, into + second);
      }
      std::memcpy(into + width, from + width, (dim - width) * sizeof(Half));
    }
  }
}
