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

template <class M>
struct TileBackwardScratch {
  int64_t q_width, v_width;
  float *k_panels, *v_panels, *k_depth, *grad_k, *grad_v;
  float *scores[2], *products[2];  // [ROWS][NR]: S and P, dP and dS, and those of the panel that is next
  float *p_pairs, *ds_pairs;  // [BLOCKS][KEY_TILES][parts] tiles: pairs of rows by keys, in the order of `column_of`
  float* ds_rows;             // [BLOCKS][TASK_KEYS / 32][ROWS / 16][parts] tiles: rows of 32 keys
  float* turned;              // at last dK and dV by rows, where the pairs were
  float *cap_slope, *keep, *sums, *slopes, *intercepts;
  BiasTile bias, plain;  // in units of log2, and in natural ones
  BiasGrad bias_grad;

  TileBackwardScratch(Arena& arena, const Problem& p, int64_t longest_q)
      : q_width(round_up(p.head_dim, TILE)), v_width(round_up(p.value_dim, TILE)) {
    k_panels = arena.floats(M::parts * TASK_KEYS * panel_rows<AMX>(p.head_dim));
    v_panels = arena.floats(M::parts * TASK_KEYS * panel_rows<AMX>(p.value_dim));
    k_depth = arena.floats(M::parts * TASK_KEYS / 2 * q_width);
    grad_k = arena.floats(TASK_KEYS * q_width);
    grad_v = arena.floats(TASK_KEYS * v_width);
    for (float*& x : scores) x = arena.floats(ROWS * NR);
    for (float*& x : products) x = arena.floats(ROWS * NR);
    const int64_t pairs = M::parts * BLOCKS * KEY_TILES * TILE_FLOATS;
    turned = arena.floats(imax(2 * pairs, TASK_KEYS * imax(q_width, v_width)));
    p_pairs = turned, ds_pairs = turned + pairs;
    ds_rows = arena.floats(M::parts * BLOCKS * ROWS * TASK_KEYS / 2);
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

// Two rows of 32 bfloat16 keys become two tiles' rows of pairs by unpacking, which leaves the keys of 32 in this order.
template <class M>
constexpr int64_t column_of(int64_t key) {
  const int64_t lane = key % 32 / 8, at = key % 8;
  return M::parts > 1 ? key : key / 32 * 32 + (at < 4 ? 0 : 16) + lane * 4 + at % 4;
}

// Where a panel of one block goes.
template <class M>
struct PanelOutput {
  float *p_pairs, *ds_pairs, *ds_rows;

  // 32 keys of rows r and r + 1, as two vectors each.
  POSATTN_INLINE void put(int r, int half, const vf (&p)[2][2], const vf (&of_ds)[2][2]) const {
    const int64_t at = half * 2 * M::parts * TILE_FLOATS + r / 2 * TILE;
    float *to_p = p_pairs + at, *to_ds = ds_pairs + at;
    float* to_rows = ds_rows + (half * 2 + r / TILE) * M::parts * TILE_FLOATS + r % TILE * TILE;
    if constexpr (M::parts == 1) {
      const auto p0 = (__m512i)bf16_row(p[0][0], p[0][1]), p1 = (__m512i)bf16_row(p[1][0], p[1][1]);
      const auto ds0 = (__m512i)bf16_row(of_ds[0][0], of_ds[0][1]), ds1 = (__m512i)bf16_row(of_ds[1][0], of_ds[1][1]);
      store(to_p, (vf)_mm512_unpacklo_epi16(p0, p1));
      store(to_p + TILE_FLOATS, (vf)_mm512_unpackhi_epi16(p0, p1));
      store(to_ds, (vf)_mm512_unpacklo_epi16(ds0, ds1));
      store(to_ds + TILE_FLOATS, (vf)_mm512_unpackhi_epi16(ds0, ds1));
      store(to_rows, (vf)ds0);
      store(to_rows + TILE, (vf)ds1);
    } else {
      constexpr int64_t NEXT = M::parts * TILE_FLOATS;
      for (int v = 0; v < 2; ++v) split_pair<M::parts>(p[0][v], p[1][v], to_p + v * NEXT, TILE_FLOATS);
      vf ds[2][2] = {{of_ds[0][0], of_ds[0][1]}, {of_ds[1][0], of_ds[1][1]}};
#pragma GCC unroll 3
      for (int t = 0; t < M::parts; ++t) {
        const int64_t part = t * TILE_FLOATS;
        if (t == M::parts - 1)
          for (auto& row : ds)
            for (vf& x : row) x = last_part<M::parts>(x);
        store(to_ds + part, high_halves(ds[0][0], ds[1][0]));
        store(to_ds + NEXT + part, high_halves(ds[0][1], ds[1][1]));
        store(to_rows + part, high_halves(ds[0][0], ds[0][1]));
        store(to_rows + TILE + part, high_halves(ds[1][0], ds[1][1]));
        for (auto& row : ds)
          for (vf& x : row) x = without_high_half(x);
      }
    }
  }
};

// What a block's rows are measured by, in units of log2: lse as two floats, the second for parts alone.
struct RowMeasures {
  float lse[ROWS], lse_low[ROWS], delta[ROWS];
};

// Products [ROWS][NR] become P and dS; with `floats`, dS stays in `products` as well. `next` are the products of the
// panel that is next.
template <class M, bool MASKED, class Finish>
inline void soft_panel(const float* scores, float* products, const PanelOutput<M>& output, const RowMeasures& rows,
                       const uint64_t* bits, bool floats, PiecewiseProducts<M::parts>& next, const Finish& finish) {
  for (int first = 0; first < ROWS; first += 8)
    for_pieces([&](auto piece) __attribute__((always_inline)) {
      if constexpr (M::parts > 1) next.template take<piece.value>();
      if constexpr (piece.value % 2 == 0) return;
      const int r = first + piece.value / 4 * 2, half = piece.value / 2 % 2;
      vf p[2][2], ds[2][2];
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int c = half * 32 + v * VL;
          const float* dp = products + (r + q) * NR + c;
          vf logit = finish(r + q, c, load(scores + (r + q) * NR + c)) - set1(rows.lse[r + q]);
          if constexpr (M::parts > 1) logit -= set1(rows.lse_low[r + q]);
          p[q][v] = exp2_of_weight<M>(logit);
          if (MASKED) p[q][v] = keep(p[q][v], bits[r + q] >> c);
          ds[q][v] = p[q][v] * (load(dp) - set1(rows.delta[r + q]));
        }
      if (floats)
        for (int q = 0; q < 2; ++q)
          for (int v = 0; v < 2; ++v) store(products + (r + q) * NR + half * 32 + v * VL, ds[q][v]);
      output.put(r, half, p, ds);
    });
}

// The same of P and dS that are there as floats.
template <class M>
inline void put_panel(const float* scores, const float* products, const PanelOutput<M>& output) {
  for (int r = 0; r < ROWS; r += 2)
    for (int half = 0; half < 2; ++half) {
      const auto at = [&](const float* x, int q, int v) { return load(x + (r + q) * NR + half * 32 + v * VL); };
      const vf p[2][2] = {{at(scores, 0, 0), at(scores, 0, 1)}, {at(scores, 1, 0), at(scores, 1, 1)}};
      const vf ds[2][2] = {{at(products, 0, 0), at(products, 0, 1)}, {at(products, 1, 0), at(products, 1, 1)}};
      output.put(r, half, p, ds);
    }
}

// One task's heads share these.
template <class M>
struct TileBackward {
  const Problem& p;
  const Sequence& s;
  TileBackwardScratch<M>& t;
  const PackedRows<M>& packed;
  const float* rests;
  int64_t j0, keys;
  Dropout dropout;

