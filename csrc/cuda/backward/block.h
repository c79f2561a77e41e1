// One block of the backward pass: which keys and queries it walks, what it holds in shared memory, and the copies that
// fill it.
#pragma once
#include "backward/keys.h"
#include "backward/sums.h"

namespace posattn {

// Shared memory: K, V, two stages of Q and GRAD_STAGES of dO, P^T if it does not stay in registers, dS^T, two stages of
// what belongs to rows, the warps' strips. At the end dK and dV take the place of K and V, as float32.
using Wide = Tile<PADDED>;
constexpr int K_AT = 0;
constexpr int V_AT = K_AT + Wide::bytes(BLOCK_N);
constexpr int Q_AT = V_AT + Wide::bytes(BLOCK_N);
constexpr int Q_BYTES = Wide::bytes(BLOCK_M);
constexpr int GRAD_AT = Q_AT + 2 * Q_BYTES;
constexpr int P_AT = GRAD_AT + GRAD_STAGES * Q_BYTES;
constexpr int DS_AT = P_AT + (WEIGHTS_IN_REGISTERS ? 0 : Tile<BLOCK_M>::bytes(BLOCK_N));
constexpr int ROWS_AT = DS_AT + Tile<BLOCK_M>::bytes(BLOCK_N);
constexpr int STRIP_AT = ROWS_AT + 2 * RowStage::FLOATS * 4;
constexpr int COLUMNS_AT = STRIP_AT + WARPS * Strip::FLOATS * 4;
static_assert(SHARED_BYTES == COLUMNS_AT + (WANT_SLOPE ? WARP * 16 : 0));
static_assert(GRAD_STAGES == 1 || GRAD_STAGES == 2);
static_assert(RowStage::FLOATS % 4 == 0 && BLOCK_M % 32 == 0);

extern __shared__ __align__(128) unsigned char shared[];

__device__ __forceinline__ uint32_t shared_at() {
  return ptx::shared_address(shared);
}

// Registers are short where a warp owns both dK and dV of 32 keys, and with sums of operands. What follows from a
// thread's number is then derived at each use rather than kept and spilled.
constexpr bool REGISTERS_ARE_SHORT = QUERY_PARTS > 1 || WANT_SLOPE || WANT_TABLE || WANT_LINES || WANT_PSI;

struct BackwardBlock : KeyBlock {
  const Element* q;  // the rows that are loaded next
  const Element* grad_out;

  __device__ __forceinline__ BackwardBlock(const BackwardParams& p, const Sequence& sequence, int index, int key_head,
                                           int key_block)
      : KeyBlock(p, sequence, index, key_head, key_block),
        q(first_of(p.q, p.q_strides)),
        grad_out(first_of(p.grad_out, p.grad_out_strides)) {}

  // The first block of queries, of the first of the heads that share the key head.
  __device__ __forceinline__ const Element* first_of(const void* tensor, const Strides& strides) const {
    return static_cast<const Element*>(tensor) + sequence.batch * strides.batch +
           int64_t{key_head} * p.shape.group * strides.head + (sequence.q_start + spans.lo * BLOCK_M) * strides.token;
  }

  // Blocks are loaded in the order in which they are walked; after the last one of a head:
  __device__ __forceinline__ void load_next_head() {
    const int64_t back = (end() - first()) * BLOCK_M;
    q += p.q_strides.head - back * p.q_strides.token;
    grad_out += p.grad_out_strides.head - back * p.grad_out_strides.token;
  }

  // This thread's number, for what shall not be kept. Held in a register where strips are added up, else read again:
  // of the two, what compiles without spills for most architectures.
  __device__ __forceinline__ int anew() const {
    if constexpr (!REGISTERS_ARE_SHORT) return thread;
    return HAS_TABLE || HAS_PROFILE ? ptx::fresh(thread) : ptx::tid_x();
  }

  // Starts the copies of a block of queries; what is the lane's own is derived anew rather than kept from step to step.
  template <int USED>
  __device__ __forceinline__ void load_block(const Element*& rows, int64_t stride, const Cursor& at, uint32_t to) {
    Loader<PADDED, USED, BLOCK_M, THREADS> loader(rows, stride, 0, to, anew());
    loader.next(0, sequence.q_len - at.block * BLOCK_M);
    rows += BLOCK_M * stride;
  }

  __device__ __forceinline__ void load_queries(const Cursor& at, int stage) {
    const uint32_t memory = shared_at();
    load_block<DIM>(q, p.q_strides.token, at, memory + Q_AT + stage * Q_BYTES);
    load_rows(at, memory + ROWS_AT + stage * RowStage::FLOATS * 4);
  }

  __device__ __forceinline__ void load_grad(const Cursor& at, int stage) {
    load_block<DIM_V>(grad_out, p.grad_out_strides.token, at, shared_at() + GRAD_AT + stage % GRAD_STAGES * Q_BYTES);
  }

  __device__ __forceinline__ void load_rows(const Cursor& at, uint32_t to) {
    // Four numbers a thread; padded rows and diagonals are there to be read.
    constexpr int EACH = BLOCK_M / 4;
    const int thread = anew();
    const int which = thread / EACH;
    if (which < (HAS_PROFILE ? 3 : 2)) {
      const uint32_t row = which == 2 ? at.row - at.head * static_cast<uint32_t>(p.rows) : at.row;
      const float* from = which == 0 ? p.lse2 : which == 1 ? p.minus_delta : p.row_scale;
      ptx::cp_async_16(to + thread * 16, from + row + thread % EACH * 4);
    }
    if constexpr (STRIPS) {
      static_assert(RowStage::STRIP / 4 <= THREADS);
      const int diagonal = (first_diagonal() & ~3) + at.block * BLOCK_M + thread * 4;
      if (thread < RowStage::STRIP / 4) {
        if constexpr (HAS_TABLE) {
          ptx::cp_async_16(to + RowStage::TABLE * 4 + thread * 16, p.table + at.head * int64_t{p.diagonals} + diagonal);
        }
        if constexpr (HAS_PROFILE) ptx::cp_async_16(to + RowStage::PSI * 4 + thread * 16, p.psi + diagonal);
      }
    }
  }
};

}  // namespace posattn
