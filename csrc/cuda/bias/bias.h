// The additive operands of a plan that are functions of the distance, for implicit positions: Slope, Table, Profile.
//
// A lane holds logits at rows row + 8 a and columns column + 8 n + e (see common/softmax.h), whose distance from one
// another is 8 (a - n) - e: 2 (ROWS + N8 - 1) different ones for 2 ROWS N8 logits, 22 for 64. So values are computed or
// read per distance, not per logit, and one shared-memory read serves three logits.
//
// The values of a table and of psi lie staged in shared memory, in the order of the distance, BLOCK_M + BLOCK_N - 1 of
// them for a tile; the copy clamps the distance, so the tile need not.
#pragma once
#include "bias/gather.h"
#include "bias/profile.h"

namespace posattn {

constexpr int STAGED = BLOCK_M + BLOCK_N;  // floats, a multiple of four so that what follows stays aligned

// Copies values[d - first], d clamped, for the distances from `least` on that a tile has.
__device__ __forceinline__ void stage_values(uint32_t to, const float* values, int first, int last, int least,
                                             int thread) {
#pragma unroll
  for (int x = 0; x < STAGED; x += THREADS) {
    if (STAGED % THREADS == 0 || thread + x < STAGED) {
      const int d = min(max(least + thread + x, first), last);
      ptx::cp_async_4(to + (thread + x) * 4, values + (d - first));
    }
  }
}

// What one head's rows of a block need all along.
template <int GROUPS>
struct DistanceBias {
  static constexpr int ROWS = 2 * GROUPS;
  float slope = 0.0f;
  const float* table = nullptr;
  Profile<GROUPS> profile;

  // `row` is this lane's first row of the sequence.
  __device__ __forceinline__ DistanceBias(const BiasParams& p, const Sequence& s, int b, int h, int row, int lane)
      : profile(p, s, h, row, lane) {
    if constexpr (HAS_SLOPE) slope = p.slope[b * p.slope_batch + h];
    if constexpr (HAS_TABLE) table = p.table + h * p.table_head;
  }

  // Starts the copies for the tile whose least distance is `least`.
  __device__ __forceinline__ void stage(const BiasParams& p, uint32_t to, int least, int thread) const {
    if constexpr (HAS_TABLE) stage_values(to, table, p.table_first, p.table_last, least, thread);
    if constexpr (HAS_PROFILE) stage_values(to + STAGED * 4, p.psi, p.psi_first, p.psi_last, least, thread);
  }

  // What every logit of a distance has in common: the slope's and the table's part. distance: of this lane's first row
  // and first column; staged: that distance's place in the staged values.
  template <int DELTAS>
  __device__ __forceinline__ void common(float (&value)[DELTAS][2], const float* staged, int distance) const {
    const float d0 = static_cast<float>(distance);
#pragma unroll
    for (int x = 0; x < DELTAS; ++x) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int step = 8 * (x - (DELTAS - ROWS)) - e;
        if constexpr (HAS_TABLE) value[x][e] = staged[step];
        if constexpr (HAS_SLOPE && LINEAR) {
          const float corner = HAS_TABLE ? value[x][e] - slope * d0 : -slope * d0;
          value[x][e] = fmaf(-slope, static_cast<float>(step), corner);
        } else if constexpr (HAS_SLOPE) {
          const float d = fabsf(d0 + static_cast<float>(step));
          value[x][e] = HAS_TABLE ? fmaf(-slope, d, value[x][e]) : -slope * d;
        }
      }
    }
  }

  // s += bias.
  template <int N8>
  __device__ __forceinline__ void add(float (&s)[GROUPS][N8][4], const BiasParams& p, const float* staged, int distance,
                                      const Segments& segments) const {
    float value[ROWS + N8 - 1][2];
    common(value, staged, distance);
#pragma unroll
    for (int a = 0; a < ROWS; ++a) {
      const float line = HAS_PROFILE ? segments.slope * profile.row_scale[a] : 0.0f;
#pragma unroll
      for (int n = 0; n < N8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& logit = s[a / 2][n][a % 2 * 2 + e];
          if constexpr (HAS_SLOPE || HAS_TABLE) logit += value[a - n + N8 - 1][e];
          if constexpr (HAS_PROFILE) logit += fmaf(staged[STAGED + 8 * (a - n) - e], line, segments.intercept);
        }
      }
    }
    if constexpr (HAS_PROFILE) {
      if (segments.low < segments.high) profile.add_segments(s, staged + STAGED, segments, 1.0f);
    }
  }

  // z = (s * scale + bias) in base 2 less the rows' references (common/softmax.h): for a profile both are part of its
  // line.
  template <int N8>
  __device__ __forceinline__ void exponents(float (&s)[GROUPS][N8][4], float scale, const float (&reference)[ROWS],
                                            const float* staged, int distance, const Segments& segments) const {
    float value[ROWS + N8 - 1][2];
    common(value, staged, distance);
#pragma unroll
    for (int n = 0; n < N8; ++n) {
#pragma unroll
      for (int a = 0; a < ROWS; ++a) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& z = s[a / 2][n][a % 2 * 2 + e];
          const float psi = HAS_PROFILE ? staged[STAGED + 8 * (a - n) - e] : 0.0f;
          if constexpr (HAS_PROFILE && GROUPS > 1) {
            float bias = fmaf(psi, segments.slope * profile.row_scale[a], segments.intercept);
            if constexpr (HAS_SLOPE || HAS_TABLE) bias += value[a - n + N8 - 1][e];
            z = fmaf(fmaf(z, scale, bias), LOG2E, -reference[a]);
          } else if constexpr (HAS_PROFILE) {
            const float line = segments.slope * LOG2E * profile.row_scale[a];
            float bias = fmaf(psi, line, fmaf(segments.intercept, LOG2E, -reference[a]));
            if constexpr (HAS_SLOPE || HAS_TABLE) bias = fmaf(value[a - n + N8 - 1][e], LOG2E, bias);
            z = fmaf(z, scale * LOG2E, bias);
          } else {
            z = fmaf(fmaf(z, scale, value[a - n + N8 - 1][e]), LOG2E, -reference[a]);
          }
        }
      }
    }
    if constexpr (HAS_PROFILE) {
      if (segments.low < segments.high) profile.add_segments(s, staged + STAGED, segments, LOG2E);
    }
  }
};

}  // namespace posattn
