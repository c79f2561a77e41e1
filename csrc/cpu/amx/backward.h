// Flash attention backward on tiles, in five products. A task is a run of keys of one key head, as in ../backward.h,
// and sums are added in the same order. Rows pass 32 at a time, a panel of 64 keys at once, from both products to P and
// dS as the operands of the other three, which are taken over 256 rows: long sums, since C's tiles are dear to load.
//
// All but dQ is transposed, dV^T = dO^T P and dK^T = Q^T dS, so that P and dS serve as they come out, rows of queries.
#pragma once

#include "../backward.h"
#include "forward.h"

namespace posattn::POSATTN_ISA {

constexpr int64_t TASK_KEYS = 128;
constexpr int64_t STEP_ROWS = 256;
constexpr int64_t BLOCKS = STEP_ROWS / ROWS, PANELS = TASK_KEYS / NR, KEY_TILES = TASK_KEYS / TILE;
constexpr int64_t TILE_FLOATS = TILE * TILE;

struct TileBackwardScratch {
  int64_t q_width, v_width;
  float *k_panels, *v_panels, *k_depth, *grad_k, *grad_v;
  float *scores, *products;   // [ROWS][NR]: S and P, dP and dS
  float *p_pairs, *ds_pairs;  // [BLOCKS][KEY_TILES] tiles: pairs of rows by keys, in the order of `column_of`
  float* ds_rows;             // [BLOCKS][TASK_KEYS / 32][ROWS] rows of 32 keys
  float* turned;              // at last dK and dV by rows, where the pairs were
  float *cap_slope, *keep, *sums, *slopes, *intercepts;
  BiasTile bias, plain;  // in units of log2, and in natural ones
  BiasGrad bias_grad;

  TileBackwardScratch(Arena& arena, const Problem& p, int64_t longest_q)
      : q_width(round_up(p.head_dim, TILE)), v_width(round_up(p.value_dim, TILE)) {
    k_panels = arena.floats(TASK_KEYS * panel_rows<AMX>(p.head_dim));
    v_panels = arena.floats(TASK_KEYS * panel_rows<AMX>(p.value_dim));
    k_depth = arena.floats(TASK_KEYS / 2 * q_width);
    grad_k = arena.floats(TASK_KEYS * q_width);
    grad_v = arena.floats(TASK_KEYS * v_width);
    scores = arena.floats(ROWS * NR);
    products = arena.floats(ROWS * NR);
    turned = arena.floats(imax(2 * BLOCKS * KEY_TILES * TILE_FLOATS, TASK_KEYS * imax(q_width, v_width)));
    p_pairs = turned, ds_pairs = turned + BLOCKS * KEY_TILES * TILE_FLOATS;
    ds_rows = arena.floats(BLOCKS * ROWS * TASK_KEYS / 2);
    cap_slope = arena.floats(NR);
    keep = arena.floats(NR);
    sums = arena.floats(imax(ROWS * q_width, TILE * MAX_WIDTH));
    slopes = arena.floats(p.bias.n_knots + 1);
    intercepts = arena.floats(p.bias.n_knots + 1);
    bias.layout(arena, p.bias, longest_q, TASK_KEYS);
    plain.layout(arena, p.bias, longest_q, TASK_KEYS);
    bias_grad.layout(arena, p, p.bias, longest_q, TASK_KEYS);
    bias.block_rows = plain.block_rows = ROWS;
  }
};

// Two rows of 32 keys become two tiles' rows of pairs by unpacking, which leaves the keys of 32 in this order.
constexpr int64_t column_of(int64_t key) {
  const int64_t lane = key % 32 / 8, at = key % 8;
  return key / 32 * 32 + (at < 4 ? 0 : 16) + lane * 4 + at % 4;
}

// Where a panel of one block goes.
struct PanelOutput {
  float *p_pairs, *ds_pairs, *ds_rows;

