// Gradients of the additive operands. A distance's gradient is the sum of dS along a diagonal: with the reversed layout
// of bias.h that is a contiguous vector add per row. Sums stay in the task's own memory until `flush`, which tasks call
// one after the other.
#pragma once

#include "bias.h"

namespace posattn::POSATTN_ISA {

struct BiasGrad {
  const BiasTile* tile = nullptr;
  float *relative = nullptr, *psi = nullptr, *rows = nullptr;  // by j - i - base; psi likewise; rows by query position
  float *table = nullptr, *psi_table = nullptr;                // explicit positions: by entry of the operand
  double* profile = nullptr;                                   // [2][n_knots + 1]: slope, then intercept
  double slope_sum = 0.0;

  void layout(Arena& arena, const Problem& p, const Bias& b, int64_t n_rows, int64_t n_keys) {
    const int64_t n = BiasTile::capacity(n_rows, n_keys);
    const bool positions = p.q_positions != nullptr;
    if (b.wants_relative() && !positions) relative = arena.floats(n);
    if (b.grad_table && positions) table = arena.floats(b.table_len);
    if (b.wants_profile()) {
      if (positions)
        psi_table = arena.floats(b.psi_len);
      else
        psi = arena.floats(n);
      rows = arena.floats(b.row_len);
      profile = reinterpret_cast<double*>(arena.floats(4 * (b.n_knots + 1)));
    }
  }

  // Before each head; psi and the row scale belong to all heads, so their sums run on through a task's heads.
  void clear(const BiasTile& of, bool first_head) {
    tile = &of;
    const Bias& b = *of.bias;
    const int64_t padded = of.length + PAD;
    if (relative) fill(relative, 0.0F, padded);
    if (table) fill(table, 0.0F, b.table_len);
    if (first_head) {
      if (psi) fill(psi, 0.0F, padded);
      if (psi_table) fill(psi_table, 0.0F, b.psi_len);
      if (rows) fill(rows, 0.0F, b.row_len);
    }
    if (profile)
      for (int64_t m = 0; m < 2 * (b.n_knots + 1); ++m) profile[m] = 0.0;
    slope_sum = 0.0;
  }

  bool any() const { return tile->bias->wants_relative() || tile->bias->wants_profile() || tile->bias->grad_dense; }

  // dS over keys j .. j + n of row i, n a multiple of VL, zero where no key is allowed.
  void add(const float* ds, int64_t i, int64_t j, int64_t n) {
    const Bias& b = *tile->bias;
    if (relative) {
      float* sum = relative + (j - i - tile->base);
      for (int64_t c = 0; c < n; c += VL) store(sum + c, load(sum + c) + load(ds + c));
    } else if (b.wants_relative()) {
      add_relative_at_positions(ds, i, j, n);
    }
    if (profile) add_profile(ds, i, j, n);
    if (b.grad_dense) {
      const Sequence& s = *tile->s;
      float* out = b.grad_dense + s.b * b.grad_dense_batch + tile->head * b.grad_dense_head +
                   (s.q0 + i) * b.grad_dense_row + s.k0 + j;
      const int64_t count = imin(n, s.k_len - j);
      for (int64_t c = 0; c < count; ++c) out[c] += ds[c];
    }
  }

  void add_relative_at_positions(const float* ds, int64_t i, int64_t j, int64_t n) {
    const Bias& b = *tile->bias;
    const int64_t q = tile->query_position(i), count = imin(n, tile->s->k_len - j);
    const int64_t* keys = tile->key_positions(j);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t d = q - keys[c];
      if (table) table[iclamp(d - b.table_first, 0, b.table_len - 1)] += ds[c];
      slope_sum -= static_cast<double>(ds[c]) * static_cast<double>(b.slope_signed || d >= 0 ? d : -d);
    }
  }

