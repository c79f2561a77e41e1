// The additive operands of one head over a rectangle of rows and keys, laid out so that along a row of logits every
// read is a contiguous load: distances fall as keys rise, so tables are reversed, and slopes become tables too.
#pragma once

#include "pack.h"

namespace posattn::POSATTN_ISA {

// Keys that a row function may be asked for at once, padding included.
constexpr int64_t TILE_KEYS = 512;
constexpr int64_t ROW_MAX = TILE_KEYS + 2 * NR;

// Entries that a row function may read past the last key: whole tiles are loaded.
constexpr int64_t PAD = 2 * 64;
// Entries before a table's first: what rows past a rectangle's last would read.
constexpr int64_t FRONT = 32;

// Carves aligned pieces from one block; with no block it only measures, so that the same code sizes and fills.
struct Arena {
  char* block = nullptr;
  size_t used = 0;
  float* floats(int64_t n) {
    size_t at = used;
    used += (static_cast<size_t>(imax(n, 1)) * 4 + 63) / 64 * 64;
    return reinterpret_cast<float*>(block ? block + at : nullptr);
  }
};

struct Rectangle {
  int64_t i0, i1, j0, j1;  // rows and keys, counted inside the sequence
};

struct BiasTile {
  const Problem* p = nullptr;
  const Bias* bias = nullptr;
  const Sequence* s = nullptr;
  int64_t head = 0;
  Rectangle area{};
  int64_t base = 0, length = 0;  // entry x of the arrays below belongs to j - i = base + x
  int64_t offset = 0;            // implicit distance d = i + offset - j
  float *relative = nullptr, *psi = nullptr, *row = nullptr;
  float* scales = nullptr;                        // the profile's row scale of each row, the last one repeated
  float *psi_low = nullptr, *psi_high = nullptr;  // the extremes of psi over NR entries from each on
  int64_t block_rows = MR;                        // rows that find_reaches and decay_columns take together
  float* decay = nullptr;                         // what decay_columns holds

  static int64_t capacity(int64_t rows, int64_t keys) { return rows + keys + PAD + MR; }

  void layout(Arena& arena, const Bias& b, int64_t rows, int64_t keys) {
    int64_t n = capacity(rows, keys);
    if (b.relative()) relative = arena.floats(FRONT + n) + FRONT;
    if (b.psi) psi = arena.floats(FRONT + n) + FRONT, psi_low = arena.floats(n), psi_high = arena.floats(n);
    if (b.psi) scales = arena.floats(rows + FRONT);
    if (b.decay_k) decay = arena.floats(ROW_MAX);
    row = arena.floats(2 * ROW_MAX);
  }

  bool positions() const { return p->q_positions != nullptr; }

  int64_t query_position(int64_t i) const {
    return positions() ? p->q_positions[s->b * p->q_positions_batch + s->q0 + i] : i + offset;
  }
  const int64_t* key_positions(int64_t j) const { return p->k_positions + s->b * p->k_positions_batch + s->k0 + j; }
  float slope() const { return bias->slope[s->b * bias->slope_batch + head]; }

  // What table and slope add over the rectangle's falling distances from `farthest` on, in loops that vectorise.
  void fill_relative(int64_t farthest) {
    if (bias->table) {
      const float* values = bias->table + head * bias->table_len;
      const int64_t at = farthest - bias->table_first;
      if (at < bias->table_len && at - (length - 1) >= 0)
        for (int64_t x = 0; x < length; ++x) relative[x] = values[at - x];
      else
        for (int64_t x = 0; x < length; ++x) relative[x] = values[iclamp(at - x, 0, bias->table_len - 1)];
    } else {
      fill(relative, 0.0F, length);
    }
    if (!bias->slope) return;
    const float m = slope();
    const auto far = static_cast<int32_t>(farthest), n = static_cast<int32_t>(length);
    for (int32_t x = 0; x < n; ++x) {
      const auto d = static_cast<float>(far - x);
      relative[x] -= m * (bias->slope_signed || d >= 0.0F ? d : -d);
    }
  }
  int64_t psi_index(int64_t d) const { return iclamp(d - bias->psi_first, 0, bias->psi_len - 1); }

