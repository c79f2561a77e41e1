// One block of the backward pass for sm_90a: what it holds in shared memory, and how that is filled.
//
// A ring of STAGES steps, each one tile of queries and of dO and what belongs to its rows, arrives by bulk copies that
// an mbarrier counts. The block meets once a step, when all of dS^T is there: by then every warp has done with the step
// before, so its stage is filled again, and with two tiles of dS^T nothing else needs a barrier.
#pragma once
#include "backward/keys.h"
#include "backward/sm90/diagonals.h"
#include "backward/sm90/products.h"
#include "backward/sums.h"

namespace posattn {

constexpr int STAGES = 3;
constexpr int K_AT = 0;
constexpr int V_AT = K_AT + Tile<PADDED>::bytes(BLOCK_N);
constexpr int Q_AT = V_AT + Tile<PADDED>::bytes(BLOCK_N);
constexpr int Q_BYTES = Tile<PADDED>::bytes(BLOCK_M);
constexpr int GRAD_AT = Q_AT + Q_BYTES;
constexpr int STAGE_BYTES = 2 * Q_BYTES;
constexpr int DS_AT = Q_AT + STAGES * STAGE_BYTES;
constexpr int DS_BYTES = Tile<BLOCK_M>::bytes(BLOCK_N);
constexpr int ROWS_AT = DS_AT + 2 * DS_BYTES;
constexpr int STRIP_AT = ROWS_AT + STAGES * RowStage::FLOATS * 4;
constexpr int DIAGONALS_AT = STRIP_AT + WARPS * Strip::FLOATS * 4;
constexpr int BARRIERS_AT = DIAGONALS_AT + TileDiagonals::FLOATS * 4;
static_assert(SHARED_BYTES == BARRIERS_AT + STAGES * 8);
static_assert(RowStage::FLOATS % 4 == 0 && !HAS_PROFILE);

extern __shared__ __align__(1024) unsigned char shared[];

// A stage of the ring, and the parity of its phase.
struct RingStage {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    parity ^= stage == STAGES - 1;
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
};

struct Sm90Block : KeyBlock {
  uint32_t memory;
  int end_head;  // behind the last of the heads that share the key head; the first if their queries see no key

  __device__ __forceinline__ Sm90Block(const BackwardParams& p, const Sequence& sequence, int index, int key_head,
                                       int key_block)
      : KeyBlock(p, sequence, index, key_head, key_block),
        memory(ptx::shared_address(shared)),
        end_head(key_head * p.shape.group + (spans.lo < spans.hi ? p.shape.group : 0)) {}

  __device__ __forceinline__ Cursor after(const Cursor& at) const {
    return at.block + 1 == spans.hi ? first_block(at.head + 1) : Cursor{at.head, at.block + 1, at.row + BLOCK_M};
  }

  __device__ __forceinline__ uint32_t barrier(int stage) const { return memory + BARRIERS_AT + stage * 8; }

  __device__ __forceinline__ void make_barriers() const {
    if (thread == 0) {
      for (int stage = 0; stage < STAGES; ++stage) ptx::mbarrier_init(barrier(stage), 1);
      ptx::fence_mbarrier_init();
    }
  }

  // Starts the copies of one step, if there is such a step.
  __device__ __forceinline__ void load_step(const Cursor& at, int stage) const {
    if (thread != 0 || at.head >= end_head) return;
    constexpr int STRIP_BYTES = RowStage::STRIP * 4 * (HAS_TABLE && STRIPS);
    constexpr int ROW_BYTES = BLOCK_M * 4;
    const uint32_t done = barrier(stage), tiles = memory + Q_AT + stage * STAGE_BYTES;
    const uint32_t rows = memory + ROWS_AT + stage * RowStage::FLOATS * 4;
    ptx::mbarrier_arrive_expect_tx(done, STAGE_BYTES + 2 * ROW_BYTES + STRIP_BYTES);
    const int64_t tile = at.row * int64_t{PADDED};
    ptx::cp_async_bulk(tiles, static_cast<const Element*>(p.q) + tile, Q_BYTES, done);
    ptx::cp_async_bulk(tiles + Q_BYTES, static_cast<const Element*>(p.grad_out) + tile, Q_BYTES, done);
    ptx::cp_async_bulk(rows + RowStage::LSE2 * 4, p.lse2 + at.row, ROW_BYTES, done);
    ptx::cp_async_bulk(rows + RowStage::MINUS_DELTA * 4, p.minus_delta + at.row, ROW_BYTES, done);
    if constexpr (HAS_TABLE && STRIPS) {
      const int diagonal = (first_diagonal() & ~3) + at.block * BLOCK_M;
      const float* from = p.table + at.head * int64_t{p.diagonals} + diagonal;
      ptx::cp_async_bulk(rows + RowStage::TABLE * 4, from, RowStage::STRIP * 4, done);
    }
  }
};

}  // namespace posattn
