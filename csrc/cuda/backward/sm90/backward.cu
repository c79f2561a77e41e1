// Backward pass for sm_90a: what backward/backward.cu does, by wgmma (products.h), on tiles that bulk copies bring
// (block.h).
//
// Two warpgroups of 64 keys each walk the queries. In a step S^T and dP^T are under way together, dV is while dS is
// computed, and dK is while the block waits for all of dS^T. dQ is added to global memory in the order in which
// backward/rows.cu expects it.
#include "backward/dropout.h"
#include "backward/sm90/block.h"
#include "backward/store.h"

namespace posattn {

// A linear slope's gradient, dS times distance, as two more columns of dK += dS^T Q: ones and the query's number in the
// tile, which 16 bits hold exactly. A lane of column 1 counts on from step to step.
struct SlopeColumns {
  uint32_t b[2];
  uint32_t step;

  __device__ __forceinline__ explicit SlopeColumns(int lane) {
    const int g = lane / 4;
    const float number = 2 * (lane % 4);
    b[0] = g == 0 ? pack(1.0f, 1.0f) : g == 1 ? pack(number, number + 1.0f) : 0;
    b[1] = g == 1 ? pack(number + 8.0f, number + 9.0f) : b[0];
    step = g == 1 ? pack(16.0f, 16.0f) : 0;
  }

  // The sum over a warp's logits, in the lanes that hold columns 0 and 1; zero in the others.
  __device__ __forceinline__ float sum(const uint32_t (&ds)[Logits::EIGHTS / 2][4], const LogitPlace& at,
                                       int shift) const {
    float product[4] = {};
    const uint32_t ones = pack(1.0f, 1.0f);
    uint32_t b0 = b[0], b1 = b[1];
#pragma unroll
    for (int n = 0; n < Logits::EIGHTS / 2; ++n) {
      mma(product, ds[n], b0, b1);
      b0 = BF16 ? ptx::fma_rn_bf16x2(step, ones, b0) : ptx::fma_rn_f16x2(step, ones, b0);
      b1 = BF16 ? ptx::fma_rn_bf16x2(step, ones, b1) : ptx::fma_rn_f16x2(step, ones, b1);
    }
    const float distance = static_cast<float>(at.i0 + shift - at.j0 - at.g);
    return fmaf(product[0], distance, product[1]) + fmaf(product[2], distance - 8.0f, product[3]);
  }
};

struct Backward : Sm90Block {
  using Sm90Block::Sm90Block;

  __device__ __forceinline__ void add_to_queries(const Fragments<QueryGradients>& dq, const Cursor& at) const {
    // backward/rows.cu counts parts of dQ by queries first, then dimensions.
    const int part = QUERY_COLUMNS == 1 ? warp : warp % 4 * 2 + warp / 4;
    float* to = p.dq + at.row * int64_t{PADDED} + (part * WARP + lane) * 4;
    in_order(at, thread, [&] {
#pragma unroll
      for (int n = 0; n < QueryGradients::EIGHTS; ++n) ptx::red_add_v4(to + n * (4 * THREADS), dq[0][n]);
    });
  }

