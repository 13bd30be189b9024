// Exact slots: which of m slots' tokens and n arrivals stay, one arrival after another, and what queries read of them.
#include "slots.h"

#include <functional>

#include "storage.h"
#include "window.h"

namespace {

constexpr Index BLOCK = 128;  // queries that share one copy of the keys they see

// Ranks tokens: a higher score is greater and, of equal scores, the token that came first.
uint64_t rank(float score, Index age) {
  const float x = score + 0.0f;  // -0 becomes 0, its equal
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(bits) << 32 | (0xFFFFFFFFu - uint32_t(age));
}

Index age_of(uint64_t rank) { return 0xFFFFFFFFu - uint32_t(rank); }

// Of scores (m + n) when each token is pushed out: by which arrival, n where by none, 0 where no token is (-inf, or not a number).
void compete(const float* score, Index size, Index count, Index* gone, std::vector<uint64_t>& held) {
  held.clear();
  for (Index c = 0; c < size; c++) {
    gone[c] = score[c] > -INFINITY ? count : 0;
    if (gone[c]) held.push_back(rank(score[c], c));
  }
  std::make_heap(held.begin(), held.end(), std::greater<>());
  for (Index i = 0; i < count; i++) {
    const Index own = size + i;
    gone[own] = score[own] > -INFINITY ? count : 0;
    if (!gone[own]) continue;
    held.push_back(rank(score[own], own));
    std::push_heap(held.begin(), held.end(), std::greater<>());
    if (Index(held.size()) <= size) continue;
    std::pop_heap(held.begin(), held.end(), std::greater<>());
    gone[age_of(held.back())] = i;
    held.pop_back();
  }
}

// Which candidate each arrival pushes out, or 0, and m of those that stay, in order, before others.
void settle(const float* score, Index size, Index count, const Index* gone, Index* lost, Index* after, uint8_t* out) {
  std::fill_n(lost, count, 0);
  if (out) std::fill_n(out, count, 0);
  Index filled = 0;
  for (Index c = 0; c < size + count; c++) {
    if (gone[c] == count) {
      after[filled++] = c;
    } else if (score[c] > -INFINITY) {
      lost[gone[c]] = c;
      if (out) out[gone[c]] = 1;
    }
  }
  for (Index c = 0; filled < size; c++)
    if (gone[c] < count) after[filled++] = c;
}

// What some queries see of the candidates, side by side: keys as a right factor, values in rows, and when each came and goes.
struct Shown {
  Index count = 0;
  Right keys{}, values{};
  std::vector<float> rows, panels, filled;
  std::vector<int32_t> from, until;

  // Of k and v (C, .), those that stay beyond query `start` and are there before query `end`.
  void gather(const float* k, const float* v, const Index* gone, Index length, Index dim, Index width, Index size, Index start,
              Index end) {
    const Index most = std::min(length, size + end), wide = up(width);
    float *own = room(rows, most * dim), *other = room(filled, most * wide);
    from.assign(up(most), 0), until.assign(up(most), 0);
    count = 0;
    for (Index c = 0; c < most; c++) {
      const Index born = std::max<Index>(c - size, 0);
      if (gone[c] <= std::max(born, start)) continue;
      std::memcpy(own + count * dim, k + c * dim, dim * sizeof(float));
      padded(v + c * width, 1, width, width, other + count * wide);
      from[count] = born, until[count++] = gone[c];
    }
    keys = transposed(own, count, dim, dim, room(panels, up(count) * dim));
    values = {other, wide, LANES};
  }