  int64_t q_steps() const { return ceil_div(p.head_dim, TILE_DEPTH); }
  int64_t v_steps() const { return ceil_div(p.value_dim, TILE_DEPTH); }

  PanelOutput<M> output(int64_t block, int64_t panel) const {
    const int64_t tiles = (block * KEY_TILES + panel * NR / TILE) * M::parts * TILE_FLOATS;
    const int64_t rows = (block * TASK_KEYS + panel * NR) / 32 * ROWS * TILE * M::parts;
    return {t.p_pairs + tiles, t.ds_pairs + tiles, t.ds_rows + rows};
  }

  // Rows i .. i + count of head h, a block, over one panel.
  struct Visit {
    int64_t i, count, block, panel;
    Shown seen;
  };

  TileOperand columns(const float* panels, int64_t width, int64_t n) const {
    const float* at = panels + n * M::parts * panel_rows<AMX>(width) * NR;
    if constexpr (M::parts == 1) return {at, NR * 4, TILE * NR * 4, 64, 0};
    return split_rows_operand<M::parts>(at, width);
  }

  // One panel whose products are in the buffers of number `at`, or are taken now; those of `next`, if there is one, go
  // to the other buffers.
  void panel(int64_t h, const Visit& visit, bool ready, int at, const Visit* next, bool simple) {
    const auto& [i, count, block, n, seen] = visit;
    const int64_t j = j0 + n * NR, first = (s.b * p.heads + h) * p.q_len + s.q0 + i;
    float *scores = t.scores[at], *products = t.products[at];
    PiecewiseProducts<M::parts> ahead;
    if constexpr (M::parts == 1) {
      tile_rows(packed.q_rows(s, h, i), columns(t.k_panels, p.head_dim, n), NR / TILE, scores, NR, q_steps());
      tile_rows(packed.o_rows(s, h, i), columns(t.v_panels, p.value_dim, n), NR / TILE, products, NR, v_steps());
    } else {
      if (!ready) {
        ahead.add(packed.q_rows(s, h, i), columns(t.k_panels, p.head_dim, n), scores, q_steps());
        ahead.add(packed.o_rows(s, h, i), columns(t.v_panels, p.value_dim, n), products, v_steps());
        ahead.finish();
        ahead = {};
      }
      if (next) {
        ahead.add(packed.q_rows(s, h, next->i), columns(t.k_panels, p.head_dim, next->panel), t.scores[!at], q_steps());
        ahead.add(packed.o_rows(s, h, next->i), columns(t.v_panels, p.value_dim, next->panel), t.products[!at],
                  v_steps());
      }
    }
    const float *lses = p.lse + first, *deltas = p.delta + first;
    for (int64_t r = 0; r < count; ++r) simple = simple && !large(lses[r]);
    if (simple)
      soft(scores, products, lses, deltas, i, count, j, seen, output(block, n), ahead);
    else
      general(scores, products, lses, deltas, rests + first, i, count, j, output(block, n));
    if constexpr (M::parts > 1) ahead.finish();
  }

