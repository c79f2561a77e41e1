// Attention forward with DAPE: an MLP over the heads of each (query, key) between the dot products and the softmax.
//
// A tile of keys takes three phases with a barrier between them. Every warp multiplies its heads' queries and keys and
// writes the logits to shared memory, rounded; it keeps them in registers unrounded. All warps share the positions out
// and run the MLP over all heads of theirs. Every warp adds what the MLP gave to its heads' logits, takes the softmax
// step and multiplies the values. smem_layout.h has the layout, docs/design/cuda-headmix.md the reasons.
#include "common/dropout.h"
#include "common/softmax.h"
#include "headmix/mlp.h"
#include "headmix/operands.h"
#include "headmix/scores.h"

namespace posattn::headmix {

// Shared memory: queries, x, mix, and two buffers of staged values for each head.
constexpr int OUT8 = HEAD_DIM_V / 8;
constexpr int KEY_BYTES = (HEAD_DIM + HEAD_DIM_V) * 2;  // of a key and its value in a tile
constexpr int X_AT = Q_BYTES;
constexpr int MIXED_AT = X_AT + X_BYTES;
constexpr int STAGE_AT = MIXED_AT + MIXED_BYTES;
static_assert(WARPS == ceil_div(HEADS, HEADS_PER_WARP) && MLP_WARPS == WARPS);
static_assert(SHARED_BYTES >= STAGE_AT + 2 * HEADS * STAGE_BYTES);

extern __shared__ __align__(128) unsigned char shared[];

// One head of a warp, from the first tile to the last.
struct Head {
  HeadScores scores;
  const unsigned char* tiles;  // of keys and values; this lane's sixteen bytes of the first one
  Softmax<GROUPS> softmax;
  float out[GROUPS][OUT8][4];
  float s[GROUPS][N8][4];

  __device__ __forceinline__ Head(const HeadMixForwardParams& p, const Sequence& sequence, int64_t key_row, int h,
                                  Place place, const Lane& lane)
      : scores(p.inner, sequence, h, place, lane),
        tiles(static_cast<const unsigned char*>(p.tiles) + (h / p.shape.group * p.key_rows + key_row) * KEY_BYTES +
              lane.lane * 16) {
#pragma unroll
    for (int x = 0; x < GROUPS * OUT8 * 4; ++x) out[x / 4 / OUT8][x / 4 % OUT8][x % 4] = 0.0f;
  }

  __device__ __forceinline__ void load_keys(ColumnFragments<HEAD_DIM>& to, int j0) const {
    load_columns(to, tiles + j0 * static_cast<int64_t>(KEY_BYTES));
  }

  __device__ __forceinline__ void load_values(PairFragments<HEAD_DIM_V>& to, int j0) const {
    to.load(tiles + j0 * static_cast<int64_t>(KEY_BYTES) + BLOCK_N * HEAD_DIM * 2);
  }
};

struct Forward {
  const HeadMixForwardParams& p;
  const Sequence sequence;
  const int64_t key_row;  // where the sequence begins among the rows of all tiles
  const Lane lane;
  const Place place;  // its column counts from 0
  const int i0;
  const uint32_t memory;
  const Mlp mlp;
  const InputReader inputs;

  __device__ __forceinline__ Forward(const HeadMixForwardParams& p, const Sequence& sequence, int64_t key_row, int i0)
      : p(p),
        sequence(sequence),
        key_row(key_row),
        lane(this_lane()),
        place{i0 + lane.g, 2 * lane.t},
        i0(i0),
        memory(ptx::shared_address(shared)),
        mlp(p.mix, p.scale, FOLD_SLOPE ? p.inner.slope + sequence.batch * p.inner.slope_batch : nullptr, lane),
        inputs(memory + X_AT, lane) {}

  __device__ __forceinline__ Head head(int h) const { return Head(p, sequence, key_row, h, place, lane); }

