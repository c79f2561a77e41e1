// Attention forward: flash tiling with a ring of cp.async copies, for any way to multiply (Products, included before).
//
// A block owns BLOCK_M queries of one head; each of its warps owns 16 GROUPS rows of them and walks all the keys.
//
// STAGES >= 2: a ring of tiles (K, V and the values of a bias), one barrier a tile. STAGES == 1: one buffer for K and
// one for V, each filled while the other is used, two barriers a tile; for large heads, where a ring would leave room
// for one block alone on a multiprocessor.
#pragma once
#include "forward/block.h"

namespace posattn {

// The tiles of keys of one span, through a ring of STAGES buffers. The copies of the first STAGES - 1 tiles are under
// way.
struct Ring {
  uint32_t stage = 0;                           // where this step's tile lies
  uint32_t ahead = (STAGES - 1) * STAGE_BYTES;  // where the tile STAGES - 1 later goes

  __device__ __forceinline__ static uint32_t after(uint32_t stage) {
    return stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
  }

  __device__ __forceinline__ void advance() {
    stage = after(stage);
    ahead = after(ahead);
  }
};

template <bool BORDER>
__device__ __forceinline__ void walk(Forward& f, Ring& ring, int from, int to, int end) {
  for (int j0 = from; j0 < to; j0 += BLOCK_N) {
    float s[GROUPS][N8][4];
    const Segments segments = f.segments(j0);
    if constexpr (STAGES > 1) {
      ptx::cp_async_wait_group<STAGES - 2>();
      Products::publish();
      ptx::bar_sync();
      const int next = j0 + (STAGES - 1) * BLOCK_N;
      if (next < end) {
        f.load_k(next, ring.ahead);
        f.load_v(next, ring.ahead);
      }
      ptx::cp_async_commit_group();
      f.rotate_k(j0, ring.stage);
      f.products.multiply_q_k(s, ring.stage);
    } else {
      ptx::cp_async_wait_group<0>();
      Products::publish();
      ptx::bar_sync();
      f.load_v(j0, 0);
      ptx::cp_async_commit_group();
      f.rotate_k(j0, 0);
      f.products.multiply_q_k(s, 0);
      ptx::cp_async_wait_group<0>();
      Products::publish();
      ptx::bar_sync();
      if (j0 + BLOCK_N < end) f.load_k(j0 + BLOCK_N, 0);
      ptx::cp_async_commit_group();
    }
    f.finish_logits<BORDER>(s, j0, ring.stage, segments);
    f.softmax.weigh(s, f.out);
    f.drop(s, j0);
    f.products.multiply_p_v(f.out, s, ring.stage);
    if constexpr (STAGES > 1) ring.advance();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    attention_forward(const __grid_constant__ ForwardParams p) {
  // The longest rows of a causal head first.
  const int block = p.shape.q_blocks - 1 - static_cast<int>(blockIdx.x) % p.shape.q_blocks;
  const int bh = blockIdx.x / p.shape.q_blocks;
  const Sequence sequence(p.shape, p.mask, bh / p.shape.heads);
  const int i0 = block * BLOCK_M;
  if (i0 >= sequence.q_len) return;
  KeySpans spans(sequence, p.mask, i0, min(i0 + BLOCK_M, sequence.q_len) - 1);
  if constexpr (REACH_ROWS > 0) {
    const int64_t at = first_query_block<REACH_ROWS>(p.shape, sequence, bh / p.shape.heads) + block;
    const KeysInReach<BLOCK_N> keys(p.reach + 2 * (at * p.shape.heads + bh % p.shape.heads), 1);
    spans.clip(keys.first, keys.end);
  }
  if constexpr (SPLIT) {
    const int from = blockIdx.y * p.split_tiles * BLOCK_N;
    spans.clip(from, from + p.split_tiles * BLOCK_N);
  }
  Forward f(p, sequence, bh % p.shape.heads, i0, spans.lo, threadIdx.x);
  Ring ring;

  f.load_q();
  if constexpr (STAGES > 1) {
#pragma unroll
    for (int t = 0; t < STAGES - 1; ++t) {
      if (spans.lo + t * BLOCK_N < spans.hi) {
        f.load_k(spans.lo + t * BLOCK_N, t * STAGE_BYTES);
        f.load_v(spans.lo + t * BLOCK_N, t * STAGE_BYTES);
      }
      ptx::cp_async_commit_group();
    }
    ptx::cp_async_wait_group<STAGES - 2>();
  } else {
    if (spans.lo < spans.hi) f.load_k(spans.lo, 0);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
  }
  Products::publish();
  ptx::bar_sync();
  f.rotate_q();
  f.products.read_q();

  if constexpr (HAS_LEFT) walk<true>(f, ring, spans.lo, min(spans.full_lo, spans.hi), spans.hi);
  walk<false>(f, ring, spans.full_lo, spans.full_hi, spans.hi);
  walk<true>(f, ring, spans.full_hi, spans.hi, spans.hi);
  f.store();
}

}  // namespace posattn
