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
  float* lanes = nullptr;                                      // [n_knots + 1][2][VL]: what `profile` has still to get
  int pending = 0;                                             // rows in `lanes`, and the segments that they touched
  int64_t touched_first = 0, touched_last = -1;
  double slope_sum = 0.0;
  float *dense_rows = nullptr, *dense_keys = nullptr;  // of a dense bias that broadcasts over keys, over rows
  float *decay_rows = nullptr, *decay_keys = nullptr;  // of a decay's two parts, a head's

  void layout(Arena& arena, const Problem& p, const Bias& b, int64_t n_rows, int64_t n_keys) {
    if (b.grad_dense && b.grad_dense_key == 0)
      dense_rows = arena.floats(n_rows);
    else if (b.grad_dense && b.grad_dense_row == 0)
      dense_keys = arena.floats(n_keys + PAD);
    if (b.grad_decay_k) decay_rows = arena.floats(n_rows), decay_keys = arena.floats(n_keys + PAD);
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
      lanes = arena.floats(2 * VL * (b.n_knots + 1));
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
    if (profile) {
      fill(lanes, 0.0F, 2 * VL * (b.n_knots + 1));
      touched_first = 0, touched_last = -1;
      settle();
      for (int64_t m = 0; m < 2 * (b.n_knots + 1); ++m) profile[m] = 0.0;
    }
    slope_sum = 0.0;
    if (dense_rows) fill(dense_rows, 0.0F, of.area.i1 - of.area.i0);
    if (dense_keys) fill(dense_keys, 0.0F, of.area.j1 - of.area.j0 + PAD);
    if (decay_rows) fill(decay_rows, 0.0F, of.area.i1 - of.area.i0);
    if (decay_keys) fill(decay_keys, 0.0F, of.area.j1 - of.area.j0 + PAD);
  }

  bool any() const {
    const Bias& b = *tile->bias;
    return b.wants_relative() || b.wants_profile() || b.grad_dense || b.grad_decay_k;
  }

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
    if (decay_keys) {
      float* sum = decay_keys + (j - tile->area.j0);
      vf of_row = zero();
      for (int64_t c = 0; c < n; c += VL) {
        const vf d = load(ds + c);
        of_row += d;
        store(sum + c, load(sum + c) - d);
      }
      decay_rows[i - tile->area.i0] += reduce_add(of_row);
    }
    if (dense_rows) {
      vf sum = zero();
      for (int64_t c = 0; c < n; c += VL) sum += load(ds + c);
      dense_rows[i - tile->area.i0] += reduce_add(sum);
    } else if (dense_keys) {
      float* sum = dense_keys + (j - tile->area.j0);
      for (int64_t c = 0; c < n; c += VL) store(sum + c, load(sum + c) + load(ds + c));
    } else if (b.grad_dense) {
      float* out = dense_at(i, j);
      const int64_t count = imin(n, tile->s->k_len - j);
      for (int64_t c = 0; c < count; ++c) out[c] += ds[c];
    }
  }

  float* dense_at(int64_t i, int64_t j) const {
    const Bias& b = *tile->bias;
    const Sequence& s = *tile->s;
    return b.grad_dense + s.b * b.grad_dense_batch + tile->head * b.grad_dense_head + (s.q0 + i) * b.grad_dense_row +
           (s.k0 + j) * b.grad_dense_key;
  }

  void add_relative_at_positions(const float* ds, int64_t i, int64_t j, int64_t n) {
    const Bias& b = *tile->bias;
    const int64_t q = tile->query_position(i), count = imin(n, tile->s->k_len - j);
    const int64_t* keys = tile->key_positions(j);
    if (table) {
      const int64_t at = q - b.table_first, most = b.table_len - 1;
      for (int64_t c = 0; c < count; ++c) table[iclamp(at - keys[c], 0, most)] += ds[c];
    }
    for (int64_t c = 0; b.grad_slope && c < count; ++c) {
      const int64_t d = q - keys[c];
      slope_sum -= static_cast<double>(ds[c]) * static_cast<double>(b.slope_signed || d >= 0 ? d : -d);
    }
  }

  // With y = psi * scale in segment m: dA[m] += dS y, dC[m] += dS, dpsi += dS A[m] scale, dscale += dS A[m] psi.
  // Keys that reach several segments hand on what lies past each knot: each segment's sums are its own, since
  // differences of sums would drown a steep segment's few keys in what all the others add up to.
  void add_profile(const float* ds, int64_t i, int64_t j, int64_t n) {
    const Bias& b = *tile->bias;
    const float *values = tile->psi_row(i, j, round_up(n, NR)), *slopes = tile->segment_slope();
    const auto* reach = tile->find_reaches(values, i, j, n);
    const float scale = tile->row_scale(i);
    alignas(64) float gradient[ROW_MAX];
    vf to_scale = zero();
    for (int64_t c = 0; c < n;) {
      const auto [first, last] = reach[c / NR];
      int64_t end = c + NR;
      if (first == last)
        while (end < n && reach[end / NR].first == first && reach[end / NR].last == first) end += NR;
      end = imin(end, n);
      if (first == last) {
        vf sum = zero(), moment = zero();
        for (int64_t v = c; v < end; v += VL) {
          const vf d = load(ds + v);
          sum += d;
          moment = fma(d, load(values + v), moment);
          store(gradient + v, d * set1(slopes[first]));
        }
        add_to_segment(first, sum, moment, scale);
        to_scale = fma(moment, set1(slopes[first]), to_scale);
      } else {
        vf left[NR / VL];
        for (int64_t v = c; v < end; v += VL) left[(v - c) / VL] = load(ds + v);
        for (int64_t m = first; m <= last; ++m) {
          vf sum = zero(), moment = zero();
          const vf knot = set1(m < last ? b.knots[m] : -NEG_INF), slope = set1(slopes[m]);
          for (int64_t v = c; v < end; v += VL) {
            vf& rest = left[(v - c) / VL];
            const vf psi_v = load(values + v);
            const vi past = psi_v * scale > knot;
            const vf here = past ? zero() : rest;
            sum += here;
            moment = fma(here, psi_v, moment);
            store(gradient + v, m == first ? here * slope : fma(here, slope, load(gradient + v)));
            rest = past ? rest : zero();
          }
          add_to_segment(m, sum, moment, scale);
          to_scale = fma(moment, slope, to_scale);
        }
      }
      c = end;
    }
    add_to_psi(gradient, scale, i, j, n);
    rows[iclamp(tile->query_position(i) - b.row_first, 0, b.row_len - 1)] += reduce_add(to_scale);
    if (++pending == PENDING_ROWS) settle();
  }

  // `gradient` is that of y.
  void add_to_psi(const float* gradient, float scale, int64_t i, int64_t j, int64_t n) {
    if (psi) {
      float* sums = psi + (j - i - tile->base);
      for (int64_t v = 0; v < n; v += VL) store(sums + v, fma(load(gradient + v), set1(scale), load(sums + v)));
    } else {
      const int64_t q = tile->query_position(i), valid = imin(n, tile->s->k_len - j);
      const int64_t* keys = tile->key_positions(j);
      for (int64_t v = 0; v < valid; ++v) psi_table[tile->psi_index(q - keys[v])] += gradient[v] * scale;
    }
  }

  // Segments are summed lane by lane over a few rows, then in float64.
  static constexpr int PENDING_ROWS = 48;

  void add_to_segment(int64_t m, vf sum, vf moment, float scale) {
    float* at = lanes + 2 * VL * m;
    store(at, load(at) + sum);
    store(at + VL, fma(moment, set1(scale), load(at + VL)));
    touched_first = imin(touched_first, m), touched_last = imax(touched_last, m);
  }

  void settle() {
    double *to_slope = profile, *to_intercept = profile + tile->bias->n_knots + 1;
    for (int64_t m = touched_first; m <= touched_last; ++m) {
      float* at = lanes + 2 * VL * m;
      to_intercept[m] += reduce_add(load(at));
      to_slope[m] += reduce_add(load(at + VL));
      fill(at, 0.0F, 2 * VL);
    }
    pending = 0, touched_first = tile->bias->n_knots + 1, touched_last = -1;
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
    const Rectangle& area = tile->area;
    if (dense_rows)
      for (int64_t i = area.i0; i < area.i1; ++i) *dense_at(i, area.j0) += dense_rows[i - area.i0];
    if (dense_keys)
      for (int64_t j = area.j0; j < area.j1; ++j) *dense_at(area.i0, j) += dense_keys[j - area.j0];
    if (decay_keys) {
      // A row's share is known (what moves its log-sum-exp), and yet it is summed: a gate's gradient is the difference
      // of rows and keys on one side of it, in which the errors of the same dS cancel.
      const int64_t sequence_head = tile->s->b * tile->p->heads + head;
      float* to_keys = b.grad_decay_k + sequence_head * tile->p->k_len + tile->s->k0;
      float* to_rows = b.grad_decay_q + sequence_head * tile->p->q_len + tile->s->q0;
      for (int64_t j = area.j0; j < area.j1; ++j) to_keys[j] += decay_keys[j - area.j0];
      for (int64_t i = area.i0; i < area.i1; ++i) to_rows[i] += decay_rows[i - area.i0];
    }
    if (b.grad_slope) b.grad_slope[tile->s->b * tile->p->heads + head] += static_cast<float>(slope_sum);
    if (!profile) return;
    settle();
    for (int64_t m = 0; m <= b.n_knots; ++m) {
      const int64_t at = head * (b.n_knots + 1) + m;
      if (b.grad_segment_slope) b.grad_segment_slope[at] += static_cast<float>(profile[m]);
      if (b.grad_segment_intercept) b.grad_segment_intercept[at] += static_cast<float>(profile[b.n_knots + 1 + m]);
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
