// A warp of the backward kernel that has a head of its own: everything but the MLP.
#pragma once
#include "common/dropout.h"
#include "headmix/backward_block.h"
#include "headmix/gradients.h"
#include "headmix/scores.h"

namespace posattn::headmix {

struct HeadWarp {
  // Whether the inner bias depends on the distance alone, by operands that are cheap to look up.
  static constexpr bool BY_DISTANCE_ALONE = !EXPLICIT && !HAS_PROFILE && DENSE == NO_DENSE;

  const Block& of;
  const HeadMixBackwardParams& p;
  const Sequence& sequence;
  const Lane& lane;
  const int h;
  const uint32_t kept, plane, mixed;  // where this lane's parts begin
  // Where this lane is in the tiles (in sixteen bytes), in dQ, and in the tables by distance at its first element.
  // Indices take a register each, pointers two.
  uint32_t tile;
  uint32_t dq;
  int32_t diagonal = 0;
  float dk[GROUPS][HEAD_DIM / 8][4];
  float dv[GROUPS][HEAD_DIM_V / 8][4];
  float slope = 0.0f;  // of the inner bias
  float inner_slope = 0.0f, outer_slope = 0.0f;

  __device__ __forceinline__ HeadWarp(const Block& of, int i0)
      : of(of),
        p(of.p),
        sequence(of.sequence),
        lane(of.lane),
        h(of.lane.warp),
        kept(of.memory + h * HEAD_BYTES),
        plane(of.memory + X_AT + h * X_HEAD),
        mixed(of.memory + MIXED_AT + h * MIXED_HEAD) {
    const uint32_t row = h * static_cast<uint32_t>(p.rows) + static_cast<uint32_t>(of.first_row + i0);
    tile = row / BLOCK_N * (TILE_BYTES / 16) + lane.lane;
    dq = row * HEAD_DIM + lane.lane * (VECTOR_ADDS ? 4 : 1);
    if constexpr (HAS_INNER && BY_DISTANCE_ALONE && HAS_TABLE) {
      diagonal = h * p.diagonals + query(i0, 0, 0) + sequence.offset() - key(0) - p.first_distance;
    }
    if constexpr (HAS_SLOPE) slope = p.inner.slope[sequence.batch * p.inner.slope_batch + h];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) dk[0][n][0] = dk[0][n][1] = dk[0][n][2] = dk[0][n][3] = 0.0f;
#pragma unroll
    for (int n = 0; n < HEAD_DIM_V / 8; ++n) dv[0][n][0] = dv[0][n][1] = dv[0][n][2] = dv[0][n][3] = 0.0f;
  }

  __device__ __forceinline__ void next_tile() {
    tile += TILE_BYTES / 16;
    dq += BLOCK_N * HEAD_DIM;
    diagonal += BLOCK_N;
  }

