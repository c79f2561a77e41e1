// Backward pass for sm_80 and later: dK, dV, dQ and the gradients of every operand in one pass, five products a tile.
//
// A block owns BLOCK_N keys of one key head and walks the query blocks that see them, of all query heads that share the
// key head. dK and dV stay in registers. dQ, to which every block of keys adds, is accumulated in float32 in global
// memory, in the order of the fragments, so that a warp's addition is one contiguous line and needs no addresses.
// backward_rows.cu turns it into rows. Recomputing it in a pass of its own would make seven products of five, and at
// D = 128 those alone take longer than this kernel.
//
// ORDERED: blocks of keys add to a block of queries one after the other, in the order of the keys, so the result does
// not depend on which runs first. A block draws a ticket, so all that it may have to wait for are already running.
#include "backward_sums.h"
#include "backward_turn.h"
#include "dropout.h"
#include "load.h"

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
static_assert(SHARED_BYTES == COLUMNS_AT + (WANT_SLOPE ? WARP * 8 : 0));
static_assert(GRAD_STAGES == 1 || GRAD_STAGES == 2);
static_assert(RowStage::FLOATS % 4 == 0 && BLOCK_M % 32 == 0);

extern __shared__ __align__(128) unsigned char shared[];

// A head dimension of 64 leaves no register for the sums of operands.
constexpr bool REGISTERS_ARE_SHORT = WANT_TABLE || WANT_LINES || WANT_PSI;

// The blocks of queries that see keys first .. last: [lo, hi), all of whose queries see all of the keys in
// [full_lo, full_hi). Queries past the end have weight zero and need no mask.
struct QuerySpans {
  int lo = 0;
  int full_lo = 0;
  int full_hi;
  int hi;

  __device__ __forceinline__ QuerySpans(const Sequence& s, const MaskParams& mask, int first, int last) {
    hi = full_hi = ceil_div(s.q_len, BLOCK_M);
    if constexpr (HAS_RIGHT) {
      lo = max(first - s.offset() - mask.right, 0) / BLOCK_M;
      full_lo = ceil_div(max(last - s.offset() - mask.right, 0), BLOCK_M);
    }
    if constexpr (HAS_LEFT) {
      hi = min(hi, ceil_div(max(last - s.offset() + mask.left + 1, 0), BLOCK_M));
      full_hi = min(full_hi, max(first - s.offset() + mask.left + 1, 0) / BLOCK_M);
    }
    if (last >= s.k_len) full_lo = hi;
  }

  __device__ __forceinline__ bool border(int block) const { return block < full_lo || block >= full_hi; }
};

// A block of queries of one of the heads that share the key head.
struct Cursor {
  int head;
  int block;
  uint32_t row;  // its first padded row, of all heads; their accumulators fit in memory, so their number fits here
};

struct Backward {
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
  Loader<PADDED, DIM, BLOCK_M, THREADS> q_loader;
  Loader<PADDED, DIM_V, BLOCK_M, THREADS> grad_loader;