  void soft(const float* scores, float* products, const float* lses, const float* deltas, int64_t i, int64_t count,
            int64_t j, Shown seen, const PanelOutput<M>& out, PiecewiseProducts<M::parts>& ahead) {
    RowMeasures rows;
    for (int64_t r = 0; r < ROWS; ++r) {
      const Log2 lse(r < count ? row_lse(lses[r]) : 0.0F);
      rows.lse[r] = lse.high;
      rows.lse_low[r] = lse.low;
      rows.delta[r] = r < count ? deltas[r] : 0.0F;
    }
    uint64_t bits[ROWS];
    const bool masked = panel_mask(p, s, t.bias.head, i, count, j, seen, bits), floats = t.bias_grad.any();
    with_diagonal_bias(t.bias, t.slopes, t.intercepts, left_to_scale<M>(p.scale), i, j, [&](const auto& finish) {
      if (masked)
        soft_panel<M, true>(scores, products, out, rows, bits, floats, ahead, finish);
      else
        soft_panel<M, false>(scores, products, out, rows, bits, floats, ahead, finish);
      return true;
    });
    for (int64_t r = 0; floats && r < count; ++r) t.bias_grad.add(products + r * NR, i + r, j, NR);
  }

  void general(float* scores, float* products, const float* lses, const float* deltas, const float* left, int64_t i,
               int64_t count, int64_t j, const PanelOutput<M>& out) {
    const float mul = M::parts == 1 ? p.scale : static_cast<float>(LN2);  // products of parts are in units of log2
    for (int64_t r = 0; r < ROWS; ++r) {
      float *x = scores + r * NR, *dp = products + r * NR;
      if (r < count) {
        const RowStep row{p, s, t.plain, dropout, row_lse(lses[r]), left[r], deltas[r]};
        row.template run<M::exp_degree>(x, dp, i + r, j, NR, mul, t.cap_slope, t.keep, t.bias_grad);
      } else {
        fill(x, 0.0F, NR);
        fill(dp, 0.0F, NR);
      }
    }
    put_panel<M>(scores, products, out);
  }

