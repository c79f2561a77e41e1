// dK and dV of a block, from fragments through shared memory to rows.
#pragma once
#include "backward/rotary.h"
#include "backward/warps.h"
#include "common/mask.h"

namespace posattn {

// Sums times `factor` become rows of dK (rotated back) or dV. The place of K and V in shared memory is free by now.
template <bool KEYS, class Block>
__device__ __forceinline__ void store_keys(const Block& block, const Fragments<KeyGradients>& sums, float factor) {
  const BackwardParams& p = block.p;
  const Sequence& sequence = block.sequence;
  const int warp = block.warp, lane = block.lane, j0 = block.key_block * BLOCK_N;
  constexpr int USED = KEYS ? DIM : DIM_V;
  float* rows = reinterpret_cast<float*>(shared);
  // Half a warp stores two chunks of four floats in each of four rows: the swizzle puts these eight in all banks.
  const auto place = [](int row, int column) {
    return row * PADDED + (((column >> 2) ^ ((row & 3) << 1)) << 2) + (column & 3);
  };
  ptx::bar_sync();
  const int row0 = warp / KEY_COLUMNS * (16 * KeyGradients::GROUPS) + lane / 4;
  const int column0 = warp % KEY_COLUMNS * (8 * KeyGradients::EIGHTS) + lane % 4 * 2;
#pragma unroll
  for (int group = 0; group < KeyGradients::GROUPS; ++group) {
#pragma unroll
    for (int n = 0; n < KeyGradients::EIGHTS; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = place(row0 + 16 * group + 8 * half, column0 + 8 * n);
        ptx::st_shared_v2(ptx::shared_address(rows + at), sums[group][n][2 * half] * factor,
                          sums[group][n][2 * half + 1] * factor);
      }
    }
  }
  ptx::bar_sync();
  const Strides& strides = KEYS ? p.dk_strides : p.dv_strides;
  Element* to =
      static_cast<Element*>(KEYS ? p.dk : p.dv) + sequence.batch * strides.batch + block.key_head * strides.head;
  for (int x = block.thread; x < BLOCK_N * (USED / 8); x += THREADS) {
    const int row = x / (USED / 8), column = x % (USED / 8) * 8;
    if (j0 + row >= sequence.k_len) break;
    const int64_t token = sequence.k_start + j0 + row;
    alignas(16) float value[8];
    *reinterpret_cast<float4*>(value) = *reinterpret_cast<const float4*>(rows + place(row, column));
    *reinterpret_cast<float4*>(value + 4) = *reinterpret_cast<const float4*>(rows + place(row, column + 4));
    if constexpr (KEYS && ROTARY) {
      const int64_t angles = sequence.batch * p.k_angles.batch + token * HALF;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const RotaryColumn at(column + c);
        if (at.rotates) {
          const float other = rows[place(row, at.partner)];
          value[c] = at.back(value[c], other, p.k_angles.cos[angles + at.pair], p.k_angles.sin[angles + at.pair]);
        }
      }
    }
    const uint4 words{pack(value[0], value[1]), pack(value[2], value[3]), pack(value[4], value[5]),
                      pack(value[6], value[7])};
    *reinterpret_cast<uint4*>(to + token * strides.token + column) = words;
  }
}

}  // namespace posattn