  __device__ __forceinline__ void run();
};

__device__ __forceinline__ void Backward::run() {
  const Strip strip(reinterpret_cast<float*>(shared + STRIP_AT), warp, lane);
  // By a shuffle, so that the compiler knows it to be the same for a warp: descriptors live in uniform registers.
  const int group = ptx::shfl_idx(static_cast<uint32_t>(thread / WARPGROUP), 0);
  const Products products(memory + K_AT, memory + Q_AT, memory + DS_AT, group);

  Fragments<KeyGradients> dk = {}, dv = {};
  const SlopeColumns columns(lane);
  TileDiagonals diagonals;
  float* strips = reinterpret_cast<float*>(shared + DIAGONALS_AT);
  diagonals.clear(strips, thread);

  make_barriers();
  load_keys<KeyPanels>(memory + K_AT, memory + V_AT);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  ptx::fence_proxy_async();
  ptx::bar_sync();

  Cursor at = first_block(key_head * p.shape.group), ahead = at;
  Sums sums(p, index, block_of_all<BLOCK_N>(p.shape, sequence, index, key_block) * WARPS + warp);
  HeadBias head(p.bias, sequence.batch, at.head);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    load_step(ahead, stage);
    ahead = after(ahead);
  }
  RingStage ring;
  uint32_t pairs = 0;  // where this step's tile of dS^T lies

#pragma unroll 1
  while (at.head < end_head) {
    ptx::mbarrier_wait_parity(barrier(ring.stage), ring.parity);
    const uint32_t queries = ring.stage * STAGE_BYTES, grads = GRAD_AT - Q_AT + queries;
    const int j0 = key_block * BLOCK_N + warp * WARP_KEYS;
    const float* rows = reinterpret_cast<const float*>(shared + ROWS_AT) + ring.stage * RowStage::FLOATS;
    const LogitPlace place{at.block * BLOCK_M, j0, lane / 4, lane % 4};
    const int column = 2 * place.t;

    // dP^T - delta: the product starts from -delta, unless dropout stands between the two.
    Fragments<Logits> s, slack, ds;
#pragma unroll
    for (int n = 0; n < Logits::EIGHTS; ++n) {
      const float2 delta = *reinterpret_cast<const float2*>(rows + RowStage::MINUS_DELTA + column + 8 * n);
      ds[0][n][0] = ds[0][n][2] = HAS_DROPOUT ? 0.0f : delta.x;
      ds[0][n][1] = ds[0][n][3] = HAS_DROPOUT ? 0.0f : delta.y;
    }
    ptx::hold(s[0]);
    ptx::hold(ds[0]);
    ptx::wgmma_fence();
    products.logits<DIM>(s[0], 0, queries, false);
    products.logits<DIM_V>(ds[0], V_AT - K_AT, grads, true);
    ptx::wgmma_wait_group<1>();
    ptx::hold(s[0]);

    const int strip_at = column - warp * WARP_KEYS - place.g - 8 * BANDS_BEFORE + BLOCK_N - 1 + (first_diagonal() & 3);
    const Operands operands(p, sequence, place, rows, strip_at, column);
    const SegmentRange range;  // of profiles, which backward/backward.cu serves
    add_terms(s, slack, p, sequence, place, operands, head, range, at.head, rows + RowStage::LSE2 + column);
    const bool border = spans.border(at.block);
    mask_logits(s, p, sequence, place, at.head, border);
    for_logits([&](int group, int n, int e) { s[group][n][e] = ptx::ex2_approx(s[group][n][e]); });

    ptx::wgmma_wait_group<0>();
    ptx::hold(ds[0]);
    uint32_t weights[1][Logits::EIGHTS / 2][4];
    if constexpr (HAS_DROPOUT) {
      Fragments<Logits> kept;
      for_logits([&](int group, int n, int e) { kept[group][n][e] = s[group][n][e]; });
      drop(kept, ds, p, sequence, place, at.head);
      for_logits(
          [&](int group, int n, int e) { ds[group][n][e] += rows[RowStage::MINUS_DELTA + column + 8 * n + (e & 1)]; });
      round_fragments(weights, kept);
    } else {
      round_fragments(weights, s);
    }
    ptx::hold(dv[0]);
    ptx::wgmma_fence();
    products.key_gradients(dv[0], weights[0], grads);

    for_logits([&](int group, int n, int e) { ds[group][n][e] *= s[group][n][e]; });
    if constexpr (SLOPE_BY_PRODUCT) {
      if (border) sums.add_slope_on_border(ds, place, sequence.offset());
    }
    sums.add(ds, sequence, place, operands, head, range, strip, at.head, at.row);
    if constexpr (HAS_SOFTCAP) {
      for_logits([&](int group, int n, int e) { ds[group][n][e] *= slack[group][n][e]; });
    }
    uint32_t rounded[1][Logits::EIGHTS / 2][4];
    round_fragments(rounded, ds);
    if constexpr (SLOPE_BY_PRODUCT) {
      // On the border too, where it is not used, so that the loop has no branch around it.
      const float sum = columns.sum(rounded[0], place, sequence.offset());
      sums.slope += border ? 0.0f : sum;
    }
    store_pairs_matrix(memory + DS_AT + pairs, rounded[0], warp, lane);
    ptx::fence_proxy_async();

    ptx::hold(dk[0]);
    ptx::wgmma_fence();
    products.key_gradients(dk[0], rounded[0], queries);
    ptx::bar_sync();  // dS^T is there as a whole, and nobody needs the last step's tiles
    load_step(ahead, ring.stage == 0 ? STAGES - 1 : ring.stage - 1);
    ahead = after(ahead);
    Fragments<QueryGradients> dq;
    ptx::hold(dq[0]);
    ptx::wgmma_fence();
    products.query_gradients(dq[0], pairs);
    // Where the step's strip belongs, and which it is.
    const int64_t of_head = int64_t{sums.first_sum + at.head} * p.diagonals;
    const int first =
        at.block * BLOCK_M + sequence.offset() - key_block * BLOCK_N - p.first_distance - TileDiagonals::BEHIND;
    float* strip_here = strips + pairs / DS_BYTES * TileDiagonals::STRIP;
    float* strip_other = strips + (1 - pairs / DS_BYTES) * TileDiagonals::STRIP;
    if constexpr (TABLE_BY_PRODUCT) {
      if (at.block > spans.lo) diagonals.add_up(strip_other, thread, sums.global(p.dtable), of_head, first - BLOCK_M);
      diagonals.add(memory + DS_AT + pairs, strip_here, warp, lane);
    }
    ptx::wgmma_wait_group<0>();
    ptx::hold(dv[0]);
    ptx::hold(dk[0]);
    ptx::hold(dq[0]);
    add_to_queries(dq, at);
    pairs ^= DS_BYTES;
    ring.advance();

    const Cursor next = after(at);
    if (next.head != at.head) {
      sums.finish_head(at.head);
      if constexpr (TABLE_BY_PRODUCT) {
        // What the last step left, and the diagonals that no further step finishes.
        ptx::bar_sync();
        diagonals.add_up(strip_here, thread, sums.global(p.dtable), of_head, first);
        diagonals.finish(strip_other, warp, lane);
        ptx::bar_sync();
        diagonals.add_up(strip_other, thread, sums.global(p.dtable), of_head, first + BLOCK_M);
      }
      if (next.head < end_head) head = HeadBias(p.bias, sequence.batch, next.head);
    }
    at = next;
  }

  store_keys<true>(*this, dk, p.scale);
  store_keys<false>(*this, dv, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    attention_backward(const __grid_constant__ BackwardParams p) {
  run_block<Backward>(p, shared);
}

}  // namespace posattn
