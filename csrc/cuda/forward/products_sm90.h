// The two products of attention forward by wgmma (sm_90a): each warpgroup multiplies its own 64 rows with K and V
// straight from shared memory, so no instruction loads fragments. Q comes from shared memory too: with 128 keys a
// product that costs half of what K does, and registers stay free.
#pragma once
#include "common/element.h"
#include "common/swizzle.h"
#include "ptx/sm90.h"

namespace posattn {

struct Products {
  static constexpr int GROUPS = 1;  // of 16 rows a warp
  static constexpr int N8 = BLOCK_N / 8;
  static constexpr int OUT8 = HEAD_DIM_V / 8;
  static constexpr int K_STEPS = HEAD_DIM / 16;
  static_assert(BLOCK_M == 16 * WARPS && WARPS % 4 == 0 && (BLOCK_N == 64 || BLOCK_N == 128));

  static constexpr int ALIGNMENT = 1024;       // of tiles in shared memory: their swizzle is a function of the address
  static constexpr bool OUT_ON_OWN_Q = false;  // see Forward::store

  using QLayout = Panels<HEAD_DIM, BLOCK_M>;
  using KLayout = Panels<HEAD_DIM, BLOCK_N>;
  using VLayout = Panels<HEAD_DIM_V, BLOCK_N>;

  uint64_t q;
  uint64_t k;
  uint64_t v;
  uint32_t q_tile;
  int thread;
  uint32_t q_fragments[Q_IN_REGISTERS ? K_STEPS : 1][4];

  __device__ __forceinline__ Products(uint32_t q_tile, uint32_t k_tile, uint32_t v_tile, int thread)
      : q(ptx::descriptor(q_tile + thread / 128 * (64 * QLayout::PITCH), 0)),
        k(ptx::descriptor(k_tile, 0)),
        v(ptx::descriptor(v_tile, VLayout::PERIOD_STEP)),
        q_tile(q_tile),
        thread(thread) {}

  // Once Q lies in shared memory.
  __device__ __forceinline__ void read_q() {
    if constexpr (Q_IN_REGISTERS) {
      const int row = thread / WARP * 16 + thread % 16;
#pragma unroll
      for (int step = 0; step < K_STEPS; ++step) {
        ptx::ldmatrix_x4(q_fragments[step], q_tile + QLayout::offset(row, 2 * step + thread % WARP / 16));
      }
    }
  }

  // What this thread wrote to shared memory is ready for the products of all, after the next barrier.
  __device__ static __forceinline__ void publish() { ptx::fence_proxy_async(); }

  // A descriptor's address field counts 16 bytes. Columns 16 k of a row lie in panel k / 4.
  template <typename Layout>
  __device__ static constexpr __forceinline__ uint32_t columns(int k) {
    return (k / 4 * Layout::PERIOD_STEP + k % 4 * 32) / 16;
  }

  // s = Q K^T for the tile in `stage`.
  __device__ __forceinline__ void multiply_q_k(float (&s)[GROUPS][N8][4], uint32_t stage) const {
    const uint64_t k_stage = k + stage / 16;
    ptx::hold(s[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_STEPS; ++step) {
      const uint64_t b = k_stage + columns<KLayout>(step);
      if constexpr (Q_IN_REGISTERS) {
        const auto& a = q_fragments[step];
        BF16 ? ptx::wgmma_m64nNk16_bf16(s[0], a, b, step > 0) : ptx::wgmma_m64nNk16_f16(s[0], a, b, step > 0);
      } else {
        const uint64_t a = q + columns<QLayout>(step);
        BF16 ? ptx::wgmma_m64nNk16_bf16(s[0], a, b, step > 0) : ptx::wgmma_m64nNk16_f16(s[0], a, b, step > 0);
      }
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::hold(s[0]);
  }

  // out += P V: the fragments of s, two by two, are those of A.
  __device__ __forceinline__ void multiply_p_v(float (&out)[GROUPS][OUT8][4], const float (&s)[GROUPS][N8][4],
                                               uint32_t stage) const {
    const uint64_t v_stage = v + stage / 16;
    uint32_t a[N8 / 2][4];
#pragma unroll
    for (int step = 0; step < N8 / 2; ++step) {
      a[step][0] = pack(s[0][2 * step][0], s[0][2 * step][1]);
      a[step][1] = pack(s[0][2 * step][2], s[0][2 * step][3]);
      a[step][2] = pack(s[0][2 * step + 1][0], s[0][2 * step + 1][1]);
      a[step][3] = pack(s[0][2 * step + 1][2], s[0][2 * step + 1][3]);
    }
    ptx::hold(out[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < N8 / 2; ++step) {
#pragma unroll
      for (int d = 0; d < OUT8; d += COLUMNS8) {
        const uint64_t b = v_stage + (16 * VLayout::PITCH * step + d / 8 * VLayout::PERIOD_STEP) / 16;
        float (&part)[COLUMNS8][4] = *reinterpret_cast<float (*)[COLUMNS8][4]>(&out[0][d]);
        BF16 ? ptx::wgmma_m64nNk16_tnsp_bf16(part, a[step], b, 1) : ptx::wgmma_m64nNk16_tnsp_f16(part, a[step], b, 1);
      }
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::hold(out[0]);
  }

  static constexpr int COLUMNS8 = OUT8 % 16 == 0 ? 16 : 8;  // of the output that one instruction makes, in eights
};

}  // namespace posattn