  __device__ __forceinline__ void load_queries(int h) const {
    const Rows rows(p.q, p.q_strides, sequence.batch, h, sequence.q_start, sequence.q_len, 8 * lane.t);
    keep_rows<HEAD_DIM>(memory + h * Q_HEAD, rows, i0, lane);
  }

  // The least distance of the tile at j0, whose values come first in a staged buffer.
  __device__ __forceinline__ int least_distance(int j0) const { return i0 + sequence.offset() - (j0 + BLOCK_N - 1); }

  __device__ __forceinline__ int stage_at(int h, int buffer) const { return STAGE_AT + (2 * h + buffer) * STAGE_BYTES; }

  __device__ __forceinline__ void stage(const Head& head, int j0, int buffer) const {
    if constexpr (STAGED_VALUES) {
      const int h = head.scores.h;
      head.scores.stage(p.inner, memory + stage_at(h, buffer), least_distance(j0), lane);
      ptx::cp_async_commit_group();
    }
  }

  // The tile's distances for all heads, by all threads: rounded, and what that leaves.
  __device__ __forceinline__ void store_distances(int j0) const {
    constexpr int PAIRS = BLOCK_N / 2;
#pragma unroll
    for (int at = 0; at < BLOCK_M * PAIRS; at += THREADS) {
      const int x = at + static_cast<int>(threadIdx.x), row = x / PAIRS, pair = x % PAIRS;
      if (BLOCK_M * PAIRS % THREADS != 0 && x >= BLOCK_M * PAIRS) break;
      const float d = static_cast<float>(i0 + row + sequence.offset() - j0 - 2 * pair);
      const float first = SIGNED ? d : fabsf(d), second = SIGNED ? d - 1.0f : fabsf(d - 1.0f);
      const uint32_t high = pack(first, second), to = memory + X_AT + HEADS * X_HEAD + row * X_ROW + pair * 4;
      ptx::st_shared(to, high);
      ptx::st_shared(to + X_HEAD, pack(first - low_float(high), second - high_float(high)));
    }
  }

  // Dot products, and from them the head's inputs to the MLP, which go to x, and the logits without its output.
  __device__ __forceinline__ void start(Head& head, const ColumnFragments<HEAD_DIM>& fragments, int j0,
                                        int buffer) const {
    const int h = head.scores.h;
    const uint32_t plane = memory + X_AT + h * X_HEAD;
    multiply_columns(head.s, memory + h * Q_HEAD, fragments, lane);
    if constexpr (SCALED) scale_logits(head.s, p.scale, p.softcap);
    if constexpr (CONCAT || !HAS_INNER) store_inputs(plane, head.s, lane);
    if constexpr (HAS_INNER) {
      float b[GROUPS][N8][4];
      const int corner = lane.g - place.column + BLOCK_N - 1;
      const float* staged = reinterpret_cast<const float*>(shared + stage_at(h, buffer)) + corner;
      const Place here{place.row, j0 + place.column};
      Segments segments;
      if constexpr (HAS_PROFILE && !EXPLICIT) {
        segments = head.scores.inner.profile.segments(p.inner, least_distance(j0));
      }
      head.scores.inner_bias(b, p.inner, p.positions, sequence, here, staged, segments);
      if constexpr (CONCAT && !FOLD_SLOPE) store_inputs(plane + HEADS * X_HEAD, b, lane);
      if constexpr (RESIDUAL) {
#pragma unroll
        for (int x = 0; x < GROUPS * N8 * 4; ++x) {
          const int r = x / 4 / N8, n = x / 4 % N8;
          head.s[r][n][x % 4] = fmaf(head.s[r][n][x % 4], SCALED ? 1.0f : p.scale, b[r][n][x % 4]);
        }
      }
      if constexpr (!CONCAT) store_inputs(plane, head.s, lane);
    }
  }