  Mask seen(Index j, int32_t query) const {
    return (*reinterpret_cast<const Mask*>(&from[j]) <= query) & (*reinterpret_cast<const Mask*>(&until[j]) > query);
  }
};

// What queries q (R, D), scaled, of one token read of them.
template <class Form>
void read_stored(const SlotHead& slots, Index dim, Index width, const float* q, Index repeats, float* numerator, float* denominator,
                 float* top, std::vector<float> (&held)[4]) {
  const Index across = up(slots.size), wide = up(width);
  float *weights = room(held[0], repeats * (across + wide)), *out = weights + repeats * across, *score = room(held[1], across);
  float *keys = room(held[2], TILE * (2 * dim + wide)), *panels = keys + TILE * dim, *values = panels + TILE * dim;
  std::fill_n(values, TILE * wide, 0.0f);
  std::fill_n(out, repeats * wide, 0.0f);
  std::copy_n(slots.score, slots.size, score);
  std::fill(score + slots.size, score + across, -INFINITY);
  for (Index from = 0; from < across; from += TILE) {
    const Index count = std::min(TILE, slots.size - from);
    for (Index i = 0; i < count; i++) Form::open(slots.k + (from + i) * Form::bytes(dim), dim, keys + i * dim, held[3]);
    product({q, dim, 1}, transposed(keys, count, dim, dim, panels), repeats, TILE / LANES, dim, weights + from, across, false);
  }
  for (Index r = 0; r < repeats; r++)
    soften(weights + r * across, across, [&](Index j) { return load(score + j) > all(-INFINITY); }, denominator + r, top + r);
  for (Index from = 0; from < across; from += TILE) {
    const Index count = std::min(TILE, slots.size - from), bytes = Form::bytes(width);
    for (Index i = 0; i < count; i++) Form::open(slots.v + (from + i) * bytes, width, values + i * wide, held[3]);
    product({weights + from, across, 1}, {values, wide, LANES}, repeats, wide / LANES, count, out, wide, true);
  }
  for (Index r = 0; r < repeats; r++) std::memcpy(numerator + r * width, out + r * wide, width * sizeof(float));
}

}  // namespace

bool SlotHead::admit(uint8_t* own_k, Index k_bytes, uint8_t* own_v, Index v_bytes, float& own_score) {
  if (!(own_score > -INFINITY)) return false;
  Index place = size, lowest = 0;
  while (place > 0 && !(score[place - 1] > -INFINITY)) place--;
  const bool full = place == size;
  for (Index i = 1; full && i < size; i++) lowest = score[i] <= score[lowest] ? i : lowest;
  if (full && (!size || own_score <= score[lowest])) return true;
  const auto enter = [&](uint8_t* all, uint8_t* own, Index bytes) {
    if (full) {
      const std::vector<uint8_t> came(own, own + bytes);
      uint8_t* row = all + lowest * bytes;
      std::memcpy(own, row, bytes);
      std::memmove(row, row + bytes, (size - lowest - 1) * bytes);
      std::memcpy(all + (size - 1) * bytes, came.data(), bytes);
    } else {
      std::memcpy(all + place * bytes, own, bytes);
    }
  };
  enter(k, own_k, k_bytes), enter(v, own_v, v_bytes);
  enter(reinterpret_cast<uint8_t*>(score), reinterpret_cast<uint8_t*>(&own_score), sizeof(float));
  return full;
}

void read_slots(const SlotHead& slots, Index dim, Index width, int bits, const float* q, Index repeats, float* numerator,
                float* denominator, float* top, std::vector<float> (&held)[4]) {
  SlotHead filled = slots;
  while (filled.size > 0 && !(slots.score[filled.size - 1] > -INFINITY)) filled.size--;
  const auto read = bits == 4 ? read_stored<storage::Four> : bits == 8 ? read_stored<storage::Eight> : read_stored<storage::Plain>;
  read(filled, dim, width, q, repeats, numerator, denominator, top, held);
}

// score (B, G, m + n), -inf where no token is; gone (B, G, m + n), lost (B, G, n), after (B, G, m); out (B, n), which arrivals push
// one out: as many for all kv heads.
extern "C" void slots_admit(const float* score, Index* gone, Index* lost, Index* after, uint8_t* out, Index batch, Index groups,
                            Index size, Index count) {
#pragma omp parallel
  {
    std::vector<uint64_t> held;
#pragma omp for
    for (Index p = 0; p < batch * groups; p++) {
      const float* own = score + p * (size + count);
      Index* when = gone + p * (size + count);
      compete(own, size, count, when, held);
      settle(own, size, count, when, lost + p * count, after + p * size, p % groups ? nullptr : out + p / groups * count);
    }
  }
}

