#include "window.h"
#include "workspace.h"

// q (B, G, R, T, D) with steps of its own, k and v (B, G, lead + T, .), sinks (B, G, s, .), count (B) of tokens before; numerator
// (B, G, R, T, V), denominator and top (B, G, R, T). `received` (B, G, lead + T) may be null, or is zero and becomes the largest
// share that each key gets of a query before position `until` (B) that is more than an eighth of the window away.
extern "C" void window_attend(const float* q, Index of_batch, Index of_head, Index of_token, const float* k, const float* v,
                              const float* sink_k, const float* sink_v, const Index* count, const Index* until, float* received,
                              float* numerator, float* denominator, float* top, Index batch, Index groups, Index repeats,
                              Index time, Index lead, Index dim, Index width, Index sinks, Index window, Index terraced,
                              float scale) {
  const Window w{time, lead, dim, width, sinks, window, terraced, scale};
  const Rows queries{q, of_batch, of_head, of_token};
  const Index tiles = (time + TILE - 1) / TILE, length = w.length(), wide = up(width);
  const Workspace packed(batch * groups * w.packed());
  std::vector<Packed> keys(batch * groups);
#pragma omp parallel
  {
    std::vector<float> scratch, out(TILE * wide);
#pragma omp for
    for (Index p = 0; p < batch * groups; p++)
      keys[p] = w.pack(k + p * length * dim, v + p * length * width, sink_k + p * sinks * dim, sink_v + p * sinks * width,
                       packed.data + p * w.packed());
#pragma omp for schedule(dynamic, 4)
    for (Index u = 0; u < batch * groups * repeats * tiles; u++) {
      const Index p = u / tiles / repeats, head = p % groups * repeats + u / tiles % repeats, start = u % tiles * TILE;
      const Index b = p / groups, rows = std::min(TILE, time - start), row = (b * groups * repeats + head) * time + start;
      const Received shares = received ? Received{received + p * length, until[b] - count[b]} : Received{};
      attend(w, keys[p], queries.at(b, head, start), of_token, count[b], start, rows, out.data(), denominator + row, top + row,
             scratch, shares);
      for (Index i = 0; i < rows; i++) std::memcpy(numerator + (row + i) * width, out.data() + i * wide, width * sizeof(float));
    }
  }
}