  void prepare(const Problem& problem, const Bias& b, const Sequence& sequence, int64_t h, const Rectangle& rectangle) {
    p = &problem, bias = &b, s = &sequence, head = h, area = rectangle;
    offset = s->offset;
    base = area.j0 - (area.i1 - 1);
    length = area.j1 - area.j0 + area.i1 - area.i0 - 1;
    reaches.block = decayed.block = -1;
    for (int64_t i = area.i0; b.psi && i < area.i1 + FRONT; ++i)
      scales[i - area.i0] = b.row_scale[iclamp(query_position(imin(i, area.i1 - 1)) - b.row_first, 0, b.row_len - 1)];
    if (positions()) return;
    int64_t padded = length + PAD;
    if (b.relative()) {
      fill_relative(offset - base);
      fill(relative - FRONT, 0.0F, FRONT);
      fill(relative + length, 0.0F, PAD);
    }
    if (b.psi) {
      // Real distances past the end too: which segments a row's last vectors meet must not depend on the rectangle.
      for (int64_t x = 0; x < padded; ++x) psi[x] = b.psi[psi_index(offset - base - x)];
      for (int64_t x = 0; x < padded; ++x) psi_low[x] = psi_high[x] = psi[x];
      widen(psi_low, psi_high, padded);
      fill(psi - FRONT, 0.0F, FRONT);
    }
  }

  // Extremes over one entry become extremes over NR, by doubling; past the end they end there.
  static void widen(float* low, float* high, int64_t n) {
    for (int64_t span = 1; span < NR; span *= 2)
      for (int64_t x = 0; x + span < n; ++x) {
        low[x] = fmin2(low[x], low[x + span]);
        high[x] = fmax2(high[x], high[x + span]);
      }
  }

  // The same over keys j .. j + n of row i; valid until the next call.
  const float* relative_row(int64_t i, int64_t j, int64_t n) const {
    if (!positions()) return relative + (j - i - base);
    const int64_t q = query_position(i), count = imax(imin(n, s->k_len - j), 0);
    const int64_t* keys = key_positions(j);
    if (bias->table) {  // loops of one kind each, which vectorise
      const float* values = bias->table + head * bias->table_len;
      const int64_t at = q - bias->table_first, most = bias->table_len - 1;
      for (int64_t c = 0; c < count; ++c) row[c] = values[iclamp(at - keys[c], 0, most)];
    } else {
      fill(row, 0.0F, count);
    }
    if (bias->slope) {
      const float m = slope();
      const bool is_signed = bias->slope_signed;
      for (int64_t c = 0; c < count; ++c) {
        const int64_t d = q - keys[c];
        row[c] -= m * static_cast<float>(is_signed || d >= 0 ? d : -d);
      }
    }
    fill(row + count, count ? row[count - 1] : 0.0F, n - count);
    return row;
  }

  const float* psi_row(int64_t i, int64_t j, int64_t n) const {
    if (!positions()) return psi + (j - i - base);
    int64_t q = query_position(i), last = s->k_len - 1 - j;
    const int64_t* keys = key_positions(j);
    for (int64_t c = 0; c < n; ++c) row[ROW_MAX + c] = bias->psi[psi_index(q - keys[imin(c, last)])];
    return row + ROW_MAX;
  }

  float row_scale(int64_t i) const { return scales[i - area.i0]; }

  const float* segment_slope() const { return bias->segment_slope + head * (bias->n_knots + 1); }
  const float* segment_intercept() const { return bias->segment_intercept + head * (bias->n_knots + 1); }

  // The segments that y = psi * row scale reaches over NR keys.
  struct Reach {
    int64_t first = 0, last = 0;
  };
  // Those of a block of rows and n keys, found once for the whole block: a wider reach is exact too. A tile belongs to
  // one thread.
  struct Reaches {
    int64_t block = -1, j = -1, n = 0;
    Reach at[ROW_MAX / NR];
  };
  mutable Reaches reaches;

  // `reach` is a hint on entry: where one row or tile ended, the next is seldom far.
  void find_reach(float low, float high, Reach& reach) const {
    int64_t m = reach.first;
    while (m < bias->n_knots && bias->knots[m] < low) ++m;
    while (m > 0 && !(bias->knots[m - 1] < low)) --m;
    reach.first = m;
    while (m < bias->n_knots && bias->knots[m] < high) ++m;
    reach.last = m;
  }

