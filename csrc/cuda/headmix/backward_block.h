// What the warps of the backward kernel share: a block's keys and queries, shared memory, and the queries' gradient.
#pragma once
#include "bias/dense.h"
#include "common/dq_semaphore.h"
#include "headmix/rows.h"

namespace posattn::headmix {

static_assert(!FOLD_SLOPE && GROUPS == 1 && HEADS_PER_WARP == 1 && WARPS == HEADS + MLP_WARPS);

// Shared memory. Of each head as A operands: keys, values, keys transposed; then x, the gradient of the logits, and
// what the MLP gives back: first what it adds to the logits, then the gradient of its inputs.
constexpr int K_BYTES = 16 * HEAD_DIM * 2;
constexpr int V_BYTES = 16 * HEAD_DIM_V * 2;
constexpr int HEAD_BYTES = 2 * K_BYTES + V_BYTES;
constexpr int X_AT = HEADS * HEAD_BYTES;
constexpr int DS_AT = X_AT + X_BYTES;
constexpr int MIXED_AT = DS_AT + HEADS * X_HEAD;
constexpr int MIXED_BLOCKS = INPUT_BLOCKS > HEAD_BLOCKS ? INPUT_BLOCKS : HEAD_BLOCKS;
constexpr int SPAN_AT = MIXED_AT + MIXED_BLOCKS * 8 * MIXED_HEAD;  // where no query's mask is needed: two integers
static_assert(SHARED_BYTES >= SPAN_AT + 16);

using Tile = float[GROUPS][N8][4];

template <class F>
__device__ __forceinline__ void for_tile(F f) {
#pragma unroll
  for (int n = 0; n < N8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) f(n, e);
  }
}

// The queries that see keys j0 .. j0 + 15: [lo, hi), lo a multiple of BLOCK_N. A tile of queries each of which sees all
// of them begins in [full_lo, full_hi).
struct QuerySpan {
  int lo = 0;
  int hi;
  int full_lo = 0;
  int full_hi;

  __device__ __forceinline__ QuerySpan(const Sequence& s, const MaskParams& mask, int j0) {
    const int last = min(j0 + BLOCK_M, s.k_len) - 1;
    hi = full_hi = s.q_len;
    if constexpr (HAS_RIGHT) {
      lo = max(j0 - s.offset() - mask.right, 0) / BLOCK_N * BLOCK_N;
      full_lo = j0 + BLOCK_M - 1 - s.offset() - mask.right;
    }
    if constexpr (HAS_LEFT) {
      hi = min(hi, max(last - s.offset() + mask.left + 1, 0));
      full_hi = j0 - s.offset() + mask.left + 1 - (BLOCK_N - 1);
    }
    if (j0 + BLOCK_M > s.k_len) full_lo = full_hi = hi;
  }
};

struct Block {
  const HeadMixBackwardParams& p;
  const Sequence sequence;
  const QuerySpan span;
  const Lane lane;
  const uint32_t memory;
  const int index;  // among the blocks of all sequences
  const int j0;
  const int64_t first_row;  // of the sequence, in padded rows

  // By one thread; a barrier must follow.
  __device__ __forceinline__ void keep_span() const {
    ptx::st_shared(memory + SPAN_AT, static_cast<uint32_t>(span.full_lo));
    ptx::st_shared(memory + SPAN_AT + 4, static_cast<uint32_t>(span.full_hi));
  }

  // Whether some query of the tile does not see some key. Read from shared memory: registers are short.
  __device__ __forceinline__ bool border(int i0) const {
    uint32_t full[2];
    ptx::ld_shared_v2(full, memory + SPAN_AT);
    return i0 < static_cast<int>(full[0]) || (HAS_LEFT && i0 >= static_cast<int>(full[1]));
  }

  __device__ __forceinline__ bool allowed(int h, int i, int j) const {
    const int place = i + sequence.offset();
    bool visible = j < sequence.k_len;
    if constexpr (HAS_RIGHT) visible &= j <= place + p.mask.right;
    if constexpr (HAS_LEFT) visible &= j >= place - p.mask.left;
    if constexpr (HAS_BOOLEAN) {
      const int64_t at =
          pair_offset(p.mask.boolean_strides, sequence.batch, h, sequence.q_start + min(i, sequence.q_len - 1),
                      sequence.k_start + min(j, sequence.k_len - 1));
      visible &= p.mask.boolean[at] != 0;
    }
    return visible;
  }

  // ORDERED: a warp waits until all earlier blocks of keys that see the tile have added to its head's dQ there.
  __device__ __forceinline__ void wait_for_earlier_blocks(int h, int i0) const {
    if constexpr (ORDERED) {
      const int before = blocks_before<BLOCK_M>(j0 / BLOCK_M, sequence, p.mask, i0);
      if (lane.lane == 0) wait_for_earlier(added(h, i0), before);
      ptx::bar_warp_sync();
    }
  }

  __device__ __forceinline__ void release_next_block(int h, int i0) const {
    if constexpr (ORDERED) {
      ptx::bar_warp_sync();
      if (lane.lane == 0) release_next(added(h, i0));
    }
  }

private:
  __device__ __forceinline__ int32_t* added(int h, int i0) const {
    return p.dq_semaphore + 1 + (h * p.rows + first_row + i0) / BLOCK_N;
  }
};

}  // namespace posattn::headmix
