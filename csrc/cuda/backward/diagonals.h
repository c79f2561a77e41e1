// Sums of a warp's logits by distance, for the gradients of a table and of psi.
//
// Elements that share a lane and a distance, those of one band, are added first. A strip of shared memory of the warp's
// own then holds, for each of the eight rows g of a fragment, the bands side by side; row g lies g distances lower than
// row 0, so adding the strip up along its diagonals gives one sum a distance, and one addition to global memory for
// each. No element is added to shared or global memory by itself.
#pragma once
#include "backward/bands.h"
#include "common/global_sums.h"

namespace posattn {

// A block's whole tile of dS^T sums a table's diagonals by tensor cores (backward/sm90/diagonals.h).
constexpr bool TABLE_BY_PRODUCT = WANT_TABLE && !EXPLICIT && SM90 && BLOCK_M == BLOCK_N;
constexpr bool SUMS_BY_DISTANCE = ((WANT_TABLE && !TABLE_BY_PRODUCT) || WANT_PSI) && !EXPLICIT;

// The elements of a band, f(group, n, e) each, added up; without a zero to begin with, which would be an addition.
template <class F>
__device__ __forceinline__ float sum_of_band(int k, int c, F f) {
  float sum = 0.0f;
  bool first = true;
#pragma unroll
  for (int x = 0; x < 2 * Logits::GROUPS; ++x) {
    const int n = k - BANDS_BEFORE + x;
    if (n < 0 || n >= Logits::EIGHTS) continue;
    const float value = f(x / 2, n, x % 2 * 2 + c);
    sum = first ? value : sum + value;
    first = false;
  }
  return sum;
}

struct Strip {
  static constexpr int PAD = 8;
  static constexpr int PITCH = 8 * BANDS + 2 * PAD;
  static constexpr int ROWS = STRIP_ROWS;  // stored at a time: 8, or 4 to save shared memory
  static constexpr int FLOATS = SUMS_BY_DISTANCE ? ROWS * PITCH : 0;
  static constexpr int SUMS = 8 * BANDS + 7;
  // Eight rows of fragments, two words a lane, meet all banks but once.
  static_assert(PITCH % 32 == 8 || PITCH % 32 == 24);
  static_assert(ROWS == 8 || ROWS == 4);

  float* memory;
  int g;
  int t;
  int lane;

  __device__ __forceinline__ Strip(float* of_block, int warp, int lane)
      : memory(of_block + warp * FLOATS), g(lane / 4), t(lane % 4), lane(lane) {
    if constexpr (SUMS_BY_DISTANCE) {
      for (int x = lane; x < ROWS * 2 * PAD; x += WARP) {
        const int column = x % (2 * PAD);
        memory[x / (2 * PAD) * PITCH + (column < PAD ? column : column + 8 * BANDS)] = 0.0f;
      }
      ptx::bar_warp_sync();
    }
  }

  // The same strip, whose place in memory and the lane's in it are derived anew.
  __device__ __forceinline__ Strip again(float* of_block, int warp, int lane) const {
    Strip strip = *this;
    strip.memory = of_block + warp * FLOATS;
    strip.g = lane / 4;
    strip.t = lane % 4;
    strip.lane = lane;
    return strip;
  }

  // Adds the sums of bands by distance to `to`, where place `least` is for the least distance of the warp's tile.
  __device__ __forceinline__ void add(const Banded& sums, const GlobalSums& to, int64_t least) const {
    float total[ceil_div(SUMS, WARP)];
#pragma unroll
    for (int first = 0; first < 8; first += ROWS) {
      if (first) ptx::bar_warp_sync();
      if (ROWS == 8 || (g >= first && g < first + ROWS)) {
#pragma unroll
        for (int k = 0; k < BANDS; ++k) {
          const float* at = memory + (g - first) * PITCH + PAD + 8 * k + 2 * t;
          ptx::st_shared_v2(ptx::shared_address(at), sums[k][0], sums[k][1]);
        }
      }
      ptx::bar_warp_sync();
      // Column x + row - 7 of a row belongs to sum x.
#pragma unroll
      for (int x = 0; x < SUMS; x += WARP) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
          if (x + WARP <= SUMS || x + lane < SUMS) {
            const float value = memory[row * PITCH + PAD - 7 + first + row + x + lane];
            total[x / WARP] = first + row == 0 ? value : total[x / WARP] + value;
          }
        }
      }
    }
    ptx::bar_warp_sync();
#pragma unroll
    for (int x = 0; x < SUMS; x += WARP) {
      if (x + WARP <= SUMS || x + lane < SUMS) to.add(least + x + lane, total[x / WARP]);
    }
  }
};

}  // namespace posattn