  POSATTN_INLINE void put(int r, int half, vf p0, vf p1, vf ds0, vf ds1) const {
    const int64_t at = half * 2 * TILE_FLOATS + r / 2 * TILE;
    store(p_pairs + at, (vf)_mm512_unpacklo_epi16((__m512i)p0, (__m512i)p1));
    store(p_pairs + at + TILE_FLOATS, (vf)_mm512_unpackhi_epi16((__m512i)p0, (__m512i)p1));
    store(ds_pairs + at, (vf)_mm512_unpacklo_epi16((__m512i)ds0, (__m512i)ds1));
    store(ds_pairs + at + TILE_FLOATS, (vf)_mm512_unpackhi_epi16((__m512i)ds0, (__m512i)ds1));
    store(ds_rows + (half * ROWS + r) * TILE, ds0);
    store(ds_rows + (half * ROWS + r + 1) * TILE, ds1);
  }
};

// Products [ROWS][NR] become P and dS; with `floats`, dS stays in `products` as well. lse is in units of log2.
template <bool MASKED, class Finish>
inline void soft_panel(const float* scores, float* products, const PanelOutput& output, const float* lse,
                       const float* delta, const uint64_t* bits, bool floats, const Finish& finish) {
  for (int r = 0; r < ROWS; r += 2) {
    for (int half = 0; half < 2; ++half) {
      vf p[2][2], ds[2][2];
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int c = half * 32 + v * VL;
          const float* dp = products + (r + q) * NR + c;
          p[q][v] = exp2_of_weight(finish(r + q, c, load(scores + (r + q) * NR + c)) - set1(lse[r + q]));
          if (MASKED) p[q][v] = keep(p[q][v], bits[r + q] >> c);
          ds[q][v] = p[q][v] * (load(dp) - set1(delta[r + q]));
        }
      if (floats)
        for (int q = 0; q < 2; ++q)
          for (int v = 0; v < 2; ++v) store(products + (r + q) * NR + half * 32 + v * VL, ds[q][v]);
      output.put(r, half, bf16_row(p[0][0], p[0][1]), bf16_row(p[1][0], p[1][1]), bf16_row(ds[0][0], ds[0][1]),
                 bf16_row(ds[1][0], ds[1][1]));
    }
  }
}

// The same of P and dS that are there as floats.
inline void put_panel(const float* scores, const float* products, const PanelOutput& output) {
  for (int r = 0; r < ROWS; r += 2)
    for (int half = 0; half < 2; ++half) {
      auto row = [&](const float* x, int q) {
        return bf16_row(load(x + (r + q) * NR + half * 32), load(x + (r + q) * NR + half * 32 + VL));
      };
      output.put(r, half, row(scores, 0), row(scores, 1), row(products, 0), row(products, 1));
    }
}

// One task's heads share these.
struct TileBackward {
  const Problem& p;
  const Sequence& s;
  TileBackwardScratch& t;
  const PackedRows& packed;
  const float* rests;
  int64_t j0, keys;
  Dropout dropout;

  int64_t q_steps() const { return ceil_div(p.head_dim, TILE_DEPTH); }
  int64_t v_steps() const { return ceil_div(p.value_dim, TILE_DEPTH); }

  PanelOutput output(int64_t block, int64_t panel) const {
    const int64_t tiles = (block * KEY_TILES + panel * NR / TILE) * TILE_FLOATS;
    return {t.p_pairs + tiles, t.ds_pairs + tiles, t.ds_rows + (block * TASK_KEYS + panel * NR) / 32 * ROWS * TILE};
  }

  // Rows i .. i + count of head h over one panel.
  void panel(int64_t h, int64_t i, int64_t count, int64_t block, int64_t n, bool simple) {
    const int64_t j = j0 + n * NR;
    const Shown seen = shown(p, s, h, i, i + count, j);
    if (seen == Shown::none) return clear(block, n);
    const int64_t first = (s.b * p.heads + h) * p.q_len + s.q0 + i;
    auto columns = [&](const float* panels, int64_t width) {
      return TileOperand{panels + n * panel_rows<AMX>(width) * NR, NR * 4, TILE * NR * 4, 64};
    };
    tile_rows(packed.q_rows(s, h, i), columns(t.k_panels, p.head_dim), NR / TILE, t.scores, NR, q_steps());
    tile_rows(packed.o_rows(s, h, i), columns(t.v_panels, p.value_dim), NR / TILE, t.products, NR, v_steps());
    const float *lses = p.lse + first, *deltas = p.delta + first;
    for (int64_t r = 0; r < count; ++r) simple = simple && !large(lses[r]);
    if (simple)
      soft(lses, deltas, i, count, j, seen, output(block, n));
    else
      general(lses, deltas, rests + first, i, count, j, output(block, n));
  }

  void soft(const float* lses, const float* deltas, int64_t i, int64_t count, int64_t j, Shown seen,
            const PanelOutput& out) {
    float lse[ROWS], delta[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) {
      lse[r] = r < count ? row_lse(lses[r]) * LOG2E : 0.0F;
      delta[r] = r < count ? deltas[r] : 0.0F;
    }
    uint64_t bits[ROWS];
    const bool masked = panel_mask(p, s, t.bias.head, i, count, j, seen, bits), floats = t.bias_grad.any();
    with_diagonal_bias(t.bias, t.slopes, t.intercepts, p.scale, i, j, [&](const auto& finish) {
      if (masked)
        soft_panel<true>(t.scores, t.products, out, lse, delta, bits, floats, finish);
      else
        soft_panel<false>(t.scores, t.products, out, lse, delta, bits, floats, finish);
      return true;
    });
    for (int64_t r = 0; floats && r < count; ++r) t.bias_grad.add(t.products + r * NR, i + r, j, NR);
  }

