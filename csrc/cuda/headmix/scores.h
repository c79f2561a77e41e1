// What becomes of one head's dot products: scale, softcap and inner bias before the MLP; outer bias and mask after it.
//
// The constants HAS_SLOPE, DENSE and so on describe the inner bias; those of the outer one begin with OUTER.
#pragma once
#include "common/logits.h"
#include "headmix/bias.h"
#include "headmix/smem_layout.h"

namespace posattn::headmix {

constexpr bool STAGED_VALUES = (HAS_TABLE || HAS_PROFILE) && !EXPLICIT;
constexpr int STAGE_BYTES = STAGED_VALUES ? 2 * STAGED * 4 : 0;  // of one head: table, psi

// A warp copies values[d - first], d clamped, for the STAGED distances from `least` on.
__device__ __forceinline__ void stage_for_warp(uint32_t to, const float* values, int first, int last, int least,
                                               const Lane& lane) {
#pragma unroll
  for (int x = 0; x < STAGED; x += WARP) {
    if (STAGED % WARP == 0 || lane.lane + x < STAGED) {
      const int d = min(max(least + lane.lane + x, first), last);
      ptx::cp_async_4(to + (lane.lane + x) * 4, values + (d - first));
    }
  }
}

// One head on a tile: its inputs to the MLP, and what the MLP's output is added to.
struct HeadScores {
  int h;
  DistanceBias<GROUPS> inner;

  __device__ __forceinline__ HeadScores(const BiasParams& p, const Sequence& s, int h, Place place, const Lane& lane)
      : h(h), inner(p, s, s.batch, h, place.row, lane.lane) {}

  __device__ __forceinline__ void stage(const BiasParams& p, uint32_t to, int least, const Lane& lane) const {
    if constexpr (HAS_TABLE && !EXPLICIT) stage_for_warp(to, inner.table, p.table_first, p.table_last, least, lane);
    if constexpr (HAS_PROFILE && !EXPLICIT) {
      stage_for_warp(to + STAGED * 4, p.psi, p.psi_first, p.psi_last, least, lane);
    }
  }

  // The inner bias of the tile at `place`. staged: the values for the least distance of the lane's corner.
  __device__ __forceinline__ void inner_bias(float (&b)[GROUPS][N8][4], const BiasParams& p,
                                             const PositionParams& positions, const Sequence& s, Place place,
                                             const float* staged, const Segments& segments) const {
    if constexpr (HAS_PROFILE || DENSE != NO_DENSE || EXPLICIT) {
#pragma unroll
      for (int x = 0; x < GROUPS * N8 * 4; ++x) b[x / 4 / N8][x / 4 % N8][x % 4] = 0.0f;
      if constexpr (BY_DISTANCE && !EXPLICIT) inner.add(b, p, staged, place.row + s.offset() - place.column, segments);
      add_gathered(b, p, positions, s, h, place);
    } else {
      by_distance(b, staged, static_cast<float>(place.row + s.offset() - place.column));
    }
  }

  // One value for each distance that the lane meets: two columns of bands of eight. d0: of its first row and column.
  __device__ __forceinline__ void by_distance(float (&b)[GROUPS][N8][4], const float* staged, float d0) const {
    constexpr int BANDS = 2 * GROUPS + N8 - 1;
    float value[BANDS][2];
#pragma unroll
    for (int x = 0; x < 2 * BANDS; ++x) {
      const int step = 8 * (x / 2 - (N8 - 1)) - x % 2;
      float& v = value[x / 2][x % 2];
      if constexpr (HAS_SLOPE && LINEAR) {
        v = fmaf(-inner.slope, static_cast<float>(step), -inner.slope * d0);
      } else if constexpr (HAS_SLOPE) {
        v = -inner.slope * fabsf(d0 + static_cast<float>(step));
      }
      if constexpr (HAS_TABLE) v = HAS_SLOPE ? v + staged[step] : staged[step];
    }
#pragma unroll
    for (int x = 0; x < GROUPS * N8 * 4; ++x) {
      const int r = x / 4 / N8, n = x / 4 % N8, e = x % 4;
      b[r][n][e] = value[2 * r + e / 2 - n + N8 - 1][e % 2];
    }
  }
};

// A plane of x: [BLOCK_M][BLOCK_N], written in the fragments of the logits.
__device__ __forceinline__ void store_inputs(uint32_t plane, const float (&x)[GROUPS][N8][4], const Lane& lane) {
  const uint32_t to = plane + lane.g * X_ROW + lane.t * 4;
#pragma unroll
  for (int a = 0; a < 2 * GROUPS; ++a) {
#pragma unroll
    for (int n = 0; n < N8; ++n) {
      ptx::st_shared(to + 8 * a * X_ROW + 16 * n, pack(x[a / 2][n][a % 2 * 2], x[a / 2][n][a % 2 * 2 + 1]));
    }
  }
}

// s = factor s + what the MLP adds, in base 2 already.
__device__ __forceinline__ void add_mixed(float (&s)[GROUPS][N8][4], float factor, uint32_t mixed, const Lane& lane) {
  const uint32_t from = mixed + lane.g * (BLOCK_N * 4) + lane.t * 8;
#pragma unroll
  for (int r = 0; r < GROUPS; ++r) {
#pragma unroll
    for (int n = 0; n < N8; ++n) {
      uint32_t pairs[2];  // rows g and g + 8 at columns 2t and 2t + 1
      ptx::ld_shared_v2(pairs, from + r * 8 * (BLOCK_N * 4) + 32 * n);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        s[r][n][e] = fmaf(s[r][n][e], factor, low_float(pairs[e]));
        s[r][n][2 + e] = fmaf(s[r][n][2 + e], factor, high_float(pairs[e]));
      }
    }
  }
}

}  // namespace posattn::headmix
