// Backward pass for sm_80 and later: dK, dV, dQ and the gradients of every operand in one pass, five products a tile.
//
// A block owns BLOCK_N keys of one key head and walks the query blocks that see them, of all query heads that share the
// key head. dK and dV stay in registers. dQ, to which every block of keys adds, is accumulated in float32 in global
// memory, in the order of the fragments, so that a warp's addition is one contiguous line and needs no addresses.
// rows.cu turns it into rows. Recomputing it in a pass of its own would make seven products of five, and at
// D = 128 those alone take longer than this kernel.
#include "backward/block.h"
#include "backward/dropout.h"
#include "backward/store.h"

namespace posattn {

struct Backward : BackwardBlock {
  using BackwardBlock::BackwardBlock;

  // This thread's warp and lane, and where the warp's part of the logits begins.
  struct Own {
    int warp;
    int lane;
    int row;
    int column;
  };

  __device__ __forceinline__ Own own() const {
    const uint32_t here = anew();
    const int warp = REGISTERS_ARE_SHORT ? here / WARP : this->warp;
    const int lane = REGISTERS_ARE_SHORT ? here % WARP : this->lane;
    return {warp, lane, warp / LOGIT_COLUMNS * WARP_KEYS, warp % LOGIT_COLUMNS * WARP_QUERIES};
  }

  // Where this lane reads operands. Keys: this warp's, as A; all of them, at this warp's dimensions of dQ, as B.
  __device__ __forceinline__ auto keys(uint32_t tile) const {
    const Own o = own();
    return Rows<PADDED>::by_rows(shared_at() + tile, o.row, 0, o.lane);
  }
  __device__ __forceinline__ auto all_keys() const {
    const Own o = own();
    const int chunk = o.warp % QUERY_COLUMNS * QueryGradients::EIGHTS;
    return Rows<PADDED, QueryGradients::EIGHTS>::by_rows(shared_at() + K_AT, 0, chunk, o.lane);
  }
  // Queries, or dO, from a row of the block on: this warp's as B, and all, at this warp's dimensions of dK and dV, as
  // B.
  __device__ __forceinline__ auto queries(uint32_t tile, int row) const {
    const Own o = own();
    return Rows<PADDED>::by_columns(shared_at() + tile + row * Wide::PITCH, o.column, 0, o.lane);
  }
  __device__ __forceinline__ auto all_queries(uint32_t tile, int row) const {
    const Own o = own();
    const int chunk = o.warp % KEY_COLUMNS * KeyGradients::EIGHTS;
    return Rows<PADDED, KeyGradients::EIGHTS>::by_rows(shared_at() + tile + row * Wide::PITCH, 0, chunk, o.lane);
  }
  // P^T or dS^T by this warp's keys of dK and dV, and dS by its queries of dQ.
  __device__ __forceinline__ auto pairs(uint32_t tile) const {
    const Own o = own();
    return Rows<BLOCK_M>::by_rows(shared_at() + tile, o.warp / KEY_COLUMNS * (16 * KeyGradients::GROUPS), 0, o.lane);
  }
  __device__ __forceinline__ auto pairs_by_query() const {
    const Own o = own();
    const int chunk = o.warp / QUERY_COLUMNS * (2 * QueryGradients::GROUPS);
    return Rows<BLOCK_M, 2 * QueryGradients::GROUPS>::by_columns(shared_at() + DS_AT, 0, chunk, o.lane);
  }
  // Where the logits of a part of the queries are stored.
  __device__ __forceinline__ uint32_t own_pairs(uint32_t tile, int part) const {
    const Own o = own();
    return first_pair(shared_at() + tile, o.warp, o.lane) ^ part * (PART * 2);
  }

  __device__ __forceinline__ void add_to_queries(const Fragments<QueryGradients>& dq, const Cursor& at) const {
    const int thread = anew();
    float* to = p.dq + at.row * int64_t{PADDED} + thread;
    in_order(at, thread, [&] {
#pragma unroll
      for (int group = 0; group < QueryGradients::GROUPS; ++group) {
#pragma unroll
        for (int n = 0; n < QueryGradients::EIGHTS; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            ptx::red_add(to + ((group * QueryGradients::EIGHTS + n) * 4 + e) * THREADS, dq[group][n][e]);
          }
        }
      }
    });
  }

