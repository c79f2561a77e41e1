// One block of the backward pass for sm_90a: what it holds in shared memory, and how that is filled.
//
// A ring of STAGES steps, each one tile of queries and of dO and what belongs to its rows, arrives by bulk copies that
// an mbarrier counts. The block meets once a step, when all of dS^T is there: by then every warp has done with the step
// before, so its stage is filled again, and with two tiles of dS^T nothing else needs a barrier.
#pragma once
#include "backward_sm90_diagonals.h"
#include "backward_sm90_products.h"
#include "backward_spans.h"
#include "backward_sums.h"
#include "load.h"

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
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    parity ^= stage == STAGES - 1;
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
};

struct HopperBlock {
  const BackwardParams& p;
  Sequence sequence;
  int index;  // of the sequence
  int key_head;
  int key_block;
  QuerySpans spans;
  int thread;
  int warp;
  int lane;
  uint32_t first_row;  // of the sequence, in padded rows
  uint32_t memory;
  int end_head;  // behind the last of the heads that share the key head; the first if their queries see no key

  __device__ __forceinline__ HopperBlock(const BackwardParams& p, const Sequence& sequence, int index, int key_head,
                                         int key_block, int thread)
      : p(p),
        sequence(sequence),
        index(index),
        key_head(key_head),
        key_block(key_block),
        spans(sequence, p.mask, key_block * BLOCK_N, key_block * BLOCK_N + BLOCK_N - 1),
        thread(thread),
        warp(thread / WARP),
        lane(thread % WARP),
        first_row((PACKED ? sequence.q_start / BLOCK_M + index : index * p.shape.q_blocks) * BLOCK_M),
        memory(ptx::shared_address(shared)),
        end_head(key_head * p.shape.group + (spans.lo < spans.hi ? p.shape.group : 0)) {}

  __device__ __forceinline__ Cursor first_block(int head) const {
    return {head, spans.lo, head * static_cast<uint32_t>(p.rows) + first_row + spans.lo * BLOCK_M};
  }

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

  __device__ __forceinline__ void load_keys() const {
    const int j0 = key_block * BLOCK_N;
    Loader<PADDED, DIM, BLOCK_N, THREADS, KeyPanels> k(
        static_cast<const Element*>(p.k) + sequence.batch * p.k_strides.batch + key_head * p.k_strides.head,
        p.k_strides.token, sequence.k_start + j0, memory + K_AT, thread);
    k.next(0, sequence.k_len - j0);
    Loader<PADDED, DIM_V, BLOCK_N, THREADS, KeyPanels> v(
        static_cast<const Element*>(p.v) + sequence.batch * p.v_strides.batch + key_head * p.v_strides.head,
        p.v_strides.token, sequence.k_start + j0, memory + V_AT, thread);
    v.next(0, sequence.k_len - j0);
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

  // Of the first block of queries with the last of this block's keys; blocks of queries are a multiple of 4 apart.
  __device__ __forceinline__ int first_diagonal() const {
    return sequence.shift() - (key_block * BLOCK_N + BLOCK_N - 1) - p.first_distance;
  }
};

}  // namespace posattn