  void general(const float* lses, const float* deltas, const float* left, int64_t i, int64_t count, int64_t j,
               const PanelOutput& out) {
    for (int64_t r = 0; r < ROWS; ++r) {
      float *x = t.scores + r * NR, *dp = t.products + r * NR;
      if (r < count) {
        const RowStep row{p, s, t.plain, dropout, row_lse(lses[r]), left[r], deltas[r]};
        row.run<AMX::exp_degree>(x, dp, i + r, j, NR, p.scale, t.cap_slope, t.keep, t.bias_grad);
      } else {
        fill(x, 0.0F, NR);
        fill(dp, 0.0F, NR);
      }
    }
    put_panel(t.scores, t.products, out);
  }

  // dQ of rows i .. i + count += dS K over panels from .. to - 1.
  void add_to_grad_q(int64_t h, int64_t i, int64_t count, int64_t block, int64_t from, int64_t to) {
    float* sums = p.grad_q_sum + ((s.b * p.heads + h) * p.q_len + s.q0 + i) * p.head_dim;
    const TileOperand ds{output(block, from).ds_rows, 64, ROWS * 64, TILE * 64};
    const TileOperand k{t.k_depth + from * NR / 2 * t.q_width, t.q_width * 4, TILE * t.q_width * 4, 64};
    const int64_t tiles = t.q_width / TILE, steps = (to - from) * NR / TILE_DEPTH;
    if (count == ROWS && t.q_width == p.head_dim) return tile_product<true>(ds, 2, k, tiles, sums, t.q_width, steps);
    for (int64_t r = 0; r < count; ++r)
      load_floats(t.sums + r * t.q_width, sums + r * p.head_dim, DType::f32, p.head_dim);
    tile_product<true>(ds, 2, k, tiles, t.sums, t.q_width, steps);
    for (int64_t r = 0; r < count; ++r)
      store_floats(sums + r * p.head_dim, t.sums + r * t.q_width, DType::f32, p.head_dim);
  }

  // C [width][TASK_KEYS] += columns T over blocks from .. to - 1, for the keys of one panel.
  void add_over_rows(float* c, int64_t width, const float* columns, const float* pairs, int64_t n, int64_t from,
                     int64_t to) const {
    const TileOperand a{columns, 64, packed.bytes_each(), TILE * 64};
    const TileOperand b{pairs + (from * KEY_TILES + n * NR / TILE) * TILE_FLOATS, 64, KEY_TILES * TILE_FLOATS * 4,
                        TILE_FLOATS * 4};
    tile_product<true>(a, width / TILE, b, NR / TILE, c + n * NR, TASK_KEYS, to - from);
  }

  // One step of rows of head h: dQ, and what they add to dK and dV.
  void step(int64_t h, int64_t i0, int64_t rows, bool simple) {
    const int64_t blocks = ceil_div(rows, ROWS), panels = ceil_div(keys, NR);
    int64_t first[BLOCKS], last[BLOCKS];  // the panels that each block meets
    for (int64_t b = 0; b < blocks; ++b) {
      const Interval any = needed_by_any(p, s, h, i0 + b * ROWS, i0 + imin((b + 1) * ROWS, rows));
      first[b] = iclamp((any.lo - j0) / NR, 0, panels);
      last[b] = any.lo < any.hi ? iclamp(ceil_div(imax(any.hi - j0, 0), NR), first[b], panels) : first[b];
    }
    // Panel by panel, so that K and V stay in the first-level cache.
    for (int64_t n = 0; n < panels; ++n) {
      int64_t from = blocks, to = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        if (n < first[b] || n >= last[b]) continue;
        panel(h, i0 + b * ROWS, imin(ROWS, rows - b * ROWS), b, n, simple);
        from = imin(from, b);
        for (int64_t skipped = to; to > 0 && skipped < b; ++skipped) clear(skipped, n);
        to = b + 1;
      }
      if (from >= to) continue;
      const int64_t i = i0 + from * ROWS;
      if (p.grad_v) add_over_rows(t.grad_v, t.v_width, packed.o_columns(s, h, i), t.p_pairs, n, from, to);
      if (p.grad_k) add_over_rows(t.grad_k, t.q_width, packed.q_columns(s, h, i), t.ds_pairs, n, from, to);
    }
    for (int64_t b = 0; p.grad_q && b < blocks; ++b)
      if (first[b] < last[b]) add_to_grad_q(h, i0 + b * ROWS, imin(ROWS, rows - b * ROWS), b, first[b], last[b]);
  }

  // A block that meets no key of a panel.
  void clear(int64_t block, int64_t n) const {
    const PanelOutput out = output(block, n);
    fill(out.p_pairs, 0.0F, NR / TILE * TILE_FLOATS);
    fill(out.ds_pairs, 0.0F, NR / TILE * TILE_FLOATS);
    fill(out.ds_rows, 0.0F, NR / TILE_DEPTH * ROWS * TILE);
  }

  // C [width][TASK_KEYS], its keys in the order of `column_of`, becomes rows [keys][width], in place by way of `rows`.
  static void turn(float* c, int64_t width, float* rows) {
    for (int64_t d = 0; d < width; d += TILE)
      for (int64_t n = 0; n < TASK_KEYS; n += TILE)
        transpose(rows + n * width + d, width, c + d * TASK_KEYS + n, TASK_KEYS);
    for (int64_t key = 0; key < TASK_KEYS; ++key)
      load_floats(c + key * width, rows + column_of(key) * width, DType::f32, width);
  }
};

