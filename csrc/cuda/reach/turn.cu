// What find.cu found, turned round for the backward pass: which blocks of queries a block of keys walks, and where each
// block of queries has its first share of dQ from.
//
// What a block of queries has in reach is a range of keys, so of two blocks of keys the later one's queries neither
// begin nor end before the other's, and those that walk a block of queries are a range too. Heads that share keys walk
// the same queries.
#include "reach/reach.h"

namespace posattn {

__shared__ int of_warps[THREADS / WARP];

// A launch's block by blocks of tokens (`blocks` of the longest sequence), key heads and sequences.
struct TurnBlock {
  int block;
  int kv;
  int kv_heads;
  int index;
  Sequence sequence;

  __device__ __forceinline__ TurnBlock(const TurnParams& p, int blocks)
      : block(blockIdx.x % blocks),
        kv(blockIdx.x / blocks % (p.shape.heads / p.shape.group)),
        kv_heads(p.shape.heads / p.shape.group),
        index(blockIdx.x / blocks / kv_heads),
        sequence(p.shape, p.mask, index) {}

  // What the heads of this key head have in reach from a block of queries.
  __device__ __forceinline__ KeysInReach<1> keys(const TurnParams& p, int query_block) const {
    const int64_t at = first_query_block<BLOCK_M>(p.shape, sequence, index) + query_block;
    return KeysInReach<1>(p.of_queries + 2 * (at * p.shape.heads + kv * p.shape.group), p.shape.group);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) turn_reach(const __grid_constant__ TurnParams p) {
  const TurnBlock b(p, p.shape.k_blocks);
  const int j0 = b.block * BLOCK_N, last = min(j0 + BLOCK_N, b.sequence.k_len) - 1;
  if (j0 > last) return;
  const int rows = ceil_div(b.sequence.q_len, BLOCK_M);
  int before = -rows, hi = 0;  // of the first block of queries, its negative
  for (int r = threadIdx.x; r < rows; r += THREADS) {
    const KeysInReach<1> keys = b.keys(p, r);
    if (keys.end > j0) before = max(before, -r);
    if (keys.first <= last) hi = max(hi, r + 1);
  }
  before = greatest(before, of_warps);
  hi = greatest(hi, of_warps);
  if (threadIdx.x == 0) {
    const int64_t at = block_of_all<BLOCK_N>(p.shape, b.sequence, b.index, b.block);
    int32_t* to = p.reach + 2 * (at * b.kv_heads + b.kv);
    to[0] = -before;
    to[1] = hi;
  }
}

// The first block of keys that walks each block of queries: one whose last query needs it, or a later one.
extern "C" __global__ void __launch_bounds__(THREADS) first_in_reach(const __grid_constant__ TurnParams p) {
  const TurnBlock b(p, p.shape.q_blocks);
  const int rows = ceil_div(b.sequence.q_len, BLOCK_M);
  if (b.block >= rows) return;
  int before = -b.sequence.k_len;
  for (int r = b.block + threadIdx.x; r < rows; r += THREADS) before = max(before, -b.keys(p, r).first);
  before = greatest(before, of_warps);
  if (threadIdx.x == 0) {
    const int64_t at = first_query_block<BLOCK_M>(p.shape, b.sequence, b.index) + b.block;
    p.first[at * b.kv_heads + b.kv] = -before / BLOCK_N;
  }
}

}  // namespace posattn
