// The logits of MR rows over a tile of keys. Where all that a product gets is a bias along its diagonal, it gets it and
// its row's maximum while it is still in a register; masks, softcaps and whatever lies in a matrix take a second pass.
#pragma once

#include "reach.h"

namespace posattn::POSATTN_ISA {

// What a panel's products become on their way to memory: `r` counts rows, `c` keys from the panel's first on. A bias of
// the distance is a contiguous load, a row's one entry before the row above's.
struct NoBias {
  POSATTN_INLINE vf operator()(int, int, vf x) const { return x; }
};

struct RelativeBias {
  const float* values;
  vf times;
  POSATTN_INLINE vf operator()(int r, int c, vf x) const { return fma(x, times, load(values - r + c)); }
};

struct SegmentBias {
  const float *psi, *steep;  // steep [MR]: the segment's slope times each row's scale
  vf times, level;
  POSATTN_INLINE vf operator()(int r, int c, vf x) const {
    return fma(x, times, fma(load(psi - r + c), set1(steep[r]), level));
  }
};

// The same where the panel reaches more segments: past each knot, the line of the segment there. A line bent by changes
// of slope would cancel where a steep segment lies before a flat one.
struct KnotBias {
  SegmentBias before;
  const float *scales, *knots, *slopes, *intercepts;  // slopes and intercepts: of the segments past each knot
  int64_t n_knots;
  POSATTN_INLINE vf operator()(int r, int c, vf x) const {
    const vf psi = load(before.psi - r + c), y = psi * set1(scales[r]);
    vf value = fma(psi, set1(before.steep[r]), before.level);
    for (int64_t m = 0; m < n_knots; ++m)
      value = y > set1(knots[m]) ? fma(y, set1(slopes[m]), set1(intercepts[m])) : value;
    return fma(x, before.times, value);
  }
};

// columns: what each key has; rows [rows of a block]: what each row has.
struct DecayBias {
  const float *columns, *rows;
  vf times;
  POSATTN_INLINE vf operator()(int r, int c, vf x) const { return fma(x, times, load(columns + c) + set1(rows[r])); }
};

// One panel of keys whole, and the running maxima [MR][VL] of its logits.
template <class M, class Finish>
inline void finished_panel(const float* q, int64_t q_row, const float* k, float* x, int64_t x_row, int64_t depth,
                           float* most, const Finish& finish) {
  vf acc[MR][NV_MAX] = {};
  accumulate<M>(acc, q, q_row, 1, k, NR, depth);
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    vf top = load(most + r * VL);
#pragma GCC unroll 8
    for (int v = 0; v < NV_MAX; ++v) {
      const vf value = finish(r, v * VL, acc[r][v]);
      store(x + r * x_row + v * VL, value);
      top = max(top, value);
    }
    store(most + r * VL, top);
  }
}

// Whether all that a product gets, beside masks, is a scale above zero and at most one bias, along its diagonal or of
// its keys.
inline bool is_simple(const Problem& p, float scale) {
  const int kinds = (p.bias.psi != nullptr) + p.bias.relative() + (p.bias.decay_k != nullptr);
  return scale > 0.0F && !(p.softcap > 0.0F) && !p.bias.dense && !p.q_positions && kinds <= 1;
}

// Rows i .. i + count - 1 (at most M::rows) over keys j0 + begin .. j0 + end of a tile whose panels are `k`.
template <class M>
struct Scores {
  const Problem& p;
  const Sequence& s;
  const BiasTile& bias;
  const float* q;  // [M::rows][q_row]
  int64_t q_row;
  const float* k;
  int64_t depth, panel;
  float scale;  // of the products
  int64_t i, count, j0, begin, end;

  // Rows past `count` have no entries in the bias.
  bool simple() const { return count == M::rows && is_simple(p, scale) && (!p.boolean || p.reach); }

  // x [M::rows][ROW_MAX] by tile, each row's maximum, and what the logits of all rows must still be multiplied with.
  float run(float* x, float* most) const {
    alignas(64) float tops[M::rows * VL], steep[M::rows], scales[M::rows], decayed[M::rows];
    fill(tops, NEG_INF, M::rows * VL);
    const bool decays = bias.bias->decay_k != nullptr;
    const bool fast = !M::tiles && simple() && (!decays || i % bias.block_rows == 0), segments = fast && bias.bias->psi;
    const Interval first = allowed(p, s, i), last = allowed(p, s, i + count - 1);
    const float* psi = segments ? bias.psi_row(i, j0 + begin, end - begin) - begin : nullptr;
    const auto* reach = segments ? bias.find_reaches(psi + begin, i, j0 + begin, end - begin) : nullptr;
    const vf times = set1(scale);
    int64_t segment = -1;
    for (int r = 0; segments && r < M::rows; ++r) scales[r] = bias.row_scale(i + r);
    const float* columns = decays ? bias.decay_columns(i, j0 + begin, end - begin) - begin : nullptr;
    if (fast && decays) bias.decay_rows(decayed, i, M::rows);
    bool second[ROW_MAX / NR];  // panels that a second pass completes

    for (int64_t c = begin; c < end; c += NR) {
      const float* keys = k + c / NR * panel;
      const int64_t n = (c - begin) / NR;
      second[n] = !fast || c + NR > end || j0 + c < last.lo || j0 + c + NR > first.hi ||
                  shown(p, s, bias.head, i, i + count, j0 + c) != Shown::all;
      if (second[n]) {
        gemm_rows<M, Into::fresh>(q, q_row, 1, keys, NR, x + c, ROW_MAX, depth, imin(NR, end - c) / VL);
        continue;
      }
      if constexpr (!M::tiles) {
        if (segments) {
          if (reach[n].first != segment) {
            segment = reach[n].first;
            for (int r = 0; r < M::rows; ++r) steep[r] = bias.segment_slope()[segment] * scales[r];
          }
          const SegmentBias before{psi + c, steep, times, set1(bias.segment_intercept()[segment])};
          const int64_t knots = reach[n].last - segment;
          if (knots == 0)
            finished_panel<M>(q, q_row, keys, x + c, ROW_MAX, depth, tops, before);
          else
            finished_panel<M>(q, q_row, keys, x + c, ROW_MAX, depth, tops,
                              KnotBias{before, scales, bias.bias->knots + segment, bias.segment_slope() + segment + 1,
                                       bias.segment_intercept() + segment + 1, knots});
        } else if (decays) {
          finished_panel<M>(q, q_row, keys, x + c, ROW_MAX, depth, tops, DecayBias{columns + c, decayed, times});
        } else if (bias.bias->relative()) {
          finished_panel<M>(q, q_row, keys, x + c, ROW_MAX, depth, tops,
                            RelativeBias{bias.relative_row(i, j0 + c, NR), times});
        } else {
          finished_panel<M>(q, q_row, keys, x + c, ROW_MAX, depth, tops, NoBias{});
        }
      }
    }

    float left = fast && bias.bias->any() ? 1.0F : scale;
    for (int64_t r = 0; r < count; ++r) {
      vf top = load(tops + r * VL);
      for (int64_t c = begin; c < end;) {
        int64_t to = c;
        while (to < end && second[(to - begin) / NR]) to += NR;
        if (to > c) {
          float mul = scale;
          const int64_t n = imin(to, end) - c;
          top = max(top, finish_row(p, s, bias, x + r * ROW_MAX + c, i + r, allowed(p, s, i + r), j0 + c, n, mul));
          left = mul;
        }
        c = to + NR;
      }
      most[r] = reduce_max(top);
    }
    return left;
  }
};

}  // namespace posattn::POSATTN_ISA
