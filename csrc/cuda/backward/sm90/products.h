// The five products of the backward pass by wgmma (sm_90a): two warpgroups, each of 64 keys of the block's 128.
//
// S^T = K Q^T and dP^T = V dO^T leave P^T and dS^T in the registers that hold the A operands of dV += P^T dO and
// dK += dS^T Q. Q and dO serve both uses from one copy, by rows and transposed. dQ = dS K needs all keys of the block,
// so dS^T passes through shared memory; a warpgroup makes dQ of half the queries, or of half the dimensions.
#pragma once
#include "backward/warps.h"
#include "ptx/sm90.h"

namespace posattn {

constexpr int WARPGROUP = 128;  // threads

using KeyPanels = Panels<PADDED, BLOCK_N>;
using QueryPanels = Panels<PADDED, BLOCK_M>;
using PairPanels = Panels<BLOCK_M, BLOCK_N>;

static_assert(SM90 && THREADS == 2 * WARPGROUP && BLOCK_N == 128);
static_assert(LOGIT_COLUMNS == 1 && KEY_COLUMNS == 1 && BLOCK_M == 128 / QUERY_COLUMNS);

template <int N8>
__device__ __forceinline__ void wgmma(float (&d)[N8][4], uint64_t a, uint64_t b, bool add) {
  BF16 ? ptx::wgmma_m64nNk16_bf16(d, a, b, add) : ptx::wgmma_m64nNk16_f16(d, a, b, add);
}
template <int N8>
__device__ __forceinline__ void wgmma_tnsp(float (&d)[N8][4], uint64_t a, uint64_t b, bool add) {
  BF16 ? ptx::wgmma_m64nNk16_tnsp_bf16(d, a, b, add) : ptx::wgmma_m64nNk16_tnsp_f16(d, a, b, add);
}
template <int N8>
__device__ __forceinline__ void wgmma_tnsp(float (&d)[N8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  BF16 ? ptx::wgmma_m64nNk16_tnsp_bf16(d, a, b, add) : ptx::wgmma_m64nNk16_tnsp_f16(d, a, b, add);
}

// Descriptors of one warpgroup's operands, in the first stage. Where dQ's dimensions are shared, at D = 64 the second
// warpgroup's begin in the middle of a swizzled row.
struct Products {
  uint64_t keys;         // A of S^T: its keys
  uint64_t queries;      // B of S^T
  uint64_t all_queries;  // B of dK
  uint64_t pairs;        // A of dQ: dS, its queries
  uint64_t all_keys;     // B of dQ, its dimensions

  __device__ __forceinline__ Products(uint32_t keys_at, uint32_t queries_at, uint32_t pairs_at, int group)
      : keys(ptx::descriptor(keys_at + group * (64 * KeyPanels::PITCH), 0)),
        queries(ptx::descriptor(queries_at, 0)),
        all_queries(ptx::descriptor(queries_at, QueryPanels::PERIOD_STEP)),
        pairs(ptx::descriptor(pairs_at + (QUERY_COLUMNS == 1 ? group * PairPanels::PERIOD_STEP : 0), 0)),
        all_keys(ptx::descriptor(keys_at, 0) + columns<KeyPanels>(group * (PADDED / 16 / 2 * (QUERY_COLUMNS - 1)))) {}

  // A descriptor counts 16 bytes. Columns and rows 16 step .. of a tile:
  template <class Panels>
  __device__ static constexpr __forceinline__ uint64_t columns(int step) {
    return (step / 4 * Panels::PERIOD_STEP + step % 4 * 32) / 16;
  }
  __device__ static constexpr __forceinline__ uint64_t rows(int step) { return 128 * step; }

  // d [64 keys, BLOCK_M] = (or, `add`, +=) keys (or values) times queries (or dO), over the USED columns. These lie
  // `keys_at` and `queries_at` bytes from K and from the first stage of Q.
  template <int USED>
  __device__ __forceinline__ void logits(float (&d)[Logits::EIGHTS][4], uint32_t keys_at, uint32_t queries_at,
                                         bool add) const {
    const uint64_t a = keys + keys_at / 16, b = ptx::fresh(queries + queries_at / 16);
#pragma unroll
    for (int step = 0; step < ceil_div(USED, 16); ++step) {
      wgmma(d, a + columns<KeyPanels>(step), b + columns<QueryPanels>(step), add || step > 0);
    }
    ptx::wgmma_commit_group();
  }

  // d [64 keys, PADDED] += pairs times dO or Q, over the queries.
  __device__ __forceinline__ void key_gradients(float (&d)[KeyGradients::EIGHTS][4],
                                                const uint32_t (&pairs)[Logits::EIGHTS / 2][4],
                                                uint32_t queries_at) const {
    const uint64_t b = ptx::fresh(all_queries + queries_at / 16);
#pragma unroll
    for (int step = 0; step < BLOCK_M / 16; ++step) wgmma_tnsp(d, pairs[step], b + rows(step), true);
    ptx::wgmma_commit_group();
  }

  // d [64 queries, PADDED / QUERY_COLUMNS] = dS K, over the keys. dS^T lies `pairs_at` bytes from its first tile.
  __device__ __forceinline__ void query_gradients(float (&d)[QueryGradients::EIGHTS][4], uint32_t pairs_at) const {
    const uint64_t a = ptx::fresh(pairs + pairs_at / 16);
#pragma unroll
    for (int step = 0; step < BLOCK_N / 16; ++step) wgmma_tnsp(d, a + rows(step), all_keys + rows(step), step > 0);
    ptx::wgmma_commit_group();
  }
};

// dS^T of a warp, as A operands, into the tile [BLOCK_N, BLOCK_M].
__device__ __forceinline__ void store_pairs_matrix(uint32_t tile, const uint32_t (&pairs)[Logits::EIGHTS / 2][4],
                                                   int warp, int lane) {
  const uint32_t first = tile + PairPanels::offset(16 * warp + lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < Logits::EIGHTS / 2; ++step) {
    ptx::stmatrix_x4((first ^ (step % 4 * 32)) + step / 4 * PairPanels::PERIOD_STEP, pairs[step]);
  }
}

}  // namespace posattn
