// Gradients of a bias's operands, added up in global memory over all blocks of keys.
//
// Additions come in any order. ORDERED: sums are integers then, in units so small that nothing is lost, and the order
// does not matter.
#pragma once
#include "mix_bias.h"

namespace posattn::mix {

// Of a lane's elements (n, e) of a transposed tile, by distance: (n - (e >> 1) + 1, e & 1).
using ByDistance = float[N8 + 1][2];

// f(x, c, step) for the entries [x][c] of a ByDistance; step: how much more than the first element's that distance is.
template <class F>
__device__ __forceinline__ void for_distances(F f) {
#pragma unroll
  for (int x = 0; x <= N8; ++x) {
#pragma unroll
    for (int c = 0; c < 2; ++c) f(x, c, 8 * (x - 1) + c);
  }
}

// sums[at] += x
__device__ __forceinline__ void add_sum(void* sums, int64_t at, float x, const float* units) {
  if constexpr (ORDERED) {
    ptx::red_add(static_cast<int64_t*>(sums) + at, __float2ll_rn(x * *units));
  } else {
    ptx::red_add(static_cast<float*>(sums) + at, x);
  }
}

// Adds the gradient g of one logit to what it depends on; returns what the slope's sum takes. row: the query's, padded.
template <class Kind>
__device__ __forceinline__ float add_gradient(const BiasGradParams& to, const BiasParams& p, int batch, int h,
                                              int64_t row, const Pair& at, float g) {
  const int64_t d = at.distance();
  if constexpr (Kind::TABLE) {
    if (to.table) {
      const int64_t entries = p.table_last - p.table_first + 1;
      add_sum(to.table, h * entries + RowBias::clamped(d, p.table_first, p.table_last), g, to.units);
    }
  }
  if constexpr (Kind::PROFILE) {
    const int entry = RowBias::clamped(d, p.psi_first, p.psi_last);
    const float psi = p.psi[entry], scale = p.row_scale[RowBias::clamped(at.query, p.row_first, p.row_last)];
    const int segment = segment_of(p, psi * scale);
    const float steep = p.segment_slope[h * (p.num_knots + 1) + segment];
    if (to.psi) add_sum(to.psi, entry, g * steep * scale, to.units);
    if (to.row_scale) {
      const int line = h * 2 * (p.num_knots + 1) + segment;
      add_sum(to.row_scale, row, g * steep * psi, to.units);
      add_sum(to.segments, line, g, to.units);
      add_sum(to.segments, line + p.num_knots + 1, g * psi * scale, to.units);
    }
  }
  if constexpr (Kind::DENSE_TYPE != NO_DENSE) {
    if (to.dense) add_sum(to.dense, pair_offset(to.dense_strides, batch, h, at.i, at.j), g, to.units);
  }
  return Kind::SLOPE ? -g * static_cast<float>(Kind::SIGN || d >= 0 ? d : -d) : 0.0f;
}

}  // namespace posattn::mix
