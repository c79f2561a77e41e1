// Attention backward with DAPE: dQ, dK, dV, the MLP's gradients and those of both biases, in one pass over the tiles.
//
// A block owns 16 keys of all heads and walks the queries 24 at a time, the logits transposed: keys by queries, so that
// the fragments of P^T and dX^T are the operands of dV and dK as they are. A warp owns a head and keeps its dK and dV
// in registers; the MLP belongs to MLP_WARPS warps of their own, for its weights and their sums take as many registers
// again. While these work, the heads' warps multiply: dO V^T beside the MLP's forward half, dV beside its backward
// half. dQ, to which all blocks of keys add, is summed in global memory, in the order of the fragments.
//
// ORDERED: blocks of keys add to dQ one after the other (common/dq_semaphore.h) and to everything else in integers.
#include "headmix/head_backward.h"
#include "headmix/mlp_backward.h"

namespace posattn::headmix {

extern __shared__ __align__(128) unsigned char shared[];

__device__ __forceinline__ void run_head(const Block& of) {
  const QuerySpan& span = of.span;
  HeadWarp head(of, span.lo);
  if (span.lo < span.hi) head.keep_keys();
#pragma unroll 1
  for (int i0 = span.lo; i0 < span.hi; i0 += BLOCK_N) {
    Tile s, ds, slack;
    Statistics statistics;
    head.start(s, slack, i0);
    ptx::bar_sync();
    head.multiply_grad(ds, statistics);
    ptx::bar_sync();
    head.weigh(s, ds, statistics, ptx::fresh(i0));
    Weights weights;
    round_tile(weights, s);
    ptx::bar_sync();
    head.add_values(weights);
    ptx::bar_sync();
    head.finish(ds, slack, ptx::fresh(i0));
    head.next_tile();
  }
  head.store();
}

__device__ __forceinline__ void run_mlp(const Block& of) {
  const Lane lane{of.lane.lane, of.lane.warp - HEADS, of.lane.g, of.lane.t};
  MlpBackward mlp(of.p.mix, of.p.scale, lane);
  const MlpBackward::Inputs x(of.memory + X_AT, lane);
  const MlpBackward::Gradients ds(of.memory + DS_AT, lane);
  const uint32_t to = of.memory + MIXED_AT + 2 * lane.t * MIXED_HEAD + 4 * lane.g;
#pragma unroll 1
  for (int i0 = of.span.lo; i0 < of.span.hi; i0 += BLOCK_N) {
    ptx::bar_sync();
#pragma unroll 2
    for (int tile = lane.warp; tile < POSITION_TILES; tile += MLP_WARPS) mlp.run_forward(x, 16 * tile, to + 32 * tile);
    ptx::bar_sync();
    ptx::bar_sync();
#pragma unroll 1
    for (int tile = lane.warp; tile < POSITION_TILES; tile += MLP_WARPS) mlp.run(x, ds, 16 * tile, to + 32 * tile);
    ptx::bar_sync();
  }
  const int64_t slot = static_cast<int64_t>(of.index) * MLP_WARPS + lane.warp;
  mlp.store(of.p.dw1 + slot * (WIDTH * INPUTS), of.p.db1 + slot * WIDTH, of.p.dw2 + slot * (HEADS * WIDTH),
            SCALED ? 1.0f : of.p.scale, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    headmix_backward(const __grid_constant__ HeadMixBackwardParams p) {
  const int block = block_number(p.dq_semaphore, shared);
  const int index = block / p.shape.k_blocks;
  const Sequence sequence(p.shape, p.mask, index);
  const int j0 = block % p.shape.k_blocks * BLOCK_M;
  if (j0 >= sequence.k_len) return;
  const int first_tile = PACKED ? sequence.q_start / BLOCK_N + index : index * ceil_div(p.shape.q_tokens, BLOCK_N);
  const int64_t first_row = static_cast<int64_t>(first_tile) * BLOCK_N;
  const QuerySpan span(sequence, p.mask, j0);
  const int slot = block_of_all<BLOCK_M>(p.shape, sequence, index, block % p.shape.k_blocks);
  const Block of{p, sequence, span, this_lane(), ptx::shared_address(shared), slot, j0, first_row};
  store_ones(of.memory + X_AT);
  if (threadIdx.x == 0) of.keep_span();
  if (of.lane.warp < HEADS) {
    run_head(of);
  } else {
    run_mlp(of);
  }
}

}  // namespace posattn::headmix
