// Attention backward with DAPE: dQ, dK, dV, the MLP's gradients and those of both biases, in one pass over the tiles.
//
// A block owns 16 keys of all heads and walks the queries 24 at a time, the logits transposed: keys by queries, so that
// the fragments of P^T and dX^T are the operands of dV and dK as they are. A warp owns a head and keeps its dK and dV
// in registers; the MLP belongs to MLP_WARPS warps of their own, for its weights and their sums take as many registers
// again. While these work, the heads' warps multiply: dO V^T beside the MLP's forward half, dV beside its backward
// half. dQ, to which all blocks of keys add, is summed in global memory, in the order of the fragments.
#include "dropout.h"
#include "mask.h"
#include "mix_bias.h"
#include "mix_mlp_backward.h"
#include "mix_operands.h"
#include "mix_scores.h"

namespace posattn::mix {

static_assert(!FOLD_SLOPE && GROUPS == 1 && HEADS_PER_WARP == 1 && WARPS == HEADS + MLP_WARPS);

// Shared memory. Of each head as A operands: keys, values, keys transposed; then x, the gradient of the logits, and
// what the MLP gives back: first what it adds to the logits, then the gradient of its inputs.
constexpr int K_BYTES = 16 * HEAD_DIM * 2;
constexpr int V_BYTES = 16 * HEAD_DIM_V * 2;
constexpr int HEAD_BYTES = 2 * K_BYTES + V_BYTES;
constexpr int X_AT = HEADS * HEAD_BYTES;
constexpr int DS_AT = X_AT + X_BYTES;
constexpr int MIX_AT = DS_AT + HEADS * X_HEAD;
constexpr int MIXED_BLOCKS = INPUT_BLOCKS > HEAD_BLOCKS ? INPUT_BLOCKS : HEAD_BLOCKS;
static_assert(SHARED_BYTES >= MIX_AT + MIXED_BLOCKS * 8 * MIX_HEAD);

extern __shared__ __align__(128) unsigned char shared[];

using Tile = float[GROUPS][N8][4];

template <class F>
__device__ __forceinline__ void for_tile(F f) {
#pragma unroll
  for (int n = 0; n < N8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) f(n, e);
  }
}

// The queries that see keys j0 .. j0 + 15: [lo, hi), lo a multiple of BLOCK_N.
struct QuerySpan {
  int lo = 0;
  int hi;

  __device__ __forceinline__ QuerySpan(const Sequence& s, const MaskParams& mask, int j0) {
    const int last = min(j0 + BLOCK_M, s.k_len) - 1;
    hi = s.q_len;
    if constexpr (HAS_RIGHT) lo = max(j0 - s.offset() - mask.right, 0) / BLOCK_N * BLOCK_N;
    if constexpr (HAS_LEFT) hi = min(hi, max(last - s.offset() + mask.left + 1, 0));
  }
};

struct Block {
  const MixBackwardParams& p;
  const Sequence sequence;
  const Lane lane;
  const uint32_t memory;
  const int j0;
  const int64_t first_row;  // of the sequence, in padded rows

  // Whether some query of the tile does not see some key.
  __device__ __forceinline__ bool border(int i0) const {
    const int offset = sequence.offset();
    bool whole = j0 + BLOCK_M <= sequence.k_len;
    if constexpr (HAS_RIGHT) whole &= j0 + BLOCK_M - 1 <= i0 + offset + p.mask.right;
    if constexpr (HAS_LEFT) whole &= j0 >= i0 + BLOCK_N - 1 + offset - p.mask.left;
    return !whole;
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
};

// A warp with a head of its own.
struct HeadWarp {
  const Block& of;
  const MixBackwardParams& p;
  const Sequence& sequence;
  const Lane& lane;
  const int h;
  const uint32_t kept, x_plane, ds_plane, mixed;
  const Rows queries, grad;  // from column 0
  float dk[GROUPS][HEAD_DIM / 8][4];
  float dv[GROUPS][HEAD_DIM_V / 8][4];
  float db2 = 0.0f, inner_slope = 0.0f, outer_slope = 0.0f;