  // Of row i over keys j .. j + n, NR at a time; `values` is its psi_row.
  const Reach* find_reaches(const float* values, int64_t i, int64_t j, int64_t n) const {
    const int64_t block = i / block_rows * block_rows, ahead = j - reaches.j;
    if (!positions() && reaches.block == block && ahead >= 0 && ahead % NR == 0 && ahead + n <= reaches.n)
      return reaches.at + ahead / NR;
    const int64_t i0 = positions() ? i : imax(block, area.i0),
                  i1 = positions() ? i + 1 : imin(block + block_rows, area.i1);
    float scale_low = row_scale(i0), scale_high = scale_low;
    for (int64_t r = i0 + 1; r < i1; ++r) {
      const float scale = row_scale(r);
      scale_low = scale < scale_low ? scale : scale_low;
      scale_high = scale > scale_high ? scale : scale_high;
    }
    Reach reach = reaches.at[0];
    for (int64_t c = 0; c < n; c += NR) {
      float low, high;
      if (positions()) {
        low = high = values[c];
        for (int64_t v = 1; v < NR; ++v) {
          low = fmin2(low, values[c + v]);
          high = fmax2(high, values[c + v]);
        }
      } else {  // NR keys of the first row and of the last overlap, so they cover those of the rows between
        const int64_t x = j + c - i0 - base, y = j + c - (i1 - 1) - base;
        low = fmin2(psi_low[x], psi_low[y]);
        high = fmax2(psi_high[x], psi_high[y]);
      }
      const float a = low * scale_low, b = low * scale_high, d = high * scale_low, e = high * scale_high;
      find_reach(fmin2(fmin2(a, b), fmin2(d, e)), fmax2(fmax2(a, b), fmax2(d, e)), reach);
      reaches.at[c / NR] = reach;
    }
    reaches.block = block, reaches.j = j, reaches.n = n;
    return reaches.at;
  }

  // x = x * mul + profile over n keys (a multiple of VL) from j of row i; returns the running maximum.
  vf add_profile(float* x, int64_t i, int64_t j, int64_t n, float mul) const {
    const float *slopes = segment_slope(), *intercepts = segment_intercept(), *knots = bias->knots;
    const float* values = psi_row(i, j, round_up(n, NR));
    const Reach* reach = find_reaches(values, i, j, n);
    const float scale = row_scale(i);
    vf most = set1(NEG_INF), times = set1(mul), vscale = set1(scale);
    for (int64_t c = 0; c < n;) {
      const auto [first, last] = reach[c / NR];
      int64_t end = c + NR;
      const vf steep = set1(slopes[first] * scale), level = set1(intercepts[first]);
      if (first == last) {
        // Far from the diagonal many tiles lie in one segment.
        while (end < n && reach[end / NR].first == first && reach[end / NR].last == first) end += NR;
        for (end = imin(end, n); c < end; c += VL) {
          const vf value = fma(load(x + c), times, fma(load(values + c), steep, level));
          store(x + c, value);
          most = max(most, value);
        }
        continue;
      }
      for (end = imin(end, n); c < end; c += VL) {
        const vf psi_c = load(values + c), y = psi_c * vscale;
        vf value = fma(psi_c, steep, level);
        for (int64_t m = first; m < last; ++m)
          value = y > set1(knots[m]) ? fma(y, set1(slopes[m + 1]), set1(intercepts[m + 1])) : value;
        value = fma(load(x + c), times, value);
        store(x + c, value);
        most = max(most, value);
      }
    }
    return most;
  }

  // A decay c_i - c_j as two numbers that float32 can hold where their sum weighs anything: what keys j .. j + n have
  // over the first row of row i's block, and what the row has over that. c itself may be large.
  struct Decayed {
    int64_t block = -1, j = -1, n = 0;
  };
  mutable Decayed decayed;

  const double* decay_queries() const { return bias->decay_q + (s->b * p->heads + head) * p->q_len + s->q0; }
  const double* decay_keys() const { return bias->decay_k + (s->b * p->heads + head) * p->k_len + s->k0; }

