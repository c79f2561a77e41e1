// The additive operands of a plan one logit at a time, read from global memory: for explicit positions, whose distances
// follow no pattern, and for tiles whose rows belong to several heads.
#pragma once
#include "common/mask.h"
#include "ptx/ptx.h"

namespace posattn {

constexpr bool BY_DISTANCE = HAS_SLOPE || HAS_TABLE || HAS_PROFILE;

// One query row of one head.
struct RowBias {
  int64_t position = 0;
  float slope = 0.0f;
  float row_scale = 0.0f;
  const float* table = nullptr;
  const float* slopes = nullptr;
  const float* intercepts = nullptr;

  // i counts inside the sequence and is inside it.
  __device__ __forceinline__ void start(const BiasParams& p, const PositionParams& positions, const Sequence& s, int b,
                                        int h, int i) {
    position = EXPLICIT ? positions.q[b * positions.q_batch + s.q_start + i] : i + s.offset();
    if constexpr (HAS_SLOPE) slope = p.slope[b * p.slope_batch + h];
    if constexpr (HAS_TABLE) table = p.table + h * p.table_head;
    if constexpr (HAS_PROFILE) {
      row_scale = p.row_scale[clamped(position, p.row_first, p.row_last)];
      slopes = p.segment_slope + static_cast<int64_t>(h) * (KNOTS + 1);
      intercepts = p.segment_intercept + static_cast<int64_t>(h) * (KNOTS + 1);
    }
  }

  __device__ static __forceinline__ int clamped(int64_t x, int first, int last) {
    return static_cast<int>(min(max(x, static_cast<int64_t>(first)), static_cast<int64_t>(last)) - first);
  }

  // The bias towards a key at position `key`.
  __device__ __forceinline__ float at(const BiasParams& p, int64_t key) const {
    const int64_t d = position - key;
    float bias = 0.0f;
    if constexpr (HAS_SLOPE) bias = -slope * static_cast<float>(SIGNED || d >= 0 ? d : -d);
    if constexpr (HAS_TABLE) bias += ptx::ld_global_nc(table + clamped(d, p.table_first, p.table_last));
    if constexpr (HAS_PROFILE) {
      const float y = ptx::ld_global_nc(p.psi + clamped(d, p.psi_first, p.psi_last)) * row_scale;
      int segment = 0;  // knots below y; the last `left` ones after it are not yet compared
      for (int left = KNOTS; left > 0;) {
        const int half = (left + 1) / 2;
        if (p.knots[segment + half - 1] < y) {
          segment += half;
          left -= half;
        } else {
          left = half - 1;
        }
      }
      bias += fmaf(slopes[segment], y, intercepts[segment]);
    }
    return bias;
  }
};

__device__ __forceinline__ int64_t key_position(const PositionParams& positions, const Sequence& s, int b, int j) {
  return EXPLICIT ? positions.k[b * positions.k_batch + s.k_start + j] : j;
}

}  // namespace posattn
