// A table's gradient, sums of dS along diagonals, from the tile of dS^T in shared memory by products with zeros and
// ones.
//
// Key j = 8 a + r and query i = 8 c + s of a tile are 8 (c - a) + s - r apart. ldmatrix reads 8 queries for any 8 keys,
// so one mma adds the chunks of two a's on one diagonal m = c - a, each key number r to a row of its own: A holds a one
// where a key's number is the row's. A warp owns diagonals m = 2 warp and 2 warp + 1, and m - 16, whose chunks follow
// when c wraps around; they have the upper half of A's rows. Diagonal m - 16 of the next step is m of this one, so a
// step finishes m - 16, and m stays in registers.
//
// What is finished lies in a strip of the block, [r][distance], until the block has met; then it is added up along its
// own diagonals, and to global memory once for each distance.
#pragma once
#include "backward/sm90/products.h"
#include "backward/sums.h"

namespace posattn {

struct TileDiagonals {
  static constexpr int PAD = 8;
  static constexpr int PITCH = BLOCK_M + 3 * PAD;  // a quarter of the banks more than a multiple of all
  static constexpr int STRIP = 8 * PITCH;
  static constexpr int FLOATS = TABLE_BY_PRODUCT ? 2 * STRIP : 0;
  static constexpr int SUMS = BLOCK_M + 7;    // of a strip
  static constexpr int BEHIND = BLOCK_M + 7;  // entry 0 of a step's strip is so far below its first query and key
  static_assert(!TABLE_BY_PRODUCT || (BLOCK_M == 128 && BLOCK_N == 128 && WARPS == 8 && PITCH % 32 == 24));

  float kept[2][2] = {};

  __device__ static __forceinline__ void clear(float* strips, int thread) {
    for (int x = thread; x < FLOATS; x += THREADS) strips[x] = 0.0f;
  }

  // Once the block has met: adds up a strip, whose entry 0 belongs to distance `first` (maybe below the least of all)
  // of the sums that begin at `to`.
  __device__ static __forceinline__ void add_up(const float* strip, int thread, const GlobalSums& sums, int64_t to,
                                                int first) {
    if (thread >= SUMS) return;
    float total = 0.0f;
#pragma unroll
    for (int r = 0; r < 8; ++r) total += strip[r * PITCH + PAD - 7 + r + thread];
    if (first + thread >= 0) sums.add(to + first + thread, total);
  }

  // Leaves the warp's two diagonals in a strip.
  __device__ static __forceinline__ void leave(float* strip, int warp, int lane, float a, float b, float c, float d) {
    const uint32_t at = ptx::shared_address(strip + lane / 4 * PITCH + PAD + 16 * warp + lane % 4 * 2);
    ptx::st_shared_v2(at, a, b);
    ptx::st_shared_v2(at + 32, c, d);
  }

  __device__ static __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
    BF16 ? ptx::mma_m16n8k8_bf16(d, a, b) : ptx::mma_m16n8k8_f16(d, a, b);
  }

  // The tile of dS^T; what it finishes goes to the strip.
  __device__ __forceinline__ void add(uint32_t tile, float* strip, int warp, int lane) {
    const uint32_t unit = pack(lane % 4 * 2 == lane / 4, lane % 4 * 2 + 1 == lane / 4);
    float d[2][4] = {{0.0f, 0.0f, kept[0][0], kept[0][1]}, {0.0f, 0.0f, kept[1][0], kept[1][1]}};
    // Each ldmatrix takes the chunks of two a's for both diagonals. Step h has those whose c is 2 h or 2 h + 1: which
    // a's these are depends on the warp, and whether c wrapped around on h < warp.
    const int half = lane / 8 % 2, second = lane / 16, at = warp + (half & second);
    const uint32_t first = lane % 16 * PairPanels::PITCH + ((half ^ second ^ lane % 8) << 4);
#pragma unroll
    for (int h = 0; h < BLOCK_M / 16; ++h) {
      uint32_t b[4];
      const uint32_t row = (h - at) * (16 * PairPanels::PITCH) & (BLOCK_N - 16) * PairPanels::PITCH;
      ptx::ldmatrix_x4_trans(b, tile + (first ^ h % 4 * 32) + h / 4 * PairPanels::PERIOD_STEP + row);
      const bool wrapped = h < warp;
      const uint32_t a[2] = {wrapped ? 0 : unit, wrapped ? unit : 0};
      mma(d[0], a, b[0]);
      mma(d[0], a, b[1]);
      mma(d[1], a, b[2]);
      const bool last = h <= warp;  // c = 2 h of diagonal 2 warp + 1
      const uint32_t a_last[2] = {last ? 0 : unit, last ? unit : 0};
      mma(d[1], a_last, b[3]);
    }
    leave(strip, warp, lane, d[0][2], d[0][3], d[1][2], d[1][3]);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      kept[x][0] = d[x][0];
      kept[x][1] = d[x][1];
    }
  }

  // After the last step of a head, as if one more without dS came.
  __device__ __forceinline__ void finish(float* strip, int warp, int lane) {
    leave(strip, warp, lane, kept[0][0], kept[0][1], kept[1][0], kept[1][1]);
    kept[0][0] = kept[0][1] = kept[1][0] = kept[1][1] = 0.0f;
  }
};

}  // namespace posattn