  __device__ __forceinline__ const unsigned char* part(int at) const {
    return static_cast<const unsigned char*>(p.tiles) + static_cast<uint64_t>(tile) * 16 + at;
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
    RowFragments<HEAD_DIM, 2> by_rows;
    by_rows.load(runs, of.j0, lane);
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 16; ++m) {
      ptx::st_shared_v4(kept + K_BYTES + V_BYTES + (m * WARP + lane.lane) * 16,
                        {by_rows.operand(0, 2 * m), by_rows.operand(0, 2 * m + 1), by_rows.operand(1, 2 * m),
                         by_rows.operand(1, 2 * m + 1)});
    }
    ptx::bar_warp_sync();
  }

  __device__ __forceinline__ float first_distance(int i0) const {
    return static_cast<float>(query(i0, 0, 0) + sequence.offset() - key(0));
  }

  // The gradient of the inner bias to its operands, summed by distance first where it can be. Past the ends it is zero.
  __device__ __forceinline__ void add_inner(const Tile& g, int i0) {
    if constexpr (!BY_DISTANCE_ALONE) {
      inner_slope += gradients<Inner>(p.dinner, p.inner, g, i0);
    } else {
      ByDistance sums = {};
      for_tile([&](int n, int e) { sums[n - (e >> 1) + 1][e & 1] += g[0][n][e]; });
      const float d0 = first_distance(i0);
      float total = 0.0f, moment = 0.0f;
      for_distances([&](int x, int c, int step) {
        if constexpr (HAS_SLOPE && LINEAR) {
          total += sums[x][c];
          moment = fmaf(sums[x][c], static_cast<float>(step), moment);
        } else if constexpr (HAS_SLOPE) {
          moment = fmaf(sums[x][c], fabsf(d0 + static_cast<float>(step)), moment);
        }
      });
      if constexpr (HAS_SLOPE) inner_slope -= fmaf(total, d0, moment);
      if (HAS_TABLE && p.dinner.table) {
        for_distances([&](int x, int c, int step) {
          GlobalSums(p.dinner.table, p.dinner.units).add(diagonal + step, sums[x][c]);
        });
      }
    }
  }

  // The inner bias of the tile; one value for each distance where it depends on nothing else.
  __device__ __forceinline__ void inner_bias(Tile& b, int i0) const {
    if constexpr (!BY_DISTANCE_ALONE) {
      for_tile([&](int n, int e) {
        b[0][n][e] = bias_of<Inner>(p.inner, sequence.batch, h, Pair(p.positions, sequence, query(i0, n, e), key(e)));
      });
    } else {
      ByDistance value;
      const float d0 = first_distance(i0);
      for_distances([&](int x, int c, int step) {
        float& v = value[x][c];
        if constexpr (HAS_SLOPE) {
          v = LINEAR ? fmaf(-slope, static_cast<float>(step), -slope * d0)
                     : -slope * fabsf(d0 + static_cast<float>(step));
        }
        if constexpr (HAS_TABLE) {
          const float entry = ptx::ld_global_nc(p.by_distance + diagonal + step);
          v = HAS_SLOPE ? v + entry : entry;
        }
      });
      for_tile([&](int n, int e) { b[0][n][e] = value[n - (e >> 1) + 1][e & 1]; });
    }
  }

  // Logits without the MLP's share, scaled or as SCALED leaves them; x to shared memory.
  __device__ __forceinline__ void start(Tile& s, Tile& slack, int i0) const {
    ColumnFragments<HEAD_DIM> columns;
    load_columns(columns, part(Q_COLUMNS_AT));
    multiply_columns<HEAD_DIM>(s, kept, columns, lane);
    if constexpr (SCALED) scale_logits(s, p.scale, p.softcap);
    if constexpr (HAS_SOFTCAP) {
      for_tile([&](int n, int e) {
        const float tanh = s[0][n][e] / p.softcap;
        slack[0][n][e] = 1.0f - tanh * tanh;
      });
    }
    if constexpr (CONCAT || !HAS_INNER) store_inputs(plane, s, lane);
    if constexpr (HAS_INNER) {
      Tile b;
      inner_bias(b, i0);
      if constexpr (CONCAT) store_inputs(plane + HEADS * X_HEAD, b, lane);
      if constexpr (RESIDUAL) {
        for_tile([&](int n, int e) { s[0][n][e] = fmaf(s[0][n][e], SCALED ? 1.0f : p.scale, b[0][n][e]); });
      }
      if constexpr (!CONCAT) store_inputs(plane, s, lane);
    }
  }

  // dP^T, less delta unless dropout stands between the two.
  __device__ __forceinline__ void multiply_grad(Tile& dp, Statistics& statistics) const {
    ColumnFragments<HEAD_DIM_V> columns;
    load_columns(columns, part(GRAD_COLUMNS_AT));
    statistics.load(part(STATISTICS_AT));
    multiply_columns<HEAD_DIM_V>(dp, kept + K_BYTES, columns, lane);
    if constexpr (!HAS_DROPOUT) statistics.add(dp[0], 1, lane.t);
  }

  // s becomes the weights as they met the values, ds (at first dP - delta) the gradient of the logits, which goes to
  // memory too.
  __device__ __forceinline__ void weigh(Tile& s, Tile& ds, const Statistics& statistics, int i0) {
    add_mixed(s, SCALED || (HAS_INNER && RESIDUAL) ? LOG2E : LOG2E * p.scale, mixed, lane);
    statistics.add(s[0], 0, lane.t);
    if constexpr (HAS_OUTER) {
      for_tile([&](int n, int e) {
        const Pair at(p.positions, sequence, query(i0, n, e), key(e));
        s[0][n][e] = fmaf(bias_of<Outer>(p.outer, sequence.batch, h, at), LOG2E, s[0][n][e]);
      });
    }
    if (HAS_BOOLEAN || of.border(i0)) {
      const Lane here = lane_of(ptx::tid_x());  // rarely needed, so not held
      for_tile([&](int n, int e) {
        const int i = i0 + 8 * n + 2 * here.t + (e & 1), j = of.j0 + here.g + 8 * (e >> 1);
        if (!of.allowed(h, i, j)) s[0][n][e] = -infinity();
      });
    }
    for_tile([&](int n, int e) { s[0][n][e] = ptx::ex2_approx(s[0][n][e]); });
    if constexpr (HAS_DROPOUT) {
      drop(s, ds, statistics, i0);
    } else {
      for_tile([&](int n, int e) { ds[0][n][e] *= s[0][n][e]; });
    }
    if constexpr (HAS_OUTER) outer_slope += gradients<Outer>(p.douter, p.outer, ds, i0);
    store_inputs(plane + (DS_AT - X_AT), ds, lane);
  }

  // From weights and dP to weights after dropout and the gradient of the logits.
  __device__ __forceinline__ void drop(Tile& s, Tile& ds, const Statistics& statistics, int i0) const {
    Tile minus_delta = {};
    statistics.add(minus_delta[0], 1, lane.t);
    const Dropout dropout(p.dropout, sequence.batch * p.shape.heads + h);
    for_tile([&](int n, int e) {
      const uint32_t j = sequence.k_start + key(e);
      uint32_t word[4];
      dropout.words(word, sequence.q_start + query(i0, n, e), j >> 2);
      const uint32_t low = j & 1 ? word[1] : word[0], high = j & 1 ? word[3] : word[2];
      const float share = (j & 2 ? high : low) >= dropout.threshold ? p.dropout.keep_scale : 0.0f;
      ds[0][n][e] = s[0][n][e] * fmaf(ds[0][n][e], share, minus_delta[0][n][e]);
      s[0][n][e] *= share;
    });
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

  // dV += P^T dO
  __device__ __forceinline__ void add_values(const Weights& weights) {
    PairFragments<HEAD_DIM_V> pairs;
    pairs.load(part(GRAD_PAIRS_AT));
    multiply_rows<HEAD_DIM_V>(dv, weights, pairs);
  }

  // ds and what the MLP sends back become the gradient of the dot products, and go on to dK and dQ.
  __device__ __forceinline__ void finish(Tile& ds, const Tile& slack, int i0) {
    if constexpr (WANT_INNER && CONCAT) {
      Tile db;
      for_tile([&](int n, int e) { db[0][n][e] = RESIDUAL ? ds[0][n][e] : 0.0f; });
      add_mixed(db, 1.0f, mixed + HEADS * MIXED_HEAD, lane);
      add_inner(db, i0);
    }
    Tile& dx = ds;
    add_mixed(dx, 1.0f, mixed, lane);
    if constexpr (WANT_INNER && !CONCAT) add_inner(dx, i0);
    if constexpr (HAS_SOFTCAP) {
      for_tile([&](int n, int e) { dx[0][n][e] *= slack[0][n][e]; });
    }
    Weights rounded;
    round_tile(rounded, dx);
    add_queries(rounded, i0);
    PairFragments<HEAD_DIM> pairs;
    pairs.load(part(Q_PAIRS_AT));
    multiply_rows<HEAD_DIM>(dk, rounded, pairs);
  }

  // dQ^T [dimensions, queries] += K^T dX^T
  __device__ __forceinline__ void add_queries(const Weights& dx, int i0) const {
    const uint32_t keys = kept + K_BYTES + V_BYTES + lane.lane * 16;
    uint32_t b[N8][2];
#pragma unroll
    for (int n = 0; n < N8; ++n) {
      b[n][0] = ptx::movmatrix_trans(dx[0][n][0]);
      b[n][1] = ptx::movmatrix_trans(dx[0][n][1]);
    }
    float* to = p.dq + dq;
    of.wait_for_earlier_blocks(h, i0);
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 16; ++m) {
      uint32_t a[4];
      ptx::ld_shared_v4(a, keys + m * (WARP * 16));
#pragma unroll
      for (int n = 0; n < N8; ++n) {
        float d[4];
        mma_to(d, a, b[n][0], b[n][1], ZEROS);
        if constexpr (VECTOR_ADDS) {
          ptx::red_add_v4(to + n * (8 * HEAD_DIM) + m * (4 * WARP), d);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) ptx::red_add(to + n * (8 * HEAD_DIM) + (m * 4 + e) * WARP, d[e]);
        }
      }
    }
    of.release_next_block(h, i0);
  }

  __device__ __forceinline__ void store() const {
    const int64_t token =
        (static_cast<int64_t>(sequence.batch) * p.shape.heads + h) * p.shape.k_tokens + sequence.k_start;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = of.j0 + lane.g + 8 * half;
      if (j >= sequence.k_len) continue;
      store_row<HEAD_DIM>(p.dk + (token + j) * HEAD_DIM, dk[0], half, p.scale);
      store_row<HEAD_DIM_V>(p.dv + (token + j) * HEAD_DIM_V, dv[0], half, 1.0f);
    }
    if constexpr (HAS_SLOPE) store_sum(p.dinner.slope, inner_slope);
    if constexpr (OUTER_SLOPE) store_sum(p.douter.slope, outer_slope);
  }

  template <int DIM>
  __device__ __forceinline__ void store_row(float* row, const float (&x)[DIM / 8][4], int half, float factor) const {
#pragma unroll
    for (int n = 0; n < DIM / 8; ++n) {
      *reinterpret_cast<float2*>(row + 8 * n + 2 * lane.t) = {x[n][2 * half] * factor, x[n][2 * half + 1] * factor};
    }
  }

  __device__ __forceinline__ void store_sum(float* to, float x) const {
#pragma unroll
    for (int bit = 16; bit; bit /= 2) x += ptx::shfl_bfly(x, bit);
    if (to && lane.lane == 0) to[static_cast<int64_t>(of.index) * HEADS + h] = x;
  }
};

}  // namespace posattn::headmix