  __device__ __forceinline__ HeadWarp(const Block& of)
      : of(of),
        p(of.p),
        sequence(of.sequence),
        lane(of.lane),
        h(of.lane.warp),
        kept(of.memory + h * HEAD_BYTES),
        x_plane(of.memory + X_AT + h * X_HEAD),
        ds_plane(of.memory + DS_AT + h * X_HEAD),
        mixed(of.memory + MIX_AT + h * MIX_HEAD),
        queries(p.q, p.q_strides, sequence.batch, h, sequence.q_start, sequence.q_len, 0),
        grad(p.grad_out, p.grad_out_strides, sequence.batch, h, sequence.q_start, sequence.q_len, 0) {
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) dk[0][n][0] = dk[0][n][1] = dk[0][n][2] = dk[0][n][3] = 0.0f;
#pragma unroll
    for (int n = 0; n < HEAD_DIM_V / 8; ++n) dv[0][n][0] = dv[0][n][1] = dv[0][n][2] = dv[0][n][3] = 0.0f;
  }

  __device__ __forceinline__ int key(int e) const { return of.j0 + lane.g + 8 * (e >> 1); }
  __device__ __forceinline__ int query(int i0, int n, int e) const { return i0 + 8 * n + 2 * lane.t + (e & 1); }

  __device__ __forceinline__ void keep_keys() const {
    const int kv = h / p.shape.group;
    const Rows keys(p.k, p.k_strides, sequence.batch, kv, sequence.k_start, sequence.k_len, 8 * lane.t);
    const Rows values(p.v, p.v_strides, sequence.batch, kv, sequence.k_start, sequence.k_len, 8 * lane.t);
    const Rows runs(p.k, p.k_strides, sequence.batch, kv, sequence.k_start, sequence.k_len,
                    Run<HEAD_DIM>::FIRST * lane.g);
    keep_rows<HEAD_DIM>(kept, keys, of.j0, lane);
    keep_rows<HEAD_DIM_V>(kept + K_BYTES, values, of.j0, lane);
    RowFragments<HEAD_DIM, 2> turned;
    turned.template load<false>(runs, of.j0, lane);
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 16; ++m) {
      ptx::st_shared_v4(kept + K_BYTES + V_BYTES + (m * WARP + lane.lane) * 16,
                        {turned.operand(0, 2 * m), turned.operand(0, 2 * m + 1), turned.operand(1, 2 * m),
                         turned.operand(1, 2 * m + 1)});
    }
    ptx::bar_warp_sync();
  }

  // Whether the inner bias depends on the distance alone, by operands that are cheap to look up.
  static constexpr bool BY_DISTANCE_ALONE = !EXPLICIT && !HAS_PROFILE && DENSE == NO_DENSE;

  // f(x, c, d, |d|) for the distances of the lane's elements: (n, e) has x = n - (e >> 1) + 1, c = e & 1.
  template <class F>
  __device__ __forceinline__ void for_distances(int i0, F f) const {
    const int d0 = query(i0, 0, 0) + sequence.shift() - key(0);
    const float d0_float = static_cast<float>(d0);
#pragma unroll
    for (int x = 0; x <= N8; ++x) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int step = 8 * (x - 1) + c;
        const float d = d0_float + static_cast<float>(step);
        f(x, c, d0 + step, SIGNED ? d : fabsf(d));
      }
    }
  }

  // The gradient of the inner bias to its operands, summed by distance first where it can be. Past the ends it is zero.
  __device__ __forceinline__ void add_inner(const Tile& g, int i0) {
    if constexpr (BY_DISTANCE_ALONE) {
      float sums[N8 + 1][2] = {};
      for_tile([&](int n, int e) { sums[n - (e >> 1) + 1][e & 1] += g[0][n][e]; });
      const int64_t entries = p.inner.table_last - p.inner.table_first + 1;
      for_distances(ptx::fresh(i0), [&](int x, int c, int d, float far) {
        if constexpr (HAS_SLOPE) inner_slope = fmaf(-far, sums[x][c], inner_slope);
        if constexpr (HAS_TABLE) {
          const int entry = min(max(d, p.inner.table_first), p.inner.table_last) - p.inner.table_first;
          if (p.dinner.table) ptx::red_add(p.dinner.table + h * entries + entry, sums[x][c]);
        }
      });
    } else {
      inner_slope += gradients<Inner>(p.dinner, p.inner, g, i0);
    }
  }

  // The inner bias of the tile; one value for each distance where it depends on nothing else.
  __device__ __forceinline__ void inner_bias(Tile& b, int i0) const {
    if constexpr (!BY_DISTANCE_ALONE) {
      for_tile([&](int n, int e) {
        b[0][n][e] = bias_of<Inner>(p.inner, sequence.batch, h, Pair(p.positions, sequence, query(i0, n, e), key(e)));
      });
    } else {
      float value[N8 + 1][2];
      const float slope = HAS_SLOPE ? p.inner.slope[sequence.batch * p.inner.slope_batch + h] : 0.0f;
      for_distances(i0, [&](int x, int c, int d, float far) {
        value[x][c] = HAS_SLOPE ? -slope * far : 0.0f;
        if constexpr (HAS_TABLE) {
          value[x][c] += p.inner.table[h * p.inner.table_head + min(max(d, p.inner.table_first), p.inner.table_last) -
                                       p.inner.table_first];
        }
      });
      for_tile([&](int n, int e) { b[0][n][e] = value[n - (e >> 1) + 1][e & 1]; });
    }
  }

  // Logits without the MLP's share, natural or as SCALED leaves them; x to shared memory.
  __device__ __forceinline__ void start(Tile& s, Tile& slack, int i0) const {
    ColumnFragments<HEAD_DIM> columns;
    columns.load(queries.from_column(8 * lane.t), i0, lane);
    multiply_columns<HEAD_DIM>(s, kept, columns, lane);
    if constexpr (SCALED) scale_logits(s, p.scale, p.softcap);
    if constexpr (HAS_SOFTCAP) {
      for_tile([&](int n, int e) {
        const float tanh = s[0][n][e] / p.softcap;
        slack[0][n][e] = 1.0f - tanh * tanh;
      });
    }
    if constexpr (CONCAT || !HAS_INNER) store_inputs(x_plane, s, lane);
    if constexpr (HAS_INNER) {
      Tile b;
      inner_bias(b, i0);
      if constexpr (CONCAT) store_inputs(x_plane + HEADS * X_HEAD, b, lane);
      if constexpr (RESIDUAL) {
        for_tile([&](int n, int e) { s[0][n][e] = fmaf(s[0][n][e], SCALED ? 1.0f : p.scale, b[0][n][e]); });
      }
      if constexpr (!CONCAT) store_inputs(x_plane, s, lane);
    }
  }

  __device__ __forceinline__ void multiply_grad(Tile& dp, int i0) const {
    ColumnFragments<HEAD_DIM_V> columns;
    columns.load(grad.from_column(8 * lane.t), i0, lane);
    multiply_columns<HEAD_DIM_V>(dp, kept + K_BYTES, columns, lane);
  }

  // s becomes the weights as they met the values, ds (at first dP) the gradient of the logits, which goes to memory
  // too.
  __device__ __forceinline__ void weigh(Tile& s, Tile& ds, int i0) {
    add_mixed(s, SCALED || (HAS_INNER && RESIDUAL) ? LOG2E : LOG2E * p.scale, mixed, lane);
    const int64_t row =
        (static_cast<int64_t>(sequence.batch) * p.shape.heads + h) * p.shape.q_tokens + sequence.q_start;
    float lse2[N8][2], delta[N8][2];
#pragma unroll
    for (int n = 0; n < N8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = query(i0, n, c);
        lse2[n][c] = i < sequence.q_len ? p.lse2[row + i] : infinity();
        delta[n][c] = i < sequence.q_len ? p.delta[row + i] : 0.0f;
      }
    }
    if constexpr (HAS_OUTER) {
      for_tile([&](int n, int e) {
        const Pair at(p.positions, sequence, query(i0, n, e), key(e));
        s[0][n][e] = fmaf(bias_of<Outer>(p.outer, sequence.batch, h, at), LOG2E, s[0][n][e]);
      });
    }
    if (HAS_BOOLEAN || of.border(i0)) {
      for_tile([&](int n, int e) {
        if (!of.allowed(h, query(i0, n, e), key(e))) s[0][n][e] = -infinity();
      });
    }
    for_tile([&](int n, int e) {
      const float weight = ptx::ex2_approx(s[0][n][e] - lse2[n][e & 1]);
      float kept_share = 1.0f;
      if constexpr (HAS_DROPOUT) {
        const Dropout dropout(p.dropout, sequence.batch * p.shape.heads + h);
        const uint32_t j = sequence.k_start + key(e);
        uint32_t word[4];
        dropout.words(word, sequence.q_start + query(i0, n, e), j >> 2);
        const uint32_t low = j & 1 ? word[1] : word[0], high = j & 1 ? word[3] : word[2];
        kept_share = (j & 2 ? high : low) >= dropout.threshold ? p.dropout.keep_scale : 0.0f;
      }
      s[0][n][e] = weight * kept_share;
      ds[0][n][e] = weight * fmaf(ds[0][n][e], kept_share, -delta[n][e & 1]);
      db2 += ds[0][n][e];
    });
    if constexpr (HAS_OUTER) outer_slope += gradients<Outer>(p.douter, p.outer, ds, i0);
    store_inputs(ds_plane, ds, lane);
  }

  template <class Kind>
  __device__ __forceinline__ float gradients(const BiasGradParams& to, const BiasParams& bias, const Tile& g,
                                             int i0) const {
    float slope = 0.0f;
    for_tile([&](int n, int e) {
      const int i = query(i0, n, e), j = key(e);
      if (i < sequence.q_len && j < sequence.k_len) {
        const Pair at(p.positions, sequence, i, j);
        slope += add_gradient<Kind>(to, bias, sequence.batch, h, of.first_row + i, at, g[0][n][e]);
      }
    });
    return slope;
  }

  __device__ __forceinline__ void add_values(const Weights& weights, int i0) {
    RowFragments<HEAD_DIM_V, N8> rows;
    rows.template load<false>(grad.from_column(Run<HEAD_DIM_V>::FIRST * lane.g), i0, lane);
    multiply_rows<HEAD_DIM_V>(dv, weights, rows);
  }

  // ds and what the MLP sends back become the gradient of the dot products, and go on to dK and dQ.
  __device__ __forceinline__ void finish(Tile& ds, const Tile& slack, int i0) {
    if constexpr (WANT_INNER && CONCAT) {
      Tile db;
      for_tile([&](int n, int e) { db[0][n][e] = RESIDUAL ? ds[0][n][e] : 0.0f; });
      add_mixed(db, 1.0f, mixed + HEADS * MIX_HEAD, lane);
      add_inner(db, i0);
    }
    Tile& dx = ds;
    add_mixed(dx, 1.0f, mixed, lane);
    if constexpr (WANT_INNER && !CONCAT) add_inner(dx, i0);
    if constexpr (HAS_SOFTCAP) {
      for_tile([&](int n, int e) { dx[0][n][e] *= slack[0][n][e]; });
    }
    store_inputs(ds_plane, dx, lane);  // nobody else needs ds any more
    Weights rounded;
    round_tile(rounded, dx);
    ptx::bar_warp_sync();
    add_queries(i0);
    RowFragments<HEAD_DIM, N8> rows;
    rows.template load<false>(queries.from_column(Run<HEAD_DIM>::FIRST * lane.g), i0, lane);
    multiply_rows<HEAD_DIM>(dk, rounded, rows);
  }

  // dQ^T [dimensions, queries] += K^T dX^T
  __device__ __forceinline__ void add_queries(int i0) const {
    float* to = p.dq + (h * p.rows + of.first_row + i0) * HEAD_DIM + lane.lane;
    const uint32_t keys = kept + K_BYTES + V_BYTES + lane.lane * 16;
    uint32_t b[N8][2];
#pragma unroll
    for (int n = 0; n < N8; ++n) ptx::ldmatrix_x2_trans(b[n], ds_plane + lane.lane % 16 * X_ROW + 16 * n);
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 16; ++m) {
      uint32_t a[4];
      ptx::ld_shared_v4(a, keys + m * (WARP * 16));
#pragma unroll
      for (int n = 0; n < N8; ++n) {
        float d[4];
        mma_to(d, a, b[n][0], b[n][1], ZEROS);
#pragma unroll
        for (int e = 0; e < 4; ++e) ptx::red_add(to + n * (8 * HEAD_DIM) + (m * 4 + e) * WARP, d[e]);
      }
    }
    ptx::bar_warp_sync();  // the next step writes the plane again
  }

  __device__ __forceinline__ void store() const {
    const int64_t token =
        (static_cast<int64_t>(sequence.batch) * p.shape.heads + h) * p.shape.k_tokens + sequence.k_start;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = of.j0 + lane.g + 8 * half;
      if (j >= sequence.k_len) continue;
      float *to_k = p.dk + (token + j) * HEAD_DIM, *to_v = p.dv + (token + j) * HEAD_DIM_V;
      for_runs<HEAD_DIM>(dk[0], half, lane, [&](int column, const float (&x)[8]) {
#pragma unroll
        for (int c = 0; c < 8; ++c) to_k[column + c] = x[c] * p.scale;
      });
      for_runs<HEAD_DIM_V>(dv[0], half, lane, [&](int column, const float (&x)[8]) {
#pragma unroll
        for (int c = 0; c < 8; ++c) to_v[column + c] = x[c];
      });
    }
    store_sum(p.db2, db2);
    if constexpr (HAS_SLOPE) store_sum(p.dinner.slope, inner_slope);
    if constexpr (OUTER_SLOPE) store_sum(p.douter.slope, outer_slope);
  }

  __device__ __forceinline__ void store_sum(float* to, float x) const {
#pragma unroll
    for (int bit = 16; bit; bit /= 2) x += ptx::shfl_bfly(x, bit);
    if (to && lane.lane == 0) to[static_cast<int64_t>(blockIdx.x) * HEADS + h] = x;
  }
};