  __device__ __forceinline__ void run();
};

__device__ __forceinline__ void Backward::run() {
  const Strip strip(reinterpret_cast<float*>(shared + STRIP_AT), warp, lane);

  Fragments<KeyGradients> dk = {}, dv = {};
  Cursor at = first_block(key_head * p.shape.group);
  const int end_head = spans.lo < spans.hi ? at.head + p.shape.group : at.head;
  int stage = 0;
  SegmentRanges ranges;

  uint4* columns = reinterpret_cast<uint4*>(shared + COLUMNS_AT);
  if (SLOPE_BY_PRODUCT && warp == 0) columns[lane] = slope_columns(lane);
  Sums sums(p, index, block_of_all<BLOCK_N>(p.shape, sequence, index, key_block) * WARPS + warp);
  HeadBias head(p.bias, sequence.batch, at.head);

  load_keys<Wide>(shared_at() + K_AT, shared_at() + V_AT);
  if (at.head < end_head) {
    load_queries(at, 0);
    load_grad(at, 0);
  }
  ptx::cp_async_commit_group();

#pragma unroll 1
  while (at.head < end_head) {
    ptx::cp_async_wait_group<0>();
    ptx::bar_sync();  // this step's queries are there, and nobody needs the last step's
    const bool last = at.block + 1 == end();
    if (last) load_next_head();
    const Cursor next = last ? first_block(at.head + 1) : Cursor{at.head, at.block + 1, at.row + BLOCK_M};
    const bool more = next.head < end_head;
    if (more) {
      load_queries(next, stage ^ 1);
      if constexpr (GRAD_STAGES == 2) load_grad(next, stage ^ 1);
    }
    ptx::cp_async_commit_group();

    const uint32_t q_at = Q_AT + stage * Q_BYTES, grad_at = GRAD_AT + (GRAD_STAGES == 1 ? 0 : stage) * Q_BYTES;
    const float* stage_rows = reinterpret_cast<const float*>(shared + ROWS_AT) + stage * RowStage::FLOATS;

#pragma unroll
    for (int part = 0; part < QUERY_PARTS; ++part) {
      const float* rows = stage_rows + part * PART;
      const auto [warp, lane, logit_row, logit_column] = own();
      const LogitPlace place{at.block * BLOCK_M + part * PART + logit_column, key_block * BLOCK_N + logit_row, lane / 4,
                             lane % 4};
      const int column = logit_column + 2 * place.t;
      const int strip_at = column - logit_row - place.g - 8 * BANDS_BEFORE + BLOCK_N - 1 + (first_diagonal() & 3);
      const Operands operands(p, sequence, place, rows, strip_at, column);
      SegmentRange range;
      if constexpr (HAS_PROFILE && EXPLICIT) range = operands.segments(p.bias);
      if constexpr (HAS_PROFILE && !EXPLICIT) {
        const int ahead = (at.block - spans.lo) * QUERY_PARTS % WARP;
        if (ahead == 0 && part == 0) ranges.find(p.bias, place, sequence.offset(), lane);
        range = ranges.of(ahead + part);
      }

      Fragments<Logits> s = {}, slack;
      product<PADDED / 16, As::IS, As::IS>(s, keys(K_AT), queries(q_at, part * PART));
      add_terms(s, slack, p, sequence, place, operands, head, range, at.head, rows + RowStage::LSE2 + column);
      const bool border = spans.border(at.block);
      mask_logits(s, p, sequence, place, at.head, border);
      for_logits([&](int group, int n, int e) { s[group][n][e] = ptx::ex2_approx(s[group][n][e]); });

      // dP^T - delta: the product starts from -delta, unless dropout stands between the two.
      Fragments<Logits> ds;
#pragma unroll
      for (int n = 0; n < Logits::EIGHTS; ++n) {
        const float2 delta = *reinterpret_cast<const float2*>(rows + RowStage::MINUS_DELTA + column + 8 * n);
#pragma unroll
        for (int group = 0; group < Logits::GROUPS; ++group) {
          ds[group][n][0] = ds[group][n][2] = HAS_DROPOUT ? 0.0f : delta.x;
          ds[group][n][1] = ds[group][n][3] = HAS_DROPOUT ? 0.0f : delta.y;
        }
      }
      product<PADDED / 16, As::IS, As::IS>(ds, keys(V_AT), queries(grad_at, part * PART));

      uint32_t weights[Logits::GROUPS][Logits::EIGHTS / 2][4];
      if constexpr (HAS_DROPOUT) {
        Fragments<Logits> kept;
        for_logits([&](int group, int n, int e) { kept[group][n][e] = s[group][n][e]; });
        drop(kept, ds, p, sequence, place, at.head);
        for_logits([&](int group, int n, int e) {
          ds[group][n][e] += rows[RowStage::MINUS_DELTA + column + 8 * n + (e & 1)];
        });
        round_fragments(weights, kept);
      } else {
        round_fragments(weights, s);
      }
      if constexpr (!WEIGHTS_IN_REGISTERS) store_pairs(own_pairs(P_AT, part), weights);
      for_logits([&](int group, int n, int e) { ds[group][n][e] *= s[group][n][e]; });
      if constexpr (SLOPE_BY_PRODUCT) {
        if (border) sums.add_slope_on_border(ds, place, sequence.offset());
      }
      sums.add(ds, sequence, place, operands, head, range,
               strip.again(reinterpret_cast<float*>(shared + STRIP_AT), warp, lane), at.head,
               at.row + part * PART + logit_column);
      if constexpr (HAS_SOFTCAP) {
        for_logits([&](int group, int n, int e) { ds[group][n][e] *= slack[group][n][e]; });
      }
      uint32_t rounded[Logits::GROUPS][Logits::EIGHTS / 2][4];
      round_fragments(rounded, ds);
      store_pairs(own_pairs(DS_AT, part), rounded);

      if constexpr (WEIGHTS_IN_REGISTERS) {
        product<As::TRANSPOSED>(dv, weights, all_queries(grad_at, part * PART));
        product<As::TRANSPOSED>(dk, rounded, all_queries(q_at, part * PART));
      }
      if constexpr (INTERCEPT_BY_PRODUCT) sums.add_intercept(rounded, range);
      if constexpr (SLOPE_BY_PRODUCT) {
        // On the border of nothing, so that the loop has no branch around it.
        sums.add_slope(rounded, border ? uint4{} : columns[lane], place, sequence.offset());
      }
    }
    ptx::bar_sync();  // dS^T is there as a whole, and P^T where it goes by shared memory
    if constexpr (!WEIGHTS_IN_REGISTERS) {
      product<BLOCK_M / 16, As::IS, As::TRANSPOSED>(dv, pairs(P_AT), all_queries(grad_at, 0));
      product<BLOCK_M / 16, As::IS, As::TRANSPOSED>(dk, pairs(DS_AT), all_queries(q_at, 0));
    }
    if constexpr (GRAD_STAGES == 1) {
      if constexpr (!WEIGHTS_IN_REGISTERS) ptx::bar_sync();  // nobody needs dO
      if (more) load_grad(next, 0);
      ptx::cp_async_commit_group();
    }
    Fragments<QueryGradients> dq = {};
    product<BLOCK_N / 16, As::TRANSPOSED, As::TRANSPOSED>(dq, pairs_by_query(), all_keys());
    add_to_queries(dq, at);
    stage ^= 1;

    if (last) {
      sums.finish_head(at.head);
      if (more) head = HeadBias(p.bias, sequence.batch, next.head);
    }
    at = next;
  }
  ptx::cp_async_wait_group<0>();  // K and V, if no query sees them

  store_keys<true>(*this, dk, p.scale);
  store_keys<false>(*this, dv, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    attention_backward(const __grid_constant__ BackwardParams p) {
  run_block<Backward>(p, shared);
}

}  // namespace posattn