  // dQ of rows i .. i + count += dS K over panels from .. to - 1.
  void add_to_grad_q(int64_t h, int64_t i, int64_t count, int64_t block, int64_t from, int64_t to) {
    float* sums = p.grad_q_sum + ((s.b * p.heads + h) * p.q_len + s.q0 + i) * p.head_dim;
    constexpr int64_t PART = TILE_FLOATS * 4;
    const TileOperand ds{output(block, from).ds_rows, 64, 2 * M::parts * PART, M::parts * PART, PART};
    const float* depth = t.k_depth + M::parts * from * NR / 2 * t.q_width;
    TileOperand k{depth, t.q_width * 4, TILE * t.q_width * 4, 64, 0};
    if constexpr (M::parts > 1) k = split_depth_operand<M::parts>(depth, p.head_dim);
    const int64_t tiles = t.q_width / TILE, steps = (to - from) * NR / TILE_DEPTH;
    if (count == ROWS && t.q_width == p.head_dim)
      return tile_product<M::parts, true>(ds, 2, k, tiles, sums, t.q_width, steps);
    for (int64_t r = 0; r < count; ++r)
      load_floats(t.sums + r * t.q_width, sums + r * p.head_dim, DType::f32, p.head_dim);
    tile_product<M::parts, true>(ds, 2, k, tiles, t.sums, t.q_width, steps);
    for (int64_t r = 0; r < count; ++r)
      store_floats(sums + r * p.head_dim, t.sums + r * t.q_width, DType::f32, p.head_dim);
  }

  // C [width][TASK_KEYS] += columns T over blocks from .. to - 1, for the keys of one panel.
  void add_over_rows(float* c, int64_t width, const TileOperand& columns_of_rows, const float* pairs, int64_t n,
                     int64_t from, int64_t to) const {
    constexpr int64_t PART = TILE_FLOATS * 4;
    const float* at = pairs + (from * KEY_TILES + n * NR / TILE) * M::parts * TILE_FLOATS;
    const TileOperand b{at, 64, KEY_TILES * M::parts * PART, M::parts * PART, PART};
    tile_product<M::parts, true>(columns_of_rows, width / TILE, b, NR / TILE, c + n * NR, TASK_KEYS, to - from);
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
    Visit visits[BLOCKS * PANELS];
    int64_t n_visits = 0;
    for (int64_t n = 0; n < panels; ++n)
      for (int64_t b = 0; b < blocks; ++b)
        if (n >= first[b] && n < last[b]) {
          const int64_t i = i0 + b * ROWS, count = imin(ROWS, rows - b * ROWS);
          visits[n_visits++] = {i, count, b, n, shown(p, s, h, i, i + count, j0 + n * NR)};
        }
    int buffer = 0;
    bool ready = false;
    for (int64_t at = 0; at < n_visits;) {
      const int64_t n = visits[at].panel, from = visits[at].block;
      int64_t to = from;
      for (; at < n_visits && visits[at].panel == n; ++at) {
        const Visit& visit = visits[at];
        for (; to < visit.block; ++to) clear(to, n);
        to = visit.block + 1;
        if (visit.seen == Shown::none) {
          clear(visit.block, n);
          continue;
        }
        int64_t next = at + 1;
        while (next < n_visits && visits[next].seen == Shown::none) ++next;
        panel(h, visit, ready, buffer, next < n_visits ? visits + next : nullptr, simple);
        ready = next < n_visits, buffer = !buffer;
      }
      const int64_t i = i0 + from * ROWS;
      if (p.grad_v) add_over_rows(t.grad_v, t.v_width, packed.o_columns(s, h, i), t.p_pairs, n, from, to);
      if (p.grad_k) add_over_rows(t.grad_k, t.q_width, packed.q_columns(s, h, i), t.ds_pairs, n, from, to);
    }
    for (int64_t b = 0; p.grad_q && b < blocks; ++b)
      if (first[b] < last[b]) add_to_grad_q(h, i0 + b * ROWS, imin(ROWS, rows - b * ROWS), b, first[b], last[b]);
  }

  // A block that meets no key of a panel.
  void clear(int64_t block, int64_t n) const {
    const PanelOutput<M> out = output(block, n);
    fill(out.p_pairs, 0.0F, M::parts * NR / TILE * TILE_FLOATS);
    fill(out.ds_pairs, 0.0F, M::parts * NR / TILE * TILE_FLOATS);
    fill(out.ds_rows, 0.0F, M::parts * NR / TILE_DEPTH * ROWS * TILE);
  }