  // With y = psi * scale in segment m: dA[m] += dS y, dC[m] += dS, dpsi += dS A[m] scale, dscale += dS A[m] psi.
  // Over NR keys the segments run from `first` to `last`; sums over y > knot give each segment's by difference.
  void add_profile(const float* ds, int64_t i, int64_t j, int64_t n) {
    const Bias& b = *tile->bias;
    const float *values = tile->psi_row(i, j, round_up(n, NR)), *slopes = tile->profile_slope();
    const float scale = tile->row_scale(i);
    double *to_slope = profile, *to_intercept = profile + b.n_knots + 1, to_scale = 0.0;
    alignas(64) float gradient[NR];
    int64_t first = tile->hint, last = 0;
    for (int64_t c = 0; c < n; c += NR) {
      const int64_t count = imin(n - c, NR);
      tile->segments(values + c, i, j + c, scale, first, last);
      vf sum = zero(), moment = zero();
      for (int64_t v = 0; v < count; v += VL) {
        vf d = load(ds + c + v);
        sum += d;
        moment = fma(d, load(values + c + v), moment);
        store(gradient + v, d * set1(slopes[first] * scale));
      }
      double above = reduce_add(sum), above_moment = reduce_add(moment);
      for (int64_t m = first; m <= last; ++m) {
        vf next = zero(), next_moment = zero();
        if (m < last) {
          const vf knot = set1(b.knots[m]), step = set1((slopes[m + 1] - slopes[m]) * scale);
          for (int64_t v = 0; v < count; v += VL) {
            vf psi_v = load(values + c + v), d = psi_v * scale > knot ? load(ds + c + v) : zero();
            next += d;
            next_moment = fma(d, psi_v, next_moment);
            store(gradient + v, fma(d, step, load(gradient + v)));
          }
        }
        const double beyond = m < last ? reduce_add(next) : 0.0,
                     beyond_moment = m < last ? reduce_add(next_moment) : 0.0;
        to_slope[m] += (above_moment - beyond_moment) * scale;
        to_intercept[m] += above - beyond;
        to_scale += (above_moment - beyond_moment) * slopes[m];
        above = beyond, above_moment = beyond_moment;
      }
      if (psi) {
        float* sums = psi + (j + c - i - tile->base);
        for (int64_t v = 0; v < count; v += VL) store(sums + v, load(sums + v) + load(gradient + v));
      } else {
        const int64_t q = tile->query_position(i), valid = imin(count, tile->s->k_len - j - c);
        const int64_t* keys = tile->key_positions(j + c);
        for (int64_t v = 0; v < valid; ++v) psi_table[tile->psi_index(q - keys[v])] += gradient[v];
      }
    }
    rows[iclamp(tile->query_position(i) - b.row_first, 0, b.row_len - 1)] += static_cast<float>(to_scale);
  }

  // After each head: adds its sums to the call's gradients. The caller holds the order.
  void flush(bool last_head) {
    const Bias& b = *tile->bias;
    const int64_t head = tile->head;
    if (relative) {
      for (int64_t x = 0; x < tile->length; ++x) {
        const int64_t d = tile->offset - tile->base - x;
        if (b.grad_table)
          b.grad_table[head * b.table_len + iclamp(d - b.table_first, 0, b.table_len - 1)] += relative[x];
        slope_sum -= static_cast<double>(relative[x]) * static_cast<double>(b.slope_signed || d >= 0 ? d : -d);
      }
    }
    if (table)
      for (int64_t x = 0; x < b.table_len; ++x) b.grad_table[head * b.table_len + x] += table[x];
    if (b.grad_slope) b.grad_slope[tile->s->b * tile->p->heads + head] += static_cast<float>(slope_sum);
    if (!profile) return;
    for (int64_t m = 0; m <= b.n_knots; ++m) {
      const int64_t at = head * (b.n_knots + 1) + m;
      if (b.grad_profile_slope) b.grad_profile_slope[at] += static_cast<float>(profile[m]);
      if (b.grad_profile_intercept) b.grad_profile_intercept[at] += static_cast<float>(profile[b.n_knots + 1 + m]);
    }
    if (!last_head) return;
    if (b.grad_psi) {
      if (psi)
        for (int64_t x = 0; x < tile->length; ++x) b.grad_psi[tile->psi_index(tile->offset - tile->base - x)] += psi[x];
      else
        for (int64_t x = 0; x < b.psi_len; ++x) b.grad_psi[x] += psi_table[x];
    }
    if (b.grad_row_scale)
      for (int64_t x = 0; x < b.row_len; ++x) b.grad_row_scale[x] += rows[x];
  }
};

}  // namespace posattn::POSATTN_ISA
