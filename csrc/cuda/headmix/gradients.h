// Gradients of a bias's operands, added up in global memory over all blocks of keys.
#pragma once
#include "common/global_sums.h"
#include "headmix/bias.h"

namespace posattn::headmix {

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

// Adds the gradient g of one logit to what it depends on; returns what the slope's sum takes. row: the query's, padded.
template <class Kind>
__device__ __forceinline__ float add_gradient(const BiasGradParams& to, const BiasParams& p, int batch, int h,
                                              int64_t row, const Pair& at, float g) {
  const int64_t d = at.distance();
  const auto add = [&](void* sums, int64_t entry, float x) { GlobalSums(sums, to.units).add(entry, x); };
  if constexpr (Kind::TABLE) {
    if (to.table) {
      const int64_t entries = p.table_last - p.table_first + 1;
      add(to.table, h * entries + RowBias::clamped(d, p.table_first, p.table_last), g);
    }
  }
  if constexpr (Kind::PROFILE) {
    const int entry = RowBias::clamped(d, p.psi_first, p.psi_last);
    const float psi = p.psi[entry], scale = p.row_scale[RowBias::clamped(at.query, p.row_first, p.row_last)];
    const int segment = segment_of(p, psi * scale);
    const float steep = p.segment_slope[h * (p.num_knots + 1) + segment];
    if (to.psi) add(to.psi, entry, g * steep * scale);
    if (to.row_scale) {
      const int line = h * 2 * (p.num_knots + 1) + segment;
      add(to.row_scale, row, g * steep * psi);
      add(to.segments, line, g);
      add(to.segments, line + p.num_knots + 1, g * psi * scale);
    }
  }
  if constexpr (Kind::DENSE_TYPE != NO_DENSE) {
    if (to.dense) add(to.dense, pair_offset(to.dense_strides, batch, h, at.i, at.j), g);
  }
  return Kind::SLOPE ? -g * static_cast<float>(Kind::SIGN || d >= 0 ? d : -d) : 0.0f;
}

}  // namespace posattn::headmix
