// The two products of attention forward by ldmatrix and mma.sync (sm_80): each warp multiplies its own 16 GROUPS rows,
// and a fragment of K or V read once serves GROUPS products.
#pragma once
#include "common/element.h"
#include "common/swizzle.h"

namespace posattn {

struct Products {
  static constexpr int GROUPS = BLOCK_M / (16 * WARPS);
  static constexpr int N8 = BLOCK_N / 8;
  static constexpr int OUT8 = HEAD_DIM_V / 8;
  static constexpr int K_STEPS = HEAD_DIM / 16;
  static_assert(BLOCK_M % (16 * WARPS) == 0);

  static constexpr int ALIGNMENT = 16;                          // of tiles in shared memory
  static constexpr bool OUT_ON_OWN_Q = HEAD_DIM == HEAD_DIM_V;  // see Forward::store

  using QLayout = Tile<HEAD_DIM>;
  using KLayout = Tile<HEAD_DIM>;
  using VLayout = Tile<HEAD_DIM_V>;

  Reader<HEAD_DIM> q_reader;
  Reader<HEAD_DIM> k_reader;
  Reader<HEAD_DIM_V> v_reader;
  uint32_t q[Q_IN_REGISTERS ? GROUPS : 1][K_STEPS][4];

  __device__ __forceinline__ Products(uint32_t q_tile, uint32_t k_tile, uint32_t v_tile, int thread)
      : q_reader(Reader<HEAD_DIM>::a_operand(q_tile, thread / WARP * (16 * GROUPS), thread % WARP)),
        k_reader(Reader<HEAD_DIM>::b_operand(k_tile, thread % WARP)),
        v_reader(Reader<HEAD_DIM_V>::b_operand_trans(v_tile, thread % WARP)) {}

  // Once Q lies in shared memory.
  __device__ __forceinline__ void read_q() {
    if constexpr (Q_IN_REGISTERS) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k) ptx::ldmatrix_x4(q[g][k], q_reader.at(0, 16 * g, k));
      }
    }
  }

  // What this thread wrote to shared memory is ready for the products of all, after the next barrier.
  __device__ static __forceinline__ void publish() {}

  // s = Q K^T for the tile in `stage`.
  __device__ __forceinline__ void multiply_q_k(float (&s)[GROUPS][N8][4], uint32_t stage) const {
#pragma unroll
    for (int x = 0; x < GROUPS * N8 * 4; ++x) s[x / 4 / N8][x / 4 % N8][x % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      uint32_t a[GROUPS][4];
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if constexpr (Q_IN_REGISTERS) {
#pragma unroll
          for (int x = 0; x < 4; ++x) a[g][x] = q[g][k][x];
        } else {
          ptx::ldmatrix_x4(a[g], q_reader.at(0, 16 * g, k));
        }
      }
#pragma unroll
      for (int n = 0; n < N8; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, k_reader.at(stage, 8 * n, k));
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          mma(s[g][n], a[g], b[0], b[1]);
          mma(s[g][n + 1], a[g], b[2], b[3]);
        }
      }
    }
  }

  // out += P V: the C fragments of two neighbouring products are the A fragment of the next.
  __device__ __forceinline__ void multiply_p_v(float (&out)[GROUPS][OUT8][4], const float (&s)[GROUPS][N8][4],
                                               uint32_t stage) const {
#pragma unroll
    for (int k = 0; k < N8 / 2; ++k) {
      uint32_t a[GROUPS][4];
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        a[g][0] = pack(s[g][2 * k][0], s[g][2 * k][1]);
        a[g][1] = pack(s[g][2 * k][2], s[g][2 * k][3]);
        a[g][2] = pack(s[g][2 * k + 1][0], s[g][2 * k + 1][1]);
        a[g][3] = pack(s[g][2 * k + 1][2], s[g][2 * k + 1][3]);
      }
#pragma unroll
      for (int d = 0; d < OUT8; d += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, v_reader.at(stage, 16 * k, d / 2));
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          mma(out[g][d], a[g], b[0], b[1]);
          mma(out[g][d + 1], a[g], b[2], b[3]);
        }
      }
    }
  }
};

}  // namespace posattn
