// The additive operands of a plan that are functions of the distance, for implicit positions: Slope, Table, Profile.
//
// A lane holds logits at rows row + 8 a and columns column + 8 n + e (see softmax.h), whose distance from one another
// is 8 (a - n) - e: 2 (ROWS + N8 - 1) different ones for 2 ROWS N8 logits, 22 for 64. So values are computed or read
// per distance, not per logit, and one shared-memory read serves three logits.
//
// The values of a table and of psi lie staged in shared memory, in the order of the distance, BLOCK_M + BLOCK_N - 1 of
// them for a tile; the copy clamps the distance, so the tile need not.
#pragma once
#include "profile.h"

namespace posattn {

constexpr bool BY_DISTANCE = HAS_SLOPE || HAS_TABLE || HAS_PROFILE;
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

  // s += bias. distance: of this lane's first row and first column; staged: that distance's place in the staged values.
  template <int N8>
  __device__ __forceinline__ void add(float (&s)[GROUPS][N8][4], const BiasParams& p, const float* staged, int distance,
                                      const Segments& segments) const {
    constexpr int DELTAS = ROWS + N8 - 1;
    float value[DELTAS][2];
    const float d0 = static_cast<float>(distance);
    float line[ROWS];
    if constexpr (HAS_PROFILE) {
#pragma unroll
      for (int a = 0; a < ROWS; ++a) line[a] = segments.slope * profile.row_scale[a];
    }
#pragma unroll
    for (int x = 0; x < DELTAS; ++x) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int step = 8 * (x - (N8 - 1)) - e;
        value[x][e] = segments.intercept;
        if constexpr (HAS_SLOPE && LINEAR) {
          value[x][e] = fmaf(-slope, static_cast<float>(step), value[x][e] - slope * d0);
        } else if constexpr (HAS_SLOPE) {
          value[x][e] = fmaf(-slope, fabsf(d0 + static_cast<float>(step)), value[x][e]);
        }
        if constexpr (HAS_TABLE) value[x][e] += staged[step];
      }
    }
#pragma unroll
    for (int n = 0; n < N8; ++n) {
#pragma unroll
      for (int a = 0; a < ROWS; ++a) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float bias = value[a - n + N8 - 1][e];
          if constexpr (HAS_PROFILE) bias = fmaf(staged[STAGED + 8 * (a - n) - e], line[a], bias);
          s[a / 2][n][a % 2 * 2 + e] += bias;
        }
      }
    }
    if constexpr (HAS_PROFILE) {
      if (segments.low < segments.high) profile.bend(s, staged + STAGED, segments);
    }
  }
};

}  // namespace posattn
