// Flash attention forward with DAPE: the logits of all heads of a tile are there at once, so a task is a run of rows
// with all its heads. Otherwise as forward.h.
#pragma once

#include "forward.h"
#include "mix.h"

namespace posattn::POSATTN_ISA {

template <class M>
struct MixForwardScratch {
  MixWeights weights;
  MixBias inner;
  HeadTiles bias;
  int64_t rows, q_stride, v_stride;
  float *q, *k, *v, *logits, *hidden, *p, *out, *most, *sum, *keep;

  MixForwardScratch(Arena& arena, const Problem& c, int64_t task_rows) : weights(arena, c), rows(mix_rows(c)) {
    inner.layout(arena, c, weights, task_rows, c.max_k_len);
    bias.layout(arena, c.bias, c.heads, task_rows, c.max_k_len);
    q_stride = round_up(c.head_dim, 2 * VL) / M::pack, v_stride = round_up(c.value_dim, VL);
    q = arena.floats(c.heads * task_rows * q_stride);
    k = arena.floats(c.kv_heads * MIX_KEYS * panel_rows<M>(c.head_dim));
    v = arena.floats(c.kv_heads * MIX_KEYS / M::pack * v_stride);
    logits = arena.floats(c.heads * rows * MIX_KEYS);
    hidden = arena.floats(weights.w_pad * MIX_KEYS);
    p = arena.floats(MR * MIX_KEYS / M::pack);
    out = arena.floats(c.heads * task_rows * v_stride);
    most = arena.floats(c.heads * task_rows);
    sum = arena.floats(c.heads * task_rows);
    keep = arena.floats(MIX_KEYS);
  }
};

// Raw products of one head, [rows x MIX_KEYS], become x: scaled and softcapped.
inline void scale_products(const Problem& p, float* x, int64_t n, float mul, float* cap_slope) {
  if (p.softcap > 0.0F)
    apply_softcap(x, n, p.softcap, mul, cap_slope);
  else if (mul != 1.0F)
    for (int64_t c = 0; c < n; c += VL) store(x + c, load(x + c) * mul);
}

// Ends in finish(head, row, weighted sum of values, maximum, sum of weights) for every row.
template <class M, class Finish>
void mix_forward_task(const Problem& p, const Sequence& s, int64_t i0, int64_t i1, int64_t task_rows,
                      MixForwardScratch<M>& t, const Finish& finish) {
  const int64_t heads = p.heads, group = heads / p.kv_heads, head_logits = t.rows * MIX_KEYS;
  const int64_t depth = elements<M>(p.head_dim), panels = MIX_KEYS * panel_rows<M>(p.head_dim);
  const int64_t panel = panel_rows<M>(p.head_dim) * NR, values = MIX_KEYS / M::pack * t.v_stride;
  const float q_scale = M::pack == 1 ? p.scale : 1.0F, product_scale = M::pack == 1 ? 1.0F : p.scale;
  const Dropout dropout(p);
  const MixWeights& w = t.weights;
  Problem plain = p;  // the softcap comes before the mix
  plain.softcap = 0.0F;

  t.weights.load(p.head_mix);
  t.inner.prepare(p, w, s, {i0, i1, 0, s.k_len});
  t.bias.prepare(p, p.bias, s, {i0, i1, 0, s.k_len});
  for (int64_t h = 0; h < heads; ++h)
    pack_rows<M>(t.q + h * task_rows * t.q_stride, t.q_stride, query_source(p, s, h, q_scale), i0, i1 - i0, task_rows);
  fill(t.out, 0.0F, heads * task_rows * t.v_stride);
  fill(t.most, NEG_INF, heads * task_rows);
  fill(t.sum, 0.0F, heads * task_rows);

  const Interval all = allowed_by_any(p, s, i0, i1);
  for (int64_t j = all.lo / MIX_KEYS * MIX_KEYS; j < all.hi && !interrupted(); j += MIX_KEYS) {
    const int64_t keys = imin(MIX_KEYS, s.k_len - j);
    for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
      pack_panels<M>(t.k + kv * panels, key_source(p, s, kv), j, keys);
      for (int64_t c = round_up(keys, NR); c < MIX_KEYS; c += NR) fill(t.k + kv * panels + c / NR * panel, 0.0F, panel);
      pack_depth<M>(t.v + kv * values, t.v_stride, value_source(p, s, kv), j, keys, MIX_KEYS);
    }
    for (int64_t b0 = 0; b0 < i1 - i0; b0 += t.rows) {
      const int64_t count = imin(t.rows, i1 - i0 - b0);
      const Interval any = allowed_by_any(p, s, i0 + b0, i0 + b0 + count);
      if (any.lo >= j + MIX_KEYS || any.hi <= j) continue;

      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t g = 0; g < count; g += MR)
          for (int64_t c = 0; c < MIX_KEYS; c += NR)
            gemm_rows<M, Into::fresh>(t.q + (h * task_rows + b0 + g) * t.q_stride, t.q_stride, 1,
                                      t.k + h / group * panels + c / NR * panel, NR,
                                      t.logits + h * head_logits + g * MIX_KEYS + c, MIX_KEYS, depth, NR / VL);
        scale_products(p, t.logits + h * head_logits, count * MIX_KEYS, product_scale, nullptr);
      }
      for (int64_t r = 0; r < count; ++r) {
        float* x = t.logits + r * MIX_KEYS;
        t.inner.fetch(w, i0 + b0 + r, j);
        mix_hidden(w, t.inner, x, head_logits, i0 + b0 + r, j, t.hidden);
        mix_output(w, t.inner, x, head_logits, i0 + b0 + r, j, t.hidden, x);
      }
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t g = 0; g < count; g += MR) {
          for (int64_t r = 0; r < MR; ++r) {
            float* weights = t.p + r * MIX_KEYS / M::pack;
            if (g + r >= count) {
              fill(weights, 0.0F, MIX_KEYS / M::pack);
              continue;
            }
            const int64_t i = i0 + b0 + g + r, row = h * task_rows + b0 + g + r;
            float* x = t.logits + h * head_logits + (g + r) * MIX_KEYS;
            float mul = 1.0F;
            const float top = reduce_max(finish_row(plain, s, t.bias[h], x, i, allowed(p, s, i), j, MIX_KEYS, mul));
            add_tile<M>(weights, x, MIX_KEYS, top, 1.0F, t.most[row], t.sum[row], t.out + row * t.v_stride, t.v_stride);
            if (p.dropout_p > 0.0) drop_row<M>(p, s, dropout, t.keep, weights, h, i, j, MIX_KEYS);
          }
          gemm_rows<M, Into::sum>(t.p, MIX_KEYS / M::pack, 1, t.v + h / group * values, t.v_stride,
                                  t.out + (h * task_rows + b0 + g) * t.v_stride, t.v_stride, MIX_KEYS / M::pack,
                                  t.v_stride / VL);
        }
      }
    }
  }
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t r = 0; r < i1 - i0; ++r) {
      const int64_t row = h * task_rows + r;
      finish(h, i0 + r, t.out + row * t.v_stride, t.most[row], t.sum[row]);
    }
}

template <class M>
void mix_forward(const Problem& p) {
  const int64_t longest = longest_queries(p);
  // Packing a tile of keys is spread over the rows of a task (at 96 rows it took 8% of the time, at 192 half of that);
  // short calls prefer more tasks.
  int64_t step = 8 * mix_rows(p);
  while (step > mix_rows(p) && p.n_sequences * ceil_div(longest, step) < 4 * p.threads) step -= mix_rows(p);
  const int64_t chunks = ceil_div(longest, step);
  run_tasks(
      p.threads, chunks * p.n_sequences, [&](Arena& arena) { MixForwardScratch<M>(arena, p, step); },
      [&](Arena& arena, int64_t task) {
        const int64_t chunk = chunks - 1 - task / p.n_sequences;
        const Sequence& s = p.sequences[task % p.n_sequences];
        const int64_t i0 = chunk * step, i1 = imin(i0 + step, s.q_len);
        if (i0 >= i1) return;
        MixForwardScratch<M> scratch(arena, p, step);
        mix_forward_task<M>(p, s, i0, i1, step, scratch, [&](int64_t h, int64_t i, float* out, float most, float sum) {
          write_row(p, s, h, i, out, most, sum);
        });
      });
}

}  // namespace posattn::POSATTN_ISA