inline void tile_backward_task(const Problem& p, const Sequence& s, int64_t kv_head, int64_t j0, const Turn& turn,
                               const float* rests, const PackedRows& packed, TileBackwardScratch& t) {
  const int64_t group = p.heads / p.kv_heads, keys = imin(TASK_KEYS, s.k_len - j0);
  const int64_t steps = ceil_div(s.q_len, STEP_ROWS);
  const bool shared_dense = shares_dense_gradient(p);
  TileBackward task{p, s, t, packed, rests, j0, keys, Dropout(p)};

  pack_panels<AMX>(t.k_panels, key_source(p, s, kv_head), j0, keys);
  pack_panels<AMX>(t.v_panels, value_source(p, s, kv_head), j0, keys);
  pack_depth<AMX>(t.k_depth, t.q_width, key_source(p, s, kv_head), j0, keys, round_up(keys, NR));
  fill(t.grad_k, 0.0F, TASK_KEYS * t.q_width);
  fill(t.grad_v, 0.0F, TASK_KEYS * t.v_width);

  for (int64_t member = 0; member < group; ++member) {
    const int64_t h = kv_head * group + member;
    t.plain.prepare(p, p.bias, s, h, {0, s.q_len, j0, j0 + keys});
    const bool simple = is_simple(p, t.plain, p.scale) && !(p.dropout_p > 0.0);
    if (simple) {
      t.bias.prepare(p, p.bias, s, h, {0, s.q_len, j0, j0 + keys});
      change_base(t.bias, t.slopes, t.intercepts);
    }
    t.bias_grad.clear(t.plain, member == 0);

    for (int64_t step = 0; step < steps && !interrupted(); ++step) {
      const int64_t i0 = step * STEP_ROWS, rows = imin(STEP_ROWS, s.q_len - i0), number = member * steps + step + 1;
      const Interval any = needed_by_any(p, s, h, i0, i0 + rows);
      if (shared_dense) turn.progress.wait(turn.before(), (group - 1) * steps + step + 1);
      if (any.lo < j0 + keys && any.hi > j0) {
        turn.progress.wait(turn.earlier(), number);
        task.step(h, i0, rows, simple);
      }
      turn.progress.publish(turn.task, number);
    }
    if (t.bias_grad.any()) {
      turn.flushed.wait(turn.task - 1, member + 1);
      t.bias_grad.flush(member == group - 1);
      turn.flushed.publish(turn.task, member + 1);
    }
  }

  TileBackward::turn(t.grad_k, t.q_width, t.turned);
  TileBackward::turn(t.grad_v, t.v_width, t.turned);
  write_key_grads(p, s, kv_head, j0, keys, p.scale, t.grad_k, t.q_width, t.grad_v, t.v_width);
}

inline void tile_backward(const Problem& call) {
  with_reach(call, [](const Problem& p) {
    const PackedRows packed(p);
    for_runs_of_keys<AMX, TileBackwardScratch>(
        p, TASK_KEYS,
        [&](const Sequence& s, int64_t kv_head, int64_t j0, const Turn& turn, const float* rests,
            TileBackwardScratch& scratch) { tile_backward_task(p, s, kv_head, j0, turn, rests, packed, scratch); });
  });
}

}  // namespace posattn::POSATTN_ISA
