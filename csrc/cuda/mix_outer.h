// The bias that is added after the MLP, one logit at a time: plans with both are rare, so it is kept small, not fast.
#pragma once
#include "bias_gather.h"
#include "dense.h"
#include "mix_tile.h"

namespace posattn::mix {

constexpr bool HAS_OUTER = OUTER_SLOPE || OUTER_TABLE || OUTER_PROFILE || OUTER_DENSE != NO_DENSE;

__device__ __forceinline__ float outer_dense(const void* bias, int64_t at) {
  if constexpr (OUTER_DENSE == DENSE_FLOAT32) return static_cast<const float*>(bias)[at];
  const uint16_t x = static_cast<const uint16_t*>(bias)[at];
  return OUTER_DENSE == DENSE_FLOAT16 ? ptx::cvt_f32_f16(x) : bf16_to_float(x);
}

// Knots below y, of p.num_knots ascending ones.
__device__ __forceinline__ int segment_of(const BiasParams& p, float y) {
  int low = 0, high = p.num_knots;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (p.knots[middle] < y) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Rows and keys past the end are taken as the last one.
__device__ __forceinline__ float outer_at(const BiasParams& p, const PositionParams& positions, const Sequence& s,
                                          int h, int i, int j) {
  i = min(i, s.q_len - 1);
  j = min(j, s.k_len - 1);
  const int64_t query = EXPLICIT ? positions.q[s.batch * positions.q_batch + s.q_start + i] : i + s.shift();
  const int64_t d = query - (EXPLICIT ? positions.k[s.batch * positions.k_batch + s.k_start + j] : j);
  float bias = 0.0f;
  if constexpr (OUTER_SLOPE) {
    bias = -p.slope[s.batch * p.slope_batch + h] * static_cast<float>(OUTER_SIGNED || d >= 0 ? d : -d);
  }
  if constexpr (OUTER_TABLE) bias += p.table[h * p.table_head + RowBias::clamped(d, p.table_first, p.table_last)];
  if constexpr (OUTER_PROFILE) {
    const float y = p.psi[RowBias::clamped(d, p.psi_first, p.psi_last)] *
                    p.row_scale[RowBias::clamped(query, p.row_first, p.row_last)];
    const int at = h * (p.num_knots + 1) + segment_of(p, y);
    bias += fmaf(p.segment_slope[at], y, p.segment_intercept[at]);
  }
  if constexpr (OUTER_DENSE != NO_DENSE) {
    bias += outer_dense(p.dense, pair_offset(p.dense_strides, s.batch, h, s.q_start + i, s.k_start + j));
  }
  return bias;
}

// Where a lane's logits lie is logits.h's Place: rows row + 8 a, columns column + 8 n + e. s is in base 2.
__device__ __forceinline__ void add_outer(float (&s)[GROUPS][N8][4], const BiasParams& p,
                                          const PositionParams& positions, const Sequence& sequence, int h, int row,
                                          int column) {
  if constexpr (HAS_OUTER) {
#pragma unroll
    for (int x = 0; x < GROUPS * N8 * 4; ++x) {
      const int r = x / 4 / N8, n = x / 4 % N8, e = x % 4;
      const int i = row + 16 * r + e / 2 * 8, j = column + 8 * n + e % 2;
      s[r][n][e] = fmaf(outer_at(p, positions, sequence, h, i, j), LOG2E, s[r][n][e]);
    }
  }
}

}  // namespace posattn::mix