__device__ __forceinline__ void run_head(const Block& of, const QuerySpan& span) {
  HeadWarp head(of);
  if (span.lo < span.hi) head.keep_keys();
#pragma unroll 1
  for (int i0 = span.lo; i0 < span.hi; i0 += BLOCK_N) {
    Tile s, ds, slack;
    head.start(s, slack, i0);
    ptx::bar_sync();
    head.multiply_grad(ds, ptx::fresh(i0));
    ptx::bar_sync();
    head.weigh(s, ds, ptx::fresh(i0));
    Weights weights;
    round_tile(weights, s);
    ptx::bar_sync();
    head.add_values(weights, ptx::fresh(i0));
    ptx::bar_sync();
    head.finish(ds, slack, ptx::fresh(i0));
  }
  head.store();
}

__device__ __forceinline__ void run_mlp(const Block& of, const QuerySpan& span) {
  const Lane lane{of.lane.lane, of.lane.warp - HEADS, of.lane.g, of.lane.t};
  const Mlp mlp(of.p.mix, of.p.scale, nullptr, lane);
  MlpBackward backward(of.p.mix, lane);
  const InputReader x(of.memory + X_AT, lane);
  const PlaneReader<HEADS, false> ds(of.memory + DS_AT, lane);
  const uint32_t mix = of.memory + MIX_AT, to = mix + 2 * lane.t * MIX_HEAD + 4 * lane.g;
#pragma unroll 1
  for (int i0 = span.lo; i0 < span.hi; i0 += BLOCK_N) {
    ptx::bar_sync();
    mix_tile(mlp, x, mix, lane);
    ptx::bar_sync();
    ptx::bar_sync();
#pragma unroll 1
    for (int tile = lane.warp; tile < POSITION_TILES; tile += MLP_WARPS)
      backward.run(mlp, x, ds, 16 * tile, to + 32 * tile);
    ptx::bar_sync();
  }
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * MLP_WARPS + lane.warp;
  backward.store(of.p.dw1 + slot * (WIDTH * INPUTS), of.p.db1 + slot * WIDTH, of.p.dw2 + slot * (HEADS * WIDTH),
                 SCALED ? 1.0f : of.p.scale, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) headmix_backward(const __grid_constant__ MixBackwardParams p) {
  const int index = blockIdx.x / p.shape.k_blocks;
  const Sequence sequence(p.shape, p.mask, index);
  const int j0 = static_cast<int>(blockIdx.x) % p.shape.k_blocks * BLOCK_M;
  if (j0 >= sequence.k_len) return;
  const int first_block = PACKED ? sequence.q_start / BLOCK_N + index : index * ceil_div(p.shape.q_tokens, BLOCK_N);
  const int64_t first_row = static_cast<int64_t>(first_block) * BLOCK_N;
  const Block of{p, sequence, this_lane(), ptx::shared_address(shared), j0, first_row};
  const QuerySpan span(sequence, p.mask, j0);
  store_ones(of.memory + X_AT);
  if (of.lane.warp < HEADS) {
    run_head(of, span);
  } else {
    run_mlp(of, span);
  }
}

}  // namespace posattn::mix