  __device__ __forceinline__ Backward(const BackwardParams& p, const Sequence& sequence, int index, int key_head,
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
        q_loader(first_of(p.q, p.q_strides), p.q_strides.token, sequence.q_start + spans.lo * BLOCK_M,
                 ptx::shared_address(shared) + Q_AT, thread),
        grad_loader(first_of(p.grad_out, p.grad_out_strides), p.grad_out_strides.token,
                    sequence.q_start + spans.lo * BLOCK_M, ptx::shared_address(shared) + Q_AT, thread) {}

  // The first of the heads that share the key head.
  __device__ __forceinline__ const Element* first_of(const void* tensor, const Strides& strides) const {
    return static_cast<const Element*>(tensor) + sequence.batch * strides.batch +
           int64_t{key_head} * p.shape.group * strides.head;
  }

  // From behind the last block of one head to the first of the next, for a tensor of these strides.
  __device__ __forceinline__ int64_t to_next_head(int64_t head, int64_t token) const {
    return head - (spans.hi - spans.lo) * BLOCK_M * token;
  }

  // Blocks are loaded in the order in which they are walked; after the last one of a head:
  __device__ __forceinline__ void load_next_head() {
    q_loader.from += to_next_head(p.q_strides.head, p.q_strides.token);
    grad_loader.from += to_next_head(p.grad_out_strides.head, p.grad_out_strides.token);
  }

  __device__ __forceinline__ Cursor first_block(int head) const {
    return {head, spans.lo, head * static_cast<uint32_t>(p.rows) + first_row + spans.lo * BLOCK_M};
  }

  __device__ __forceinline__ void load_keys() {
    const int64_t kv = sequence.batch;
    const int j0 = key_block * BLOCK_N;
    const uint32_t memory = ptx::shared_address(shared);
    Loader<PADDED, DIM, BLOCK_N, THREADS> k(
        static_cast<const Element*>(p.k) + kv * p.k_strides.batch + key_head * p.k_strides.head, p.k_strides.token,
        sequence.k_start + j0, memory + K_AT, thread);
    k.next(0, sequence.k_len - j0);
    Loader<PADDED, DIM_V, BLOCK_N, THREADS> v(
        static_cast<const Element*>(p.v) + kv * p.v_strides.batch + key_head * p.v_strides.head, p.v_strides.token,
        sequence.k_start + j0, memory + V_AT, thread);
    v.next(0, sequence.k_len - j0);
  }

  __device__ __forceinline__ void load_queries(const Cursor& at, int stage) {
    q_loader.next(stage * Q_BYTES, sequence.q_len - at.block * BLOCK_M);
    load_rows(at, ptx::shared_address(shared) + ROWS_AT + stage * RowStage::FLOATS * 4);
  }

  __device__ __forceinline__ void load_grad(const Cursor& at, int stage) {
    grad_loader.next(GRAD_AT - Q_AT + stage % GRAD_STAGES * Q_BYTES, sequence.q_len - at.block * BLOCK_M);
  }

  __device__ __forceinline__ void load_rows(const Cursor& at, uint32_t to) {
    // Four numbers a thread; padded rows and diagonals are there to be read.
    constexpr int EACH = BLOCK_M / 4;
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

  // Of the first block of queries with the last of this block's keys; blocks of queries are a multiple of 4 apart.
  __device__ __forceinline__ int first_diagonal() const {
    return sequence.shift() - (key_block * BLOCK_N + BLOCK_N - 1) - p.first_distance;
  }

  // Weights and their gradients with dropout: what is kept is scaled, what is dropped is zero.
  __device__ __forceinline__ void drop(Fragments<Logits>& weights, Fragments<Logits>& grads, const LogitPlace& at,
                                       int head) const {
    if constexpr (HAS_DROPOUT) {
      const Dropout dropout(p.dropout, sequence.batch * p.shape.heads + head);
      for_logits([&](int group, int n, int e) {
        const uint32_t i = sequence.q_start + at.query(n, e), j = sequence.k_start + at.key(group, e);
        uint32_t word[4];
        dropout.words(word, i, j >> 2);
        const uint32_t low = j & 1 ? word[1] : word[0], high = j & 1 ? word[3] : word[2];
        const bool kept = (j & 2 ? high : low) >= dropout.threshold;
        weights[group][n][e] *= kept ? p.dropout.keep_scale : 0.0f;
        grads[group][n][e] *= kept ? p.dropout.keep_scale : 0.0f;
      });
    }
  }

  __device__ __forceinline__ void add_to_queries(const Fragments<QueryGradients>& dq, const Cursor& at) const {
    float* to = p.dq + at.row * int64_t{PADDED} + thread;
    int32_t* turn = p.turns + 1 + at.row / BLOCK_M;
    if constexpr (ORDERED) {
      // The first block of keys that these queries see has nobody before it.
      const int offset = sequence.offset();
      const int first = HAS_LEFT ? max(at.block * BLOCK_M + offset - p.mask.left, 0) / BLOCK_N : 0;
      if (thread == 0) {
        while (ptx::ld_acquire(turn) < key_block - first) {
        }
      }
      ptx::bar_sync();
    }
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
    if constexpr (ORDERED) {
      ptx::bar_sync();
      if (thread == 0) ptx::red_release_add(turn, 1);
    }
  }

  template <bool KEYS>
  __device__ __forceinline__ void store(const Fragments<KeyGradients>& sums, float factor) const;
  __device__ __forceinline__ void run();
};

// A fragment's sums through shared memory into rows of dK or dV.
template <bool KEYS>
__device__ __forceinline__ void Backward::store(const Fragments<KeyGradients>& sums, float factor) const {
  constexpr int USED = KEYS ? DIM : DIM_V;
  float* rows = reinterpret_cast<float*>(shared);
  // Half a warp stores two chunks of four floats in each of four rows: the swizzle puts these eight in all banks.
  const auto place = [](int row, int column) {
    return row * PADDED + (((column >> 2) ^ ((row & 3) << 1)) << 2) + (column & 3);
  };
  ptx::bar_sync();
  const int row0 = warp / KEY_COLUMNS * (16 * KeyGradients::GROUPS) + lane / 4;
  const int column0 = warp % KEY_COLUMNS * (8 * KeyGradients::EIGHTS) + lane % 4 * 2;
#pragma unroll
  for (int group = 0; group < KeyGradients::GROUPS; ++group) {
#pragma unroll
    for (int n = 0; n < KeyGradients::EIGHTS; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = place(row0 + 16 * group + 8 * half, column0 + 8 * n);
        ptx::st_shared_v2(ptx::shared_address(rows + at), sums[group][n][2 * half] * factor,
                          sums[group][n][2 * half + 1] * factor);
      }
    }
  }
  ptx::bar_sync();
  const Strides& strides = KEYS ? p.dk_strides : p.dv_strides;
  Element* to = static_cast<Element*>(KEYS ? p.dk : p.dv) + sequence.batch * strides.batch + key_head * strides.head;
  const int j0 = key_block * BLOCK_N;
  for (int x = thread; x < BLOCK_N * (USED / 8); x += THREADS) {
    const int row = x / (USED / 8), column = x % (USED / 8) * 8;
    if (j0 + row >= sequence.k_len) break;
    const int64_t token = sequence.k_start + j0 + row;
    alignas(16) float value[8];
    *reinterpret_cast<float4*>(value) = *reinterpret_cast<const float4*>(rows + place(row, column));
    *reinterpret_cast<float4*>(value + 4) = *reinterpret_cast<const float4*>(rows + place(row, column + 4));
    if constexpr (KEYS && ROTARY) {
      const int64_t angles = sequence.batch * p.k_angles.batch + token * HALF;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const Turned turned(column + c);
        if (turned.turns) {
          const float other = rows[place(row, turned.partner)];
          value[c] =
              turned.back(value[c], other, p.k_angles.cos[angles + turned.pair], p.k_angles.sin[angles + turned.pair]);
        }
      }
    }
    const uint4 words{pack(value[0], value[1]), pack(value[2], value[3]), pack(value[4], value[5]),
                      pack(value[6], value[7])};
    *reinterpret_cast<uint4*>(to + token * strides.token + column) = words;
  }
}