  const float* decay_columns(int64_t i, int64_t j, int64_t n) const {
    const int64_t block = i / block_rows * block_rows, ahead = j - decayed.j;
    if (decayed.block == block && ahead >= 0 && ahead + n <= decayed.n) return decay + ahead;
    const int64_t count = imax(imin(n, s->k_len - j), 0);
    const double from = decay_queries()[block];
    const double* keys = decay_keys() + j;
    for (int64_t c = 0; c < count; ++c) decay[c] = static_cast<float>(from - keys[c]);
    fill(decay + count, 0.0F, n - count);
    decayed = {block, j, n};
    return decay;
  }
  // Rows i .. i + n of one block; those past the sequence's last are as the last.
  void decay_rows(float* rows, int64_t i, int64_t n) const {
    const double *queries = decay_queries() + i, *from = decay_queries() + i / block_rows * block_rows;
    const int64_t count = imin(n, s->q_len - i);
    for (int64_t r = 0; r < count; ++r) rows[r] = static_cast<float>(queries[r] - *from);
    fill(rows + count, rows[count - 1], n - count);
  }

  vf add_decay(float* x, int64_t i, int64_t j, int64_t n, float mul) const {
    const float* columns = decay_columns(i, j, n);
    float of_row;
    decay_rows(&of_row, i, 1);
    vf most = set1(NEG_INF), times = set1(mul), row_part = set1(of_row);
    for (int64_t c = 0; c < n; c += VL) {
      const vf value = fma(load(x + c), times, load(columns + c) + row_part);
      store(x + c, value);
      most = max(most, value);
    }
    return most;
  }

  vf add_relative(float* x, int64_t i, int64_t j, int64_t n, float mul) const {
    const float* values = relative_row(i, j, n);
    vf most0 = set1(NEG_INF), most1 = most0, times = set1(mul);
    int64_t c = 0;
    for (; c + 2 * VL <= n; c += 2 * VL) {
      vf a = fma(load(x + c), times, load(values + c));
      vf b = fma(load(x + c + VL), times, load(values + c + VL));
      store(x + c, a);
      store(x + c + VL, b);
      most0 = max(most0, a);
      most1 = max(most1, b);
    }
    for (; c < n; c += VL) {
      vf a = fma(load(x + c), times, load(values + c));
      store(x + c, a);
      most0 = max(most0, a);
    }
    return max(most0, most1);
  }

  void add_dense(float* x, int64_t i, int64_t j, int64_t n, float mul) const {
    const int64_t count = imin(n, s->k_len - j), key = bias->dense_key, bytes = bias->dense.dtype == DType::f32 ? 4 : 2;
    const char* from = row_pointer(bias->dense, s->b, head, s->q0 + i) + (s->k0 + j) * key * bytes;
    if (key == 1)
      load_floats(row, from, bias->dense.dtype, count);
    else
      for (int64_t c = 0; c < count; ++c) load_floats(row + c, from + c * key * bytes, bias->dense.dtype, 1);
    for (int64_t c = 0; c < count; ++c) {
      const float value = x[c] * mul + row[c];
      x[c] = value < FLOOR && value > NEG_INF ? FLOOR : value;
    }
    for (int64_t c = count; c < n; ++c) x[c] = x[c] * mul;
  }

  // x * mul + all operands, and the maximum of that; without an operand x stays as it is and so does its maximum.
  vf add(float* x, int64_t i, int64_t j, int64_t n, float mul) const {
    if (bias->dense) add_dense(x, i, j, n, mul), mul = 1.0F;
    return add_smooth(x, i, j, n, mul);
  }

  // The same without the dense operand.
  vf add_smooth(float* x, int64_t i, int64_t j, int64_t n, float mul) const {
    if (bias->decay_k) {
      const vf most = add_decay(x, i, j, n, mul);
      if (!bias->psi && !bias->relative()) return most;
      mul = 1.0F;
    }
    if (bias->psi && bias->relative()) add_profile(x, i, j, n, mul), mul = 1.0F;
    if (bias->relative()) return add_relative(x, i, j, n, mul);
    if (bias->psi) return add_profile(x, i, j, n, mul);
    vf most = set1(NEG_INF);
    for (int64_t c = 0; c < n; c += VL) most = max(most, load(x + c));
    return most;
  }
};

}  // namespace posattn::POSATTN_ISA