  // The rest of the logits, and one step of the softmax.
  template <bool BORDER>
  __device__ __forceinline__ void finish(Head& head, int j0) const {
    const int h = head.scores.h;
    const Place here{place.row, j0 + place.column};
    add_mixed(head.s, SCALED || (HAS_INNER && RESIDUAL) ? LOG2E : LOG2E * p.scale, memory + MIXED_AT + h * MIXED_HEAD,
              lane);
    add_outer(head.s, p.outer, p.positions, sequence, h, here.row, here.column);
    if constexpr (BORDER || HAS_BOOLEAN) apply_mask<BORDER>(head.s, p.mask, sequence, h, here);
    head.softmax.update(head.s, head.out, 1.0f);
    if constexpr (HAS_DROPOUT) {
      const Dropout dropout(p.dropout, sequence.batch * p.shape.heads + h);
#pragma unroll
      for (int x = 0; x < 2 * GROUPS * N8; ++x) {
        const int a = x / N8, n = x % N8;
        bool keep[2];
        dropout.pair(keep, sequence.q_start + here.row + 8 * a, sequence.k_start + here.column + 8 * n);
        if (!keep[0]) head.s[a / 2][n][a % 2 * 2] = 0.0f;
        if (!keep[1]) head.s[a / 2][n][a % 2 * 2 + 1] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void store(Head& head) const;
};

__device__ __forceinline__ void Forward::store(Head& head) const {
  const int h = head.scores.h;
  const float b2 = p.mix.b2[h];  // left out of every logit so far
  if constexpr (HAS_SINKS) {
#pragma unroll
    for (int a = 0; a < 2 * GROUPS; ++a) head.softmax.add_sink(a, p.sinks[h] - b2, head.out, lane.t == 0);
  }
  head.softmax.finish();
  float* lse = p.lse + (static_cast<int64_t>(sequence.batch) * p.shape.heads + h) * p.shape.q_tokens + sequence.q_start;
  Element* to = static_cast<Element*>(p.out) + sequence.batch * p.out_strides.batch + h * p.out_strides.head;
#pragma unroll
  for (int a = 0; a < 2 * GROUPS; ++a) {
    const int i = place.row + 8 * a;
    const float sum = head.softmax.l[a];
    float weight = sum == 0.0f ? 0.0f : 1.0f / sum;
    if constexpr (HAS_DROPOUT) weight *= p.dropout.keep_scale;
    if (i >= sequence.q_len) continue;
    if (lane.t == 0) lse[i] = head.softmax.lse(a) + b2;
    Element* row = to + (sequence.q_start + i) * p.out_strides.token;
    for_runs<HEAD_DIM_V>(head.out[a / 2], a % 2, lane, [&](int column, const float (&x)[8]) {
      *reinterpret_cast<uint4*>(row + column) =
          uint4{pack(x[0] * weight, x[1] * weight), pack(x[2] * weight, x[3] * weight),
                pack(x[4] * weight, x[5] * weight), pack(x[6] * weight, x[7] * weight)};
    });
  }
}

// The last warp may have fewer heads than the others.
__device__ __forceinline__ bool owned(int x, int count) {
  return HEADS % HEADS_PER_WARP == 0 || x < count;
}

// One tile of keys. `fragments` holds its keys, and takes those of the tile at `ahead`.
template <bool BORDER>
__device__ __forceinline__ void step(const Forward& f, Head (&heads)[HEADS_PER_WARP], int count,
                                     ColumnFragments<HEAD_DIM>& fragments, int& buffer, int j0, int ahead) {
  constexpr bool ONE = HEADS_PER_WARP == 1;  // with two heads a warp has no registers to fetch ahead
  if constexpr (STAGED_VALUES) {
    ptx::cp_async_wait_group<0>();
    ptx::bar_warp_sync();
  }
  if constexpr (FOLD_SLOPE) f.store_distances(j0);
#pragma unroll
  for (int x = 0; x < HEADS_PER_WARP; ++x) {
    if (!owned(x, count)) break;
    if (!ONE) heads[x].load_keys(fragments, j0);
    f.start(heads[x], fragments, j0, buffer);
    f.stage(heads[x], ahead, buffer ^ 1);
  }
  ptx::bar_sync();
  mix_tile(f.mlp, f.inputs, f.memory + MIXED_AT, f.lane);
  PairFragments<HEAD_DIM_V> values;
  if (ONE) heads[0].load_values(values, j0);
  ptx::bar_sync();
#pragma unroll
  for (int x = 0; x < HEADS_PER_WARP; ++x) {
    if (!owned(x, count)) break;
    f.finish<BORDER>(heads[x], j0);
    Weights weights;
    round_tile(weights, heads[x].s);
    if (!ONE) heads[x].load_values(values, j0);
    if (ONE) heads[x].load_keys(fragments, ahead);
    multiply_rows<HEAD_DIM_V>(heads[x].out, weights, values);
  }
  buffer ^= 1;
}

// The order of tiles is free: those that need no element mask come first, then both borders in one loop.
__device__ __forceinline__ void run(const Forward& f, Head (&heads)[HEADS_PER_WARP], const KeySpans& spans) {
  const int count = min(HEADS - heads[0].scores.h, HEADS_PER_WARP);
  const int border = spans.lo < spans.full_lo ? spans.lo : spans.full_hi;
  const int first = spans.full_lo < spans.full_hi ? spans.full_lo : border;
  ColumnFragments<HEAD_DIM> fragments;
  int buffer = 0;
  if (spans.lo < spans.hi) {
#pragma unroll
    for (int x = 0; x < HEADS_PER_WARP; ++x) {
      if (!owned(x, count)) break;
      f.load_queries(heads[x].scores.h);
      f.stage(heads[x], first, 0);
    }
    if (HEADS_PER_WARP == 1) heads[0].load_keys(fragments, first);
    ptx::cp_async_wait_group<0>();
    ptx::bar_warp_sync();
  }
  for (int j0 = spans.full_lo; j0 < spans.full_hi; j0 += BLOCK_N) {
    const int ahead = j0 + BLOCK_N < spans.full_hi ? j0 + BLOCK_N : border;
    step<false>(f, heads, count, fragments, buffer, j0, ahead);
  }
  for (int j0 = border; j0 < spans.hi;) {
    const int ahead = j0 < spans.full_lo && j0 + BLOCK_N >= spans.full_lo ? spans.full_hi : j0 + BLOCK_N;
    step<true>(f, heads, count, fragments, buffer, j0, ahead);
    j0 = ahead;
  }
#pragma unroll
  for (int x = 0; x < HEADS_PER_WARP; ++x) {
    if (owned(x, count)) f.store(heads[x]);
  }
}

template <int COUNT>
__device__ __forceinline__ void start(const Forward& f, const KeySpans& spans) {
  const int h = f.lane.warp * COUNT;
  if constexpr (COUNT == 1) {
    Head heads[COUNT] = {f.head(h)};
    run(f, heads, spans);
  } else {
    Head heads[COUNT] = {f.head(h), f.head(min(h + 1, HEADS - 1))};
    run(f, heads, spans);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    headmix_forward(const __grid_constant__ HeadMixForwardParams p) {
  // The longest rows of a causal call first.
  const int block = p.shape.q_blocks - 1 - static_cast<int>(blockIdx.x) % p.shape.q_blocks;
  const Sequence sequence(p.shape, p.mask, blockIdx.x / p.shape.q_blocks);
  const int i0 = block * BLOCK_M;
  if (i0 >= sequence.q_len) return;
  const KeySpans spans(sequence, p.mask, i0, min(i0 + BLOCK_M, sequence.q_len) - 1);
  store_ones(ptx::shared_address(shared) + X_AT);
  const int index = blockIdx.x / p.shape.q_blocks;
  const int first_tile = PACKED ? sequence.k_start / BLOCK_N + index : index * ceil_div(p.shape.k_tokens, BLOCK_N);
  start<HEADS_PER_WARP>(Forward(p, sequence, static_cast<int64_t>(first_tile) * BLOCK_N, i0), spans);
}

}  // namespace posattn::headmix