__device__ __forceinline__ void Backward::run() {
  const uint32_t memory = ptx::shared_address(shared);
  const Strip strip(reinterpret_cast<float*>(shared + STRIP_AT), warp, lane);

  Fragments<KeyGradients> dk = {}, dv = {};
  Cursor at = first_block(key_head * p.shape.group);
  const int end_head = spans.lo < spans.hi ? at.head + p.shape.group : at.head;
  int stage = 0;
  SegmentRanges ranges;

  uint2* columns = reinterpret_cast<uint2*>(shared + COLUMNS_AT);
  if (SLOPE_BY_PRODUCT && warp == 0) columns[lane] = slope_columns(lane);
  Sums sums(p, lane, index * p.shape.heads, key_block * WARPS + warp);
  HeadBias head(p.bias, sequence.batch, at.head);

  load_keys();
  if (at.head < end_head) {
    load_queries(at, 0);
    load_grad(at, 0);
  }
  ptx::cp_async_commit_group();

#pragma unroll 1
  while (at.head < end_head) {
    ptx::cp_async_wait_group<0>();
    ptx::bar_sync();  // this step's queries are there, and nobody needs the last step's
    const bool last = at.block + 1 == spans.hi;
    if (last) load_next_head();
    const Cursor next = last ? first_block(at.head + 1) : Cursor{at.head, at.block + 1, at.row + BLOCK_M};
    const bool more = next.head < end_head;
    if (more) {
      load_queries(next, stage ^ 1);
      if constexpr (GRAD_STAGES == 2) load_grad(next, stage ^ 1);
    }
    ptx::cp_async_commit_group();

    // Where registers are short, all this is derived in every step rather than spilled.
    const int here = REGISTERS_ARE_SHORT ? ptx::tid_x() : thread;
    const int warp = here / WARP, lane = here % WARP;
    const int logit_row = warp / LOGIT_COLUMNS * WARP_KEYS, logit_column = warp % LOGIT_COLUMNS * WARP_QUERIES;
    const int j0 = key_block * BLOCK_N;

    // Where this lane reads operands. Keys: this warp's, as A; all of them, at this warp's dimensions of dQ, as B.
    const auto keys = Rows<PADDED>::by_rows(memory + K_AT, logit_row, 0, lane);
    const auto values = keys.moved(V_AT - K_AT);
    const auto all_keys = Rows<PADDED, QueryGradients::EIGHTS>::by_rows(
        memory + K_AT, 0, warp % QUERY_COLUMNS * QueryGradients::EIGHTS, lane);
    // Queries: this warp's as B, and all of them, at this warp's dimensions of dK and dV, as B.
    const auto stage_queries = Rows<PADDED>::by_columns(memory + Q_AT, logit_column, 0, lane);
    const auto stage_all_queries =
        Rows<PADDED, KeyGradients::EIGHTS>::by_rows(memory + Q_AT, 0, warp % KEY_COLUMNS * KeyGradients::EIGHTS, lane);
    // P^T by this warp's keys of dV, and dS by its queries of dQ.
    const auto pairs = Rows<BLOCK_M>::by_rows(memory + P_AT, warp / KEY_COLUMNS * (16 * KeyGradients::GROUPS), 0, lane);
    const auto pairs_by_query = Rows<BLOCK_M, 2 * QueryGradients::GROUPS>::by_columns(
        memory + DS_AT, 0, warp / QUERY_COLUMNS * (2 * QueryGradients::GROUPS), lane);
    const uint32_t own_pairs = first_pair(memory + P_AT, warp, lane);
    constexpr uint32_t DS = DS_AT - P_AT;  // from P^T to dS^T
    const uint32_t to_grad = GRAD_AT - Q_AT - (GRAD_STAGES == 1 ? stage * Q_BYTES : 0);
    const auto queries = stage_queries.moved(stage * Q_BYTES);
    const auto all_queries = stage_all_queries.moved(stage * Q_BYTES);
    const float* rows = reinterpret_cast<const float*>(shared + ROWS_AT) + stage * RowStage::FLOATS;
    const LogitPlace place{at.block * BLOCK_M + logit_column, j0 + logit_row, lane / 4, lane % 4};
    const int column = logit_column + 2 * place.t;
    const int strip_at = column - logit_row - place.g - 8 * BANDS_BEFORE + BLOCK_N - 1 + (first_diagonal() & 3);
    const Operands operands(p, sequence, place, rows, strip_at, column);
    SegmentRange range;
    if constexpr (HAS_PROFILE && EXPLICIT) range = operands.segments(p.bias);
    if constexpr (HAS_PROFILE && !EXPLICIT) {
      const int ahead = (at.block - spans.lo) % WARP;
      if (ahead == 0) ranges.find(p.bias, place, sequence.shift(), lane);
      range = ranges.of(ahead);
    }

    Fragments<Logits> s = {}, slack;
    product<PADDED / 16, As::IS, As::IS>(s, keys, queries);
    add_terms(s, slack, p, sequence, place, operands, head, range, at.head, rows + RowStage::LSE2 + column);
    mask_logits(s, p, sequence, place, at.head, spans.border(at.block));
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
    product<PADDED / 16, As::IS, As::IS>(ds, values, queries.moved(to_grad));

    uint32_t weights[Logits::GROUPS][Logits::EIGHTS / 2][4];
    if constexpr (HAS_DROPOUT) {
      Fragments<Logits> kept;
      for_logits([&](int group, int n, int e) { kept[group][n][e] = s[group][n][e]; });
      drop(kept, ds, place, at.head);
      for_logits(
          [&](int group, int n, int e) { ds[group][n][e] += rows[RowStage::MINUS_DELTA + column + 8 * n + (e & 1)]; });
      round_fragments(weights, kept);
    } else {
      round_fragments(weights, s);
    }
    if constexpr (!WEIGHTS_IN_REGISTERS) store_pairs(own_pairs, weights);
    for_logits([&](int group, int n, int e) { ds[group][n][e] *= s[group][n][e]; });
    sums.add(ds, sequence, place, operands, head, range, strip, at.head, at.row + logit_column);
    if constexpr (HAS_SOFTCAP) {
      for_logits([&](int group, int n, int e) { ds[group][n][e] *= slack[group][n][e]; });
    }
    uint32_t rounded[Logits::GROUPS][Logits::EIGHTS / 2][4];
    round_fragments(rounded, ds);
    if constexpr (SLOPE_BY_PRODUCT) sums.add_slope(rounded, columns[lane], place, sequence.shift());
    store_pairs(own_pairs + DS, rounded);

    if constexpr (WEIGHTS_IN_REGISTERS) {
      product<As::TRANSPOSED>(dv, weights, all_queries.moved(to_grad));
      product<As::TRANSPOSED>(dk, rounded, all_queries);
      ptx::bar_sync();  // dS^T is there as a whole
    } else {
      ptx::bar_sync();  // P^T and dS^T are
      product<BLOCK_M / 16, As::IS, As::TRANSPOSED>(dv, pairs, all_queries.moved(to_grad));
      product<BLOCK_M / 16, As::IS, As::TRANSPOSED>(dk, pairs.moved(DS), all_queries);
    }
    if constexpr (GRAD_STAGES == 1) {
      ptx::bar_sync();  // nobody needs dO
      if (more) load_grad(next, 0);
      ptx::cp_async_commit_group();
    }
    Fragments<QueryGradients> dq = {};
    product<BLOCK_N / 16, As::TRANSPOSED, As::TRANSPOSED>(dq, pairs_by_query, all_keys);
    add_to_queries(dq, at);
    stage ^= 1;

    if (last) {
      sums.finish_head(at.head);
      if (more) head = HeadBias(p.bias, sequence.batch, next.head);
    }
    at = next;
  }
  ptx::cp_async_wait_group<0>();  // K and V, if no query sees them

  store<true>(dk, p.scale);
  store<false>(dv, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    attention_backward(const __grid_constant__ BackwardParams p) {
  int index = blockIdx.x;
  if constexpr (ORDERED) {
    int* ticket = reinterpret_cast<int*>(shared);
    if (threadIdx.x == 0) *ticket = ptx::atom_add(p.turns, 1);
    ptx::bar_sync();
    index = *ticket;
    ptx::bar_sync();
  }
  const int key_block = index % p.shape.k_blocks;
  const int key_heads = p.shape.heads / p.shape.group;
  const int sequence_index = index / p.shape.k_blocks / key_heads;
  const Sequence sequence(p.shape, p.mask, sequence_index);
  if (key_block * BLOCK_N >= sequence.k_len) return;
  Backward(p, sequence, sequence_index, index / p.shape.k_blocks % key_heads, key_block, threadIdx.x).run();
}

}  // namespace posattn