  // C [width][TASK_KEYS], its keys in the order of `column_of`, becomes rows [keys][width], in place by way of `rows`.
  static void turn(float* c, int64_t width, float* rows) {
    for (int64_t d = 0; d < width; d += TILE)
      for (int64_t n = 0; n < TASK_KEYS; n += TILE)
        transpose(rows + n * width + d, width, c + d * TASK_KEYS + n, TASK_KEYS);
    for (int64_t key = 0; key < TASK_KEYS; ++key)
      load_floats(c + key * width, rows + column_of<M>(key) * width, DType::f32, width);
  }
};

template <class M>
inline void tile_backward_task(const Problem& p, const Sequence& s, int64_t kv_head, int64_t j0, const Turn& turn,
                               const float* rests, const PackedRows<M>& packed, TileBackwardScratch<M>& t) {
  const int64_t group = p.heads / p.kv_heads, keys = imin(TASK_KEYS, s.k_len - j0);
  const int64_t steps = ceil_div(s.q_len, STEP_ROWS);
  const bool shared_dense = shares_dense_gradient(p);
  TileBackward<M> task{p, s, t, packed, rests, j0, keys, Dropout(p)};

  const Source of_k = key_source(p, s, kv_head), of_v = value_source(p, s, kv_head);
  if constexpr (M::parts == 1) {
    pack_panels<AMX>(t.k_panels, of_k, j0, keys);
    pack_panels<AMX>(t.v_panels, of_v, j0, keys);
    pack_depth<AMX>(t.k_depth, t.q_width, of_k, j0, keys, round_up(keys, NR));
  } else {
    Largest known;  // to fit
    split_columns<M::parts>(t.k_panels, of_k, j0, keys, round_up(keys, NR), known);
    split_columns<M::parts>(t.v_panels, of_v, j0, keys, round_up(keys, NR), known);
    split_depth<M::parts>(t.k_depth, of_k, j0, keys, round_up(keys, NR), known);
  }
  fill(t.grad_k, 0.0F, TASK_KEYS * t.q_width);
  fill(t.grad_v, 0.0F, TASK_KEYS * t.v_width);

  for (int64_t member = 0; member < group; ++member) {
    const int64_t h = kv_head * group + member;
    t.plain.prepare(p, p.bias, s, h, {0, s.q_len, j0, j0 + keys});
    const bool simple = is_simple(p, M::parts == 1 ? p.scale : 1.0F) && !(p.dropout_p > 0.0);
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

  TileBackward<M>::turn(t.grad_k, t.q_width, t.turned);
  TileBackward<M>::turn(t.grad_v, t.v_width, t.turned);
  write_key_grads(p, s, kv_head, j0, keys, p.scale, t.grad_k, t.q_width, t.grad_v, t.v_width);
}

// Whether all of K and V can be split.
inline bool keys_fit(const Problem& p) {
  constexpr int64_t KEYS = 256;  // of a task
  const int64_t runs = ceil_div(p.max_k_len, KEYS);
  SharedLargest of_k, of_v;
  run_tasks(
      p.threads, p.n_sequences * p.kv_heads * runs, [](Arena&) {},
      [&](Arena&, int64_t task) {
        alignas(64) float row[MAX_WIDTH];
        const Sequence& s = p.sequences[task / runs / p.kv_heads];
        const int64_t h = task / runs % p.kv_heads, first = task % runs * KEYS;
        const Source sources[] = {key_source(p, s, h), value_source(p, s, h)};
        Largest largest[2];
        for (int64_t j = first; j < imin(first + KEYS, s.k_len); ++j)
          for (int n = 0; n < 2; ++n) {
            const Source& src = sources[n];
            load_floats(row, row_pointer(src.view, src.b, src.h, src.t0 + j), src.view.dtype, src.width);
            largest[n].see(row, src.width);
          }
        of_k.see(largest[0]);
        of_v.see(largest[1]);
      });
  return of_k.fits() && of_v.fits();
}

// Rows of a large log-sum-exp are measured by what the general mode's logits add up to.
inline bool any_large(const Problem& p) {
  for (int64_t n = 0; n < p.batch * p.heads * p.q_len; ++n)
    if (large(p.lse[n])) return true;
  return false;
}

template <class M>
void tile_backward(const Problem& call) {
  with_reach(call, [](const Problem& p) {
    const PackedRows<M> packed(p);
    if constexpr (M::parts > 1)
      if (any_large(p) || !packed.fit() || !keys_fit(p)) return backward_keys<typename M::General>(p);
    for_runs_of_keys<M, TileBackwardScratch<M>>(
        p, TASK_KEYS,
        [&](const Sequence& s, int64_t kv_head, int64_t j0, const Turn& turn, const float* rests,
            TileBackwardScratch<M>& scratch) { tile_backward_task(p, s, kv_head, j0, turn, rests, packed, scratch); });
  });
}

}  // namespace posattn::POSATTN_ISA
