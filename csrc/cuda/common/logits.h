// From dot products to logits on a warp's tile: scale, softcap, every additive operand, masks. The fragments are those
// of softmax.h: a lane holds rows 8 a and columns 8 n + e from its own first row and column on.
#pragma once
#include "bias/bias.h"
#include "bias/dense.h"
#include "bias/gather.h"
#include "common/softcap.h"

namespace posattn {

// Where a lane's logits lie: its first row and column, inside the sequence.
struct Place {
  int row;
  int column;
};

// Dot products become logits, but for the operands.
template <int GROUPS, int N8>
__device__ __forceinline__ void scale_logits(float (&s)[GROUPS][N8][4], float scale, float softcap) {
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
    for (int n = 0; n < N8; ++n) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        s[g][n][x] *= scale;
        if constexpr (HAS_SOFTCAP) s[g][n][x] = capped(s[g][n][x], softcap);
      }
    }
  }
}

// s += weight times the dense operands and those by explicit positions; rows and columns past the end read the last
// one's.
template <int GROUPS, int N8>
__device__ __forceinline__ void add_gathered(float (&s)[GROUPS][N8][4], const BiasParams& p,
                                             const PositionParams& positions, const Sequence& sequence, int h,
                                             Place place, float weight = 1.0f) {
  if constexpr (EXPLICIT && BY_DISTANCE) {
    int64_t keys[N8][2];
#pragma unroll
    for (int x = 0; x < 2 * N8; ++x) {
      const int j = min(place.column + 8 * (x / 2) + x % 2, sequence.k_len - 1);
      keys[x / 2][x % 2] = key_position(positions, sequence, sequence.batch, j);
    }
#pragma unroll
    for (int a = 0; a < 2 * GROUPS; ++a) {
      RowBias row;
      row.start(p, positions, sequence, sequence.batch, h, min(place.row + 8 * a, sequence.q_len - 1));
#pragma unroll
      for (int x = 0; x < 2 * N8; ++x) s[a / 2][x / 2][a % 2 * 2 + x % 2] += weight * row.at(p, keys[x / 2][x % 2]);
    }
  }
  if constexpr (DENSE != NO_DENSE) {
#pragma unroll
    for (int a = 0; a < 2 * GROUPS; ++a) {
      const int64_t i = sequence.q_start + min(place.row + 8 * a, sequence.q_len - 1);
      const int64_t row = pair_offset(p.dense_strides, sequence.batch, h, i, sequence.k_start);
#pragma unroll
      for (int x = 0; x < 2 * N8; ++x) {
        const int64_t j = min(place.column + 8 * (x / 2) + x % 2, sequence.k_len - 1);
        s[a / 2][x / 2][a % 2 * 2 + x % 2] += weight * dense_at(p.dense, row + j * p.dense_strides.key);
      }
    }
  }
}

// Minus infinity where a key is not allowed. BORDER: the tile may hold keys past the end, the diagonal or the window.
template <bool BORDER, int GROUPS, int N8>
__device__ __forceinline__ void apply_mask(float (&s)[GROUPS][N8][4], const MaskParams& mask, const Sequence& sequence,
                                           int h, Place place) {
#pragma unroll
  for (int a = 0; a < 2 * GROUPS; ++a) {
    const int i = place.row + 8 * a;
    const Allowed allowed(sequence, mask, i, place.column);
    int64_t row = 0;
    if constexpr (HAS_BOOLEAN) {
      row = pair_offset(mask.boolean_strides, sequence.batch, h, sequence.q_start + min(i, sequence.q_len - 1),
                        sequence.k_start);
    }
#pragma unroll
    for (int x = 0; x < 2 * N8; ++x) {
      const int column = 8 * (x / 2) + x % 2;
      bool visible = true;
      if constexpr (BORDER) visible = allowed(column);
      if constexpr (HAS_BOOLEAN) {
        const int64_t j = min(place.column + column, sequence.k_len - 1);
        visible &= mask.boolean[row + j * mask.boolean_strides.key] != 0;
      }
      if (!visible) s[a / 2][x / 2][a % 2 * 2 + x % 2] = -infinity();
    }
  }
}

}  // namespace posattn
