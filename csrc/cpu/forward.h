// Flash attention forward. A task is one head and a run of its rows: keys pass in tiles that are packed once per task,
// rows pass in groups of M::rows, and every group carries its running maximum and sum.
#pragma once

#include <cmath>

#include "dropout.h"
#include "reach.h"
#include "scores.h"
#include "tasks.h"

namespace posattn::POSATTN_ISA {

// Rows of a task: packing a key costs about a quarter of a multiply-add per element, a row two, so a few hundred rows
// hide it; fewer when that would leave threads idle. The result does not depend on it.
constexpr int64_t ROWS_PER_TASK = 768;

template <class M>
struct ForwardScratch {
  float *q, *k, *v, *logits, *weights, *out, *most, *sum, *keep;
  BiasTile bias;
  int64_t q_stride, v_stride;

  ForwardScratch(Arena& arena, const Problem& p, int64_t rows) {
    q_stride = round_up(p.head_dim, 2 * VL) / M::pack;
    v_stride = round_up(p.value_dim, VL);
    q = arena.floats(rows * q_stride);
    k = arena.floats(TILE_KEYS * panel_rows<M>(p.head_dim));
    v = arena.floats(TILE_KEYS / M::pack * v_stride);
    logits = arena.floats(M::rows * ROW_MAX);
    weights = M::pack == 1 ? logits : arena.floats(M::rows * ROW_MAX);
    out = arena.floats(rows * v_stride);
    most = arena.floats(rows);
    sum = arena.floats(rows);
    keep = arena.floats(ROW_MAX);
    bias.layout(arena, p.bias, rows, p.max_k_len);
  }
};

// A number times log2(e) as two floats: the product is exact in float64.
struct Log2 {
  float high, low;
  explicit Log2(float x) {
    const double product = static_cast<double>(x) * static_cast<double>(LOG2E);
    high = static_cast<float>(product);
    low = static_cast<float>(product - static_cast<double>(high));
  }
};

// A logit from here on is out of reach of what it should be measured by: as a product that is not rounded (x * mul
// beside the rounded m) it may be more than exp's range away, and in units of log2 it may overflow.
constexpr float FAR_LOGIT = 1e9F;

inline bool is_far(float x) {
  return x > FAR_LOGIT || x < -FAR_LOGIT;
}

// x becomes x * mul - m. The product is rounded first, as m was: a loop of its own keeps the two from being fused.
inline void subtract_far(float* x, int64_t n, float mul, float m) {
  for (int64_t c = 0; mul != 1.0F && c < n; c += VL) store(x + c, load(x + c) * mul);
  for (int64_t c = 0; c < n; c += VL) store(x + c, load(x + c) - m);
}

// exp(x * mul - m) as elements of P; returns the sum. The change of base is exact inside the multiply-add and m's two
// halves, so logits lose nothing by it however far from zero.
template <class M>
inline float exponentiate(float* weights, const float* x, int64_t n, float mul, float m) {
  const Log2 base(m);
  vf sum0 = zero(), sum1 = zero(), times = set1(mul * LOG2E), high = set1(-base.high), low = set1(base.low);
  for (int64_t c = 0; c < n; c += 2 * VL) {
    vf a = exp2<M::exp_degree>(fused(load(x + c), times, high) - low);
    vf b = exp2<M::exp_degree>(fused(load(x + c + VL), times, high) - low);
    sum0 += a;
    sum1 += b;
    if constexpr (M::pack == 1) {
      store(weights + c, a);
      store(weights + c + VL, b);
    } else {
      store(weights + c / 2, bf16_row(a, b));
    }
  }
  return reduce_add(sum0 + sum1);
}

inline void scale_row(float* x, float by, int64_t n) {
  for (int64_t c = 0; c < n; c += VL) store(x + c, load(x + c) * by);
}

// One step of the online softmax: x (times mul) becomes weights against the row's new maximum, and what the row had
// before is scaled to it. x is scratch afterwards.
template <class M>
inline void add_tile(float* weights, float* x, int64_t n, float tile_most, float mul, float& most, float& sum,
                     float* out, int64_t width) {
  const float next = fmax2(most, tile_most), base = next == NEG_INF ? 0.0F : next;
  const bool far = is_far(base);
  if (far) subtract_far(x, n, mul, base);
  const float part = exponentiate<M>(weights, x, n, far ? 1.0F : mul, far ? 0.0F : base);
  if (next != most) {
    const float kept = exp2_scalar((most - base) * LOG2E);
    sum *= kept;
    scale_row(out, kept, width);
    most = next;
  }
  sum += part;
}

// Divides by the row's sum, adds the sink to it, and writes one row and its log-sum-exp.
inline void write_row(const Problem& p, const Sequence& s, int64_t h, int64_t i, float* out, double m, float sum) {
  if (p.sinks) {
    const double sink = static_cast<double>(p.sinks[h]), top = m > sink ? m : sink;
    if (top > static_cast<double>(NEG_INF)) {
      const float kept = ::expf(static_cast<float>(m - top));
      for (int64_t c = 0; c < p.value_dim; ++c) out[c] *= kept;
      sum = sum * kept + ::expf(static_cast<float>(sink - top));
      m = top;
    }
  }
  const float inverse = sum == 0.0F ? 0.0F : 1.0F / sum;  // a NaN sum must stay NaN
  for (int64_t c = 0; c < p.value_dim; ++c) out[c] *= inverse;
  store_floats(const_cast<char*>(row_pointer(p.out, s.b, h, s.q0 + i)), out, p.out.dtype, p.value_dim);
  const double lse = sum == 0.0F ? static_cast<double>(NEG_INF) : m + ::log(static_cast<double>(sum));
  p.lse[(s.b * p.heads + h) * p.q_len + s.q0 + i] = static_cast<float>(lse);
}

// Multiplies a row of P by its dropout factors.
template <class M>
inline void drop_row(const Problem& p, const Sequence& s, const Dropout& dropout, float* keep, float* weights,
                     int64_t h, int64_t i, int64_t j, int64_t n) {
  dropout.row(keep, s.b * p.heads + h, s.q0 + i, s.k0 + j, n);
  if constexpr (M::pack == 1) {
    for (int64_t c = 0; c < n; ++c) weights[c] *= keep[c];
  } else {
    auto* pairs = reinterpret_cast<uint16_t*>(weights);
    for (int64_t c = 0; c < n; ++c) pairs[c] = float_to_bf16(bf16_to_float(pairs[c]) * keep[c]);
  }
}

template <class M>
void forward_task(const Problem& p, const Sequence& s, int64_t h, int64_t i0, int64_t i1, ForwardScratch<M>& t) {
  const int64_t kv_head = h / (p.heads / p.kv_heads), rows = i1 - i0;
  const float q_scale = M::pack == 1 ? p.scale : 1.0F, product_scale = M::pack == 1 ? 1.0F : p.scale;
  const Source keys = key_source(p, s, kv_head), values = value_source(p, s, kv_head);
  const int64_t depth = elements<M>(p.head_dim), panel = panel_rows<M>(p.head_dim) * NR, v_vectors = t.v_stride / VL;
  const Dropout dropout(p);
  const bool drop = p.dropout_p > 0.0;

  t.bias.prepare(p, p.bias, s, h, {i0, i1, 0, s.k_len});
  pack_rows<M>(t.q, t.q_stride, query_source(p, s, h, q_scale), i0, rows, round_up(rows, M::rows));
  fill(t.out, 0.0F, round_up(rows, M::rows) * t.v_stride);
  fill(t.most, NEG_INF, round_up(rows, M::rows));
  fill(t.sum, 0.0F, round_up(rows, M::rows));

  const Interval all = needed_by_any(p, s, h, i0, i1);
  for (int64_t j0 = all.lo / TILE_KEYS * TILE_KEYS; j0 < all.hi && !interrupted(); j0 += TILE_KEYS) {
    const int64_t tile = imin(TILE_KEYS, s.k_len - j0);
    pack_panels<M>(t.k, keys, j0, tile);
    const float* v = M::pack == 1 && tile % (2 * VL) == 0 ? in_place<M>(values, j0, tile) : nullptr;
    const int64_t v_row = v ? p.v.row : t.v_stride;
    if (!v) {
      pack_depth<M>(t.v, t.v_stride, values, j0, tile, round_up(tile, 2 * VL));
      v = t.v;
    }

    for (int64_t g = 0; g < rows; g += M::rows) {
      const int64_t count = imin(M::rows, rows - g);
      const Interval any = needed_by_any(p, s, h, i0 + g, i0 + g + count);
      if (any.lo >= j0 + tile || any.hi <= j0) continue;
      const int64_t begin = imax(any.lo - j0, 0) / NR * NR;
      const int64_t end = round_up(imin(any.hi - j0, tile), 2 * VL), n = end - begin;

      float most[M::rows];
      const Scores<M> scores{
          p,  s,     t.bias, t.q + g * t.q_stride, t.q_stride, t.k, depth, panel, product_scale, i0 + g, count,
          j0, begin, end};
      const float mul = scores.run(t.logits, most);
      // One pass for all maxima before the next: each ends in a chain of shuffles that another row's work hides.
      for (int64_t r = 0; r < count; ++r) {
        float* w = t.weights + r * ROW_MAX + begin / M::pack;
        add_tile<M>(w, t.logits + r * ROW_MAX + begin, n, most[r] * mul, mul, t.most[g + r], t.sum[g + r],
                    t.out + (g + r) * t.v_stride, t.v_stride);
        if (drop) drop_row<M>(p, s, dropout, t.keep, w, h, i0 + g + r, j0 + begin, n);
      }
      for (int64_t r = count; r < M::rows; ++r) fill(t.weights + r * ROW_MAX + begin / M::pack, 0.0F, n / M::pack);
      gemm_rows<M, Into::sum>(t.weights + begin / M::pack, ROW_MAX, 1, v + begin / M::pack * v_row, v_row,
                              t.out + g * t.v_stride, t.v_stride, n / M::pack, v_vectors);
    }
  }
  for (int64_t r = 0; r < rows; ++r) write_row(p, s, h, i0 + r, t.out + r * t.v_stride, t.most[r], t.sum[r]);
}

inline int64_t rows_per_task(const Problem& p) {
  int64_t rows = ROWS_PER_TASK;
  auto tasks = [&](int64_t r) { return p.n_sequences * p.heads * ceil_div(p.q_len, r); };
  while (rows > 96 && tasks(rows) < 4 * p.threads) rows /= 2;
  return rows;
}

// Runs task(sequence, head, first row, row behind the last, scratch) over all rows.
template <class M, class Scratch, class Task>
void for_runs_of_rows(const Problem& p, const Task& run) {
  const int64_t step = rows_per_task(p);
  const int64_t longest = longest_queries(p);
  const int64_t chunks = ceil_div(longest, step), rows = imin(step, round_up(longest, M::rows));
  run_tasks(
      p.threads, chunks * p.n_sequences * p.heads, [&](Arena& arena) { Scratch(arena, p, rows); },
      [&](Arena& arena, int64_t task) {
        // The last rows of a causal sequence see the most keys: they go first, so that the end of the work is even.
        const int64_t h = task % p.heads, chunk = chunks - 1 - task / p.heads / p.n_sequences;
        const Sequence& s = p.sequences[task / p.heads % p.n_sequences];
        const int64_t i0 = chunk * step, i1 = imin(i0 + step, s.q_len);
        if (i0 >= i1) return;
        [[maybe_unused]] const typename M::Session session;
        Scratch scratch(arena, p, rows);
        run(s, h, i0, i1, scratch);
      });
}

template <class M>
void forward_rows(const Problem& p) {
  for_runs_of_rows<M, ForwardScratch<M>>(
      p, [&](const Sequence& s, int64_t h, int64_t i0, int64_t i1, ForwardScratch<M>& scratch) {
        forward_task<M>(p, s, h, i0, i1, scratch);
      });
}

template <class M>
void forward(const Problem& call) {
  with_reach(call, forward_rows<M>);
}

}  // namespace posattn::POSATTN_ISA
