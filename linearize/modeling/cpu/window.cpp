#include "window.h"

// q (B, G, R, T, D) with steps of its own, k and v (B, G, lead + T, .), sinks (B, G, s, .), count (B) of tokens before; numerator
// (B, G, R, T, V), denominator and top (B, G, R, T).
extern "C" void window_attend(const float* q, Index of_batch, Index of_head, Index of_token, const float* k, const float* v,
                              const float* sink_k, const float* sink_v, const Index* count, float* numerator, float* denominator,
                              float* top, Index batch, Index groups, Index repeats, Index time, Index lead, Index dim, Index width,
                              Index sinks, Index window, Index terraced, float scale) {
  const Window w{time, lead, dim, width, sinks, window, terraced, scale};
  const Rows queries{q, of_batch, of_head, of_token};
  const Index tiles = (time + TILE - 1) / TILE, length = w.length(), wide = up(width);
  std::vector<float> packed(batch * groups * w.packed());
  std::vector<Packed> keys(batch * groups);
#pragma omp parallel
  {
    std::vector<float> scratch, out(TILE * wide);
#pragma omp for
    for (Index p = 0; p < batch * groups; p++)
      keys[p] = w.pack(k + p * length * dim, v + p * length * width, sink_k + p * sinks * dim, sink_v + p * sinks * width,
                       packed.data() + p * w.packed());
#pragma omp for schedule(dynamic, 4)
    for (Index u = 0; u < batch * groups * repeats * tiles; u++) {
      const Index p = u / tiles / repeats, head = p % groups * repeats + u / tiles % repeats, start = u % tiles * TILE;
      const Index b = p / groups, rows = std::min(TILE, time - start), row = (b * groups * repeats + head) * time + start;
      attend(w, keys[p], queries.at(b, head, start), of_token, count[b], start, rows, out.data(), denominator + row, top + row,
             scratch);
      for (Index i = 0; i < rows; i++) std::memcpy(numerator + (row + i) * width, out.data() + i * wide, width * sizeof(float));
    }
  }
}

// The same of n queries (B, G, R, n, D) on L keys and values (B, G, L, .) of which `seen` (B, G, n, L) shows some to each.
extern "C" void listed_attend(const float* q, Index of_batch, Index of_head, Index of_token, const float* k, const float* v,
                              const uint8_t* seen, float* numerator, float* denominator, float* top, Index batch, Index groups,
                              Index repeats, Index time, Index length, Index dim, Index width, float scale) {
  typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1)));
  const Rows queries{q, of_batch, of_head, of_token};
  const Index tiles = (time + TILE - 1) / TILE, wide = up(width), keys = up(length) * dim, own = keys + length * wide;
  std::vector<float> packed(batch * groups * own);
#pragma omp parallel
  {
    std::vector<float> scratch(TILE * (dim + up(length) + wide));
    std::vector<uint8_t> shown(up(length));
    float *scaled = scratch.data(), *scores = scaled + TILE * dim, *out = scores + TILE * up(length);
#pragma omp for
    for (Index p = 0; p < batch * groups; p++) {
      transposed(k + p * length * dim, length, dim, dim, packed.data() + p * own);
      padded(v + p * length * width, length, width, width, packed.data() + p * own + keys);
    }
#pragma omp for schedule(dynamic, 1)
    for (Index u = 0; u < batch * groups * repeats * tiles; u++) {
      const Index p = u / tiles / repeats, head = p % groups * repeats + u / tiles % repeats, start = u % tiles * TILE;
      const Index rows = std::min(TILE, time - start), row = (p * repeats + u / tiles % repeats) * time + start;
      const float* from = queries.at(p / groups, head, start);
      for (Index i = 0; i < rows; i++)
        for (Index d = 0; d < dim; d++) scaled[i * dim + d] = from[i * of_token + d] * scale;
      product({scaled, dim, 1}, {packed.data() + p * own, LANES, dim * LANES}, rows, up(length) / LANES, dim, scores, up(length),
              false);
      for (Index i = 0; i < rows; i++) {
        std::memcpy(shown.data(), seen + (p * time + start + i) * length, length);
        const auto visible = [&](Index j) {
          return __builtin_convertvector(*reinterpret_cast<const Bytes*>(shown.data() + j), Mask) != 0;
        };
        soften(scores + i * up(length), up(length), visible, denominator + row + i, top + row + i);
      }
      product({scores, up(length), 1}, {packed.data() + p * own + keys, wide, LANES}, rows, wide / LANES, length, out, wide, false);
      for (Index i = 0; i < rows; i++) std::memcpy(numerator + (row + i) * width, out + i * wide, width * sizeof(float));
    }
  }
}