// Rows of so many bytes (B, h, count, .), of `size` first and `more` second ones (B, h, ., .) at index (B, G, count), h = share G.
extern "C" void slots_pick(const uint8_t* first, const uint8_t* second, const Index* index, uint8_t* into, Index heads, Index share,
                           Index size, Index more, Index count, Index bytes) {
#pragma omp parallel for if (heads * count * bytes > 1 << 17)
  for (Index p = 0; p < heads; p++) {
    const Index* own = index + p / share * count;
    for (Index i = 0, run; i < count; i += run) {
      const bool old = own[i] < size;
      const Index most = std::min(count - i, old ? size - own[i] : size + more - own[i]);
      for (run = 1; run < most && own[i + run] == own[i] + run; run++) continue;
      const uint8_t* from = old ? first + (p * size + own[i]) * bytes : second + (p * more + own[i] - size) * bytes;
      std::memcpy(into + (p * count + i) * bytes, from, run * bytes);
    }
  }
}

// n queries (B, G, R, n, D) on candidates k and v (B, G, C, .): query i sees those with gone (B, G, C) > i, of all after the first
// `size` only those of arrivals up to i.
extern "C" void slots_attend(const float* q, Index of_batch, Index of_head, Index of_token, const float* k, const float* v,
                             const Index* gone, float* numerator, float* denominator, float* top, Index batch, Index groups,
                             Index repeats, Index time, Index length, Index dim, Index width, Index size, float scale) {
  const Rows queries{q, of_batch, of_head, of_token};
  const Index blocks = (time + BLOCK - 1) / BLOCK, wide = up(width);
#pragma omp parallel
  {
    Shown shown;
    std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
    for (Index u = 0; u < batch * groups * blocks; u++) {
      const Index p = u / blocks, start = u % blocks * BLOCK, end = std::min(start + BLOCK, time), all = p * length;
      shown.gather(k + all * dim, v + all * width, gone + all, length, dim, width, size, start, end);
      const Index across = up(shown.count);
      float* scaled = room(scratch, TILE * (dim + across + wide));
      float *scores = scaled + TILE * dim, *out = scores + TILE * across;
      for (Index r = 0; r < repeats; r++)
        for (Index first = start; first < end; first += TILE) {
          const Index rows = std::min(TILE, end - first), row = (p * repeats + r) * time + first;
          const float* own = queries.at(p / groups, p % groups * repeats + r, first);
          for (Index i = 0; i < rows; i++)
            for (Index d = 0; d < dim; d++) scaled[i * dim + d] = own[i * of_token + d] * scale;
          product({scaled, dim, 1}, shown.keys, rows, across / LANES, dim, scores, across, false);
          for (Index i = 0; i < rows; i++)
            soften(scores + i * across, across, [&](Index j) { return shown.seen(j, int32_t(first + i)); }, denominator + row + i,
                   top + row + i);
          product({scores, across, 1}, shown.values, rows, wide / LANES, shown.count, out, wide, false);
          for (Index i = 0; i < rows; i++) std::memcpy(numerator + (row + i) * width, out + i * wide, width * sizeof(float));
        }
    }
  }
}

// One token's queries (B, G, R, D) on slots (B, G, m, bytes) as they are stored, in 4, 8 or 32 bits a channel.
extern "C" void slots_read(const float* q, uint8_t* k, uint8_t* v, float* score, float* numerator, float* denominator, float* top,
                           Index problems, Index repeats, Index size, Index dim, Index width, Index bits, float scale) {
  const auto bytes = bits == 4 ? storage::Four::bytes : bits == 8 ? storage::Eight::bytes : storage::Plain::bytes;
#pragma omp parallel
  {
    std::vector<float> held[4], scaled(repeats * dim);
#pragma omp for
    for (Index p = 0; p < problems; p++) {
      for (Index i = 0; i < repeats * dim; i++) scaled[i] = q[p * repeats * dim + i] * scale;
      const SlotHead slots{k + p * size * bytes(dim), v + p * size * bytes(width), score + p * size, size};
      const Index row = p * repeats;
      read_slots(slots, dim, width, int(bits), scaled.data(), repeats, numerator + row * width, denominator + row, top + row, held);
    }
  }
}
