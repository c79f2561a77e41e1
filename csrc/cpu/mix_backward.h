// Flash attention backward with DAPE. A task is 64 keys of all heads; for every block of rows it takes the logits
// through the MLP again, and dS back through it, with the weights' gradients summed in the task. Otherwise as
// backward.h.
#pragma once

#include "backward.h"
#include "mix_forward.h"

namespace posattn::POSATTN_ISA {

// The sums of one Bias for every head.
struct HeadGrads {
  BiasGrad* grads = nullptr;
  int64_t heads = 0;

  void layout(Arena& arena, const Problem& p, const Bias& bias, int64_t n_rows) {
    heads = p.heads;
    grads = reinterpret_cast<BiasGrad*>(arena.floats(static_cast<int64_t>(sizeof(BiasGrad)) / 4 * heads));
    for (int64_t h = 0; h < heads; ++h) {
      BiasGrad grad;
      grad.layout(arena, p, bias, n_rows, MIX_KEYS);
      if (arena.block) grads[h] = grad;
    }
  }
  void clear(const HeadTiles& tiles) {
    for (int64_t h = 0; h < heads; ++h) grads[h].clear(tiles[h], true);
  }
  bool any() const { return heads > 0 && grads[0].any(); }
  void flush() {
    for (int64_t h = 0; any() && h < heads; ++h) grads[h].flush(true);
  }
  BiasGrad& operator[](int64_t h) const { return grads[h]; }
};

// Sums that a task adds to the call's gradients at its end.
struct MixGrad {
  float *w2_t, *w1x_t, *w1b_t;  // [h_pad][w_lanes] each
  double *b1, *b2;              // [w_pad], [h_pad]
  float* hidden = nullptr;      // [width][MixBias::stride]: gradient of MixBias::hidden
  HeadGrads inner, outer;

  void layout(Arena& arena, const Problem& p, const MixWeights& w, const MixBias& bias, int64_t n_rows) {
    w2_t = arena.floats(w.h_pad * w.w_lanes);
    w1x_t = arena.floats(w.h_pad * w.w_lanes);
    w1b_t = arena.floats(w.h_pad * w.w_lanes);
    b1 = reinterpret_cast<double*>(arena.floats(2 * w.w_pad));
    b2 = reinterpret_cast<double*>(arena.floats(2 * w.h_pad));
    outer.layout(arena, p, p.bias, n_rows);
    if (w.folded) hidden = arena.floats(w.width * bias.stride);
    if (w.inner) inner.layout(arena, p, p.head_mix.inner, n_rows);
  }

  void clear(const MixWeights& w, const MixBias& bias, const HeadTiles& outer_tiles) {
    const int64_t n = w.h_pad * w.w_lanes;
    fill(w2_t, 0.0F, n), fill(w1x_t, 0.0F, n), fill(w1b_t, 0.0F, n);
    for (int64_t o = 0; o < w.w_pad; ++o) b1[o] = 0.0;
    for (int64_t h = 0; h < w.h_pad; ++h) b2[h] = 0.0;
    if (hidden) fill(hidden, 0.0F, w.width * bias.stride);
    if (w.inner) inner.clear(bias.tiles);
    outer.clear(outer_tiles);
  }
};

template <class M>
struct MixBackwardScratch {
  MixWeights weights;
  MixBias inner;
  HeadTiles bias;
  MixGrad grad;
  int64_t rows, q_stride, o_stride, q_width, v_width, hidden_row;
  float *k_panels, *v_panels, *k_depth, *grad_k, *grad_v;
  float *q_rows, *q_depth, *o_rows, *o_depth;  // of all heads
  float *x, *y, *dy, *cap, *hidden;            // [heads][rows][MIX_KEYS] each; hidden [rows][w_pad][MIX_KEYS]
  float *d_hidden, *transposed, *d_inner, *p_pairs, *ds_pairs, *ds_rows, *keep, *dq;

  MixBackwardScratch(Arena& arena, const Problem& c, int64_t longest) : weights(arena, c), rows(mix_rows(c)) {
    inner.layout(arena, c, weights, longest, MIX_KEYS);
    bias.layout(arena, c.bias, c.heads, longest, MIX_KEYS);
    grad.layout(arena, c, weights, inner, longest);
    q_stride = round_up(c.head_dim, 2 * VL) / M::pack, o_stride = round_up(c.value_dim, 2 * VL) / M::pack;
    q_width = round_up(c.head_dim, VL), v_width = round_up(c.value_dim, VL);
    hidden_row = imax(weights.w_pad, weights.w_lanes) * MIX_KEYS;
    k_panels = arena.floats(c.kv_heads * MIX_KEYS * panel_rows<M>(c.head_dim));
    v_panels = arena.floats(c.kv_heads * MIX_KEYS * panel_rows<M>(c.value_dim));
    k_depth = arena.floats(c.kv_heads * MIX_KEYS / M::pack * q_width);
    const int64_t key_rows = round_up(MIX_KEYS, MR);
    grad_k = arena.floats(c.kv_heads * key_rows * q_width);
    grad_v = arena.floats(c.kv_heads * key_rows * v_width);
    q_rows = arena.floats(c.heads * rows * q_stride);
    o_rows = arena.floats(c.heads * rows * o_stride);
    q_depth = arena.floats(c.heads * rows / M::pack * q_width);
    o_depth = arena.floats(c.heads * rows / M::pack * v_width);
    const int64_t tile = c.heads * rows * MIX_KEYS + MR;  // the last group of keys reads past its row
    x = arena.floats(tile), y = arena.floats(tile), dy = arena.floats(tile);
    cap = c.softcap > 0.0F ? arena.floats(tile) : nullptr;
    hidden = arena.floats(rows * hidden_row);
    d_hidden = arena.floats(hidden_row);
    transposed = arena.floats(MIX_KEYS * weights.w_lanes);
    d_inner = arena.floats(weights.h_pad * MIX_KEYS);
    p_pairs = arena.floats(rows / 2 * MIX_KEYS + MR), ds_pairs = arena.floats(rows / 2 * MIX_KEYS + MR);
    ds_rows = arena.floats(MR * MIX_KEYS);
    keep = arena.floats(MIX_KEYS);
    dq = arena.floats(MR * q_width);
  }
};

// sums[heads x w_lanes] += a[heads x MIX_KEYS] t[MIX_KEYS x w_lanes]
inline void add_outer(const MixWeights& w, float* sums, const float* a, int64_t a_head, const float* t) {
  for (int64_t h = 0; h < w.heads; h += MR) {
    // Past the last head there is nothing to read: the last group is taken again from where a whole one fits.
    if (h + MR <= w.heads) {
      gemm_rows<F32, Into::sum>(a + h * a_head, a_head, 1, t, w.w_lanes, sums + h * w.w_lanes, w.w_lanes, MIX_KEYS,
                                w.w_lanes / VL);
    } else {
      for (int64_t r = h; r < w.heads; ++r)
        for (int64_t c = 0; c < w.w_lanes; c += VL)
          micro<F32, 1, 1, Into::sum>(a + r * a_head, a_head, 1, t + c, w.w_lanes, sums + r * w.w_lanes + c, w.w_lanes,
                                      MIX_KEYS);
    }
  }
}

inline void transpose_hidden(const MixWeights& w, float* dst, const float* src) {
  for (int64_t o = 0; o < w.w_lanes; o += VL)
    for (int64_t c = 0; c < MIX_KEYS; c += VL)
      transpose(dst + c * w.w_lanes + o, w.w_lanes, src + o * MIX_KEYS + c, MIX_KEYS);
}

// One row of dS (in dy, all heads) back through the MLP: dy becomes dx, and the weights' and inner bias's sums grow.
template <class M>
void mix_row_backward(MixBackwardScratch<M>& t, const float* x, float* dy, int64_t head_stride, const float* hidden,
                      int64_t i, int64_t j, bool weights_wanted) {
  const MixWeights& w = t.weights;
  MixGrad& g = t.grad;
  mix_product(
      w.width, t.weights.w2_t, w.heads, 1, dy, head_stride, w.heads, [](int64_t, int64_t) { return zero(); },
      [&](int64_t r, int64_t c, vf v) {
        vf active = load(hidden + r * MIX_KEYS + c);
        store(t.d_hidden + r * MIX_KEYS + c, active > 0.0F ? v : v * LEAK);
      });
  if (weights_wanted) {
    transpose_hidden(w, t.transposed, hidden);
    add_outer(w, g.w2_t, dy, head_stride, t.transposed);
    transpose_hidden(w, t.transposed, t.d_hidden);
    add_outer(w, g.w1x_t, x, head_stride, t.transposed);
    if (w.inner && !w.folded) add_outer(w, g.w1b_t, t.inner.rows, MIX_KEYS, t.transposed);
    for (int64_t h = 0; h < w.heads; ++h) {
      vf sum = zero();
      for (int64_t c = 0; c < MIX_KEYS; c += VL) sum += load(dy + h * head_stride + c);
      g.b2[h] += reduce_add(sum);
    }
    for (int64_t o = 0; o < w.width; ++o) {
      vf sum = zero();
      for (int64_t c = 0; c < MIX_KEYS; c += VL) sum += load(t.d_hidden + o * MIX_KEYS + c);
      g.b1[o] += reduce_add(sum);
    }
  }
  if (w.inner) {
    if (w.folded) {
      const int64_t at = j - i - t.inner.tiles[0].base;
      for (int64_t o = 0; o < w.width; ++o) {
        float* sum = g.hidden + o * t.inner.stride + at;
        for (int64_t c = 0; c < MIX_KEYS; c += VL) store(sum + c, load(sum + c) + load(t.d_hidden + o * MIX_KEYS + c));
      }
      if (w.residual)
        for (int64_t h = 0; h < w.heads; ++h)
          if (g.inner[h].any()) g.inner[h].add(dy + h * head_stride, i, j, MIX_KEYS);
    } else if (g.inner.any()) {
      mix_product(
          w.heads, w.w1b_t, w.width, 1, t.d_hidden, MIX_KEYS, w.width,
          [&](int64_t h, int64_t c) { return w.residual && h < w.heads ? load(dy + h * head_stride + c) : zero(); },
          [&](int64_t h, int64_t c, vf v) { store(t.d_inner + h * MIX_KEYS + c, v); });
      for (int64_t h = 0; h < w.heads; ++h) g.inner[h].add(t.d_inner + h * MIX_KEYS, i, j, MIX_KEYS);
    }
  }
  mix_product(
      w.heads, w.w1x_t, w.width, 1, t.d_hidden, MIX_KEYS, w.width,
      [&](int64_t h, int64_t c) { return h < w.heads ? load(dy + h * head_stride + c) : zero(); },
      [&](int64_t h, int64_t c, vf v) {
        if (h < w.heads) store(dy + h * head_stride + c, v);
      });
}

// The tabulated share's gradient goes on to the bias and to w1_b; then all sums to the call's gradients, in task order.
template <class M>
void mix_flush(const Problem& p, MixBackwardScratch<M>& t) {
  const MixWeights& w = t.weights;
  MixGrad& g = t.grad;
  const HeadMix& m = p.head_mix;
  if (w.folded) {
    const int64_t n = t.inner.tiles[0].length;
    for (int64_t h = 0; h < w.heads; ++h) {
      for (int64_t o = 0; o < w.width; ++o) {
        const float *sums = g.hidden + o * t.inner.stride, *bias = t.inner.tiles[h].relative;
        const vf weight = set1(w.w1b[o * w.heads + h]);
        float* to = g.inner[h].relative;
        vf product = zero();
        for (int64_t c = 0; c < n; c += VL) {  // what lies past n is zero in `sums`
          product = fma(load(sums + c), load(bias + c), product);
          if (to) store(to + c, fma(weight, load(sums + c), load(to + c)));
        }
        g.w1b_t[h * w.w_lanes + o] += reduce_add(product);
      }
    }
  }
  const int64_t at_b = m.inputs - w.heads;
  for (int64_t h = 0; h < w.heads; ++h) {
    for (int64_t o = 0; o < w.width; ++o) {
      if (m.grad_w2) m.grad_w2[h * w.width + o] += g.w2_t[h * w.w_lanes + o];
      if (m.grad_w1) {
        m.grad_w1[o * m.inputs + h] += g.w1x_t[h * w.w_lanes + o];
        if (w.inner) m.grad_w1[o * m.inputs + at_b + h] += g.w1b_t[h * w.w_lanes + o];
      }
    }
    if (m.grad_b2) m.grad_b2[h] += static_cast<float>(g.b2[h]);
  }
  if (w.inner) g.inner.flush();
  g.outer.flush();
  if (m.grad_b1)
    for (int64_t o = 0; o < w.width; ++o) m.grad_b1[o] += static_cast<float>(g.b1[o]);
}

// find_rests (backward.h) for rows whose logits need all heads: their forward pass again, a block at a time.
template <class M>
void find_mix_rests(const Problem& p, int64_t longest, float* rests) {
  fill(rests, 0.0F, p.batch * p.heads * p.q_len);
  const int64_t step = mix_rows(p), blocks = ceil_div(longest, step);
  run_tasks(
      p.threads, blocks * p.n_sequences, [&](Arena& arena) { MixForwardScratch<M>(arena, p, step); },
      [&](Arena& arena, int64_t task) {
        const Sequence& s = p.sequences[task % p.n_sequences];
        const int64_t i0 = task / p.n_sequences * step, i1 = imin(i0 + step, s.q_len);
        const auto at = [&](int64_t h, int64_t i) { return (s.b * p.heads + h) * p.q_len + s.q0 + i; };
        bool any = false;
        for (int64_t h = 0; h < p.heads; ++h)
          for (int64_t i = i0; i < i1; ++i) any = any || large(p.lse[at(h, i)]);
        if (!any) return;
        MixForwardScratch<M> scratch(arena, p, step);
        mix_forward_task<M>(p, s, i0, i1, step, scratch, [&](int64_t h, int64_t i, float*, float most, float sum) {
          const double lse = p.lse[at(h, i)];
          if (!large(p.lse[at(h, i)])) return;
          double total = sum * ::exp(most - lse);
          if (p.sinks) total += ::exp(p.sinks[h] - lse);
          rests[at(h, i)] = static_cast<float>(::log2(total));
        });
      });
}

template <class M>
void mix_backward_task(const Problem& p, const Sequence& s, int64_t j0, int64_t task, const float* rests,
                       Progress& progress, MixBackwardScratch<M>& t) {
  const int64_t heads = p.heads, group = heads / p.kv_heads, keys = imin(MIX_KEYS, s.k_len - j0);
  const int64_t head_tile = t.rows * MIX_KEYS, key_rows = round_up(MIX_KEYS, MR);
  const int64_t q_depth = elements<M>(p.head_dim), v_depth = elements<M>(p.value_dim);
  const int64_t k_panel = panel_rows<M>(p.head_dim) * NR, v_panel = panel_rows<M>(p.value_dim) * NR;
  const int64_t k_tile = MIX_KEYS * panel_rows<M>(p.head_dim), v_tile = MIX_KEYS * panel_rows<M>(p.value_dim);
  const int64_t k_depth_tile = MIX_KEYS / M::pack * t.q_width;
  const float q_scale = M::pack == 1 ? p.scale : 1.0F, product_scale = M::pack == 1 ? 1.0F : p.scale;
  const Dropout dropout(p);
  const bool weights_wanted = p.head_mix.wants_weights();
  const bool shared_dense = p.batch > 1 && ((p.bias.grad_dense && p.bias.grad_dense_batch == 0) ||
                                            (p.head_mix.inner.grad_dense && p.head_mix.inner.grad_dense_batch == 0));
  // Published steps stand for all that came before them, so a step without work waits as well.
  const int64_t before = task % p.n_sequences == 0 ? -1 : task - 1;
  const Rectangle area{0, s.q_len, j0, j0 + keys};
  Problem plain = p;  // the softcap comes before the mix
  plain.softcap = 0.0F;

  t.weights.load(p.head_mix);
  t.inner.prepare(p, t.weights, s, area);
  t.bias.prepare(p, p.bias, s, area);
  t.grad.clear(t.weights, t.inner, t.bias);
  for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
    const Source k = key_source(p, s, kv), v = value_source(p, s, kv);
    fill(t.k_panels + kv * k_tile, 0.0F, k_tile);
    fill(t.v_panels + kv * v_tile, 0.0F, v_tile);
    pack_panels<M>(t.k_panels + kv * k_tile, k, j0, keys);
    pack_panels<M>(t.v_panels + kv * v_tile, v, j0, keys);
    pack_depth<M>(t.k_depth + kv * k_depth_tile, t.q_width, k, j0, keys, MIX_KEYS);
  }
  fill(t.grad_k, 0.0F, p.kv_heads * key_rows * t.q_width);
  fill(t.grad_v, 0.0F, p.kv_heads * key_rows * t.v_width);
  fill(t.hidden, 0.0F, t.rows * t.hidden_row);
  fill(t.d_hidden, 0.0F, t.hidden_row);

  const int64_t steps = ceil_div(s.q_len, t.rows);
  for (int64_t step = 0; step < steps && !interrupted(); ++step) {
    const int64_t i0 = step * t.rows, count = imin(t.rows, s.q_len - i0), padded = round_up(count, MR);
    const Interval any = allowed_by_any(p, s, i0, i0 + count);
    if (any.lo >= j0 + keys || any.hi <= j0) {
      if (shared_dense) progress.wait(before, step + 1);
      progress.publish(task, step + 1);
      continue;
    }
    for (int64_t h = 0; h < heads; ++h) {
      const Source q = query_source(p, s, h, q_scale), o{p.grad_out, s.b, h, s.q0, p.value_dim};
      float *q_rows = t.q_rows + h * t.rows * t.q_stride, *o_rows = t.o_rows + h * t.rows * t.o_stride;
      pack_rows<M>(q_rows, t.q_stride, q, i0, count, padded);
      pack_rows<M>(o_rows, t.o_stride, o, i0, count, padded);
      pack_depth<M>(t.q_depth + h * t.rows / M::pack * t.q_width, t.q_width, q, i0, count, padded);
      pack_depth<M>(t.o_depth + h * t.rows / M::pack * t.v_width, t.v_width, o, i0, count, padded);
      float *x = t.x + h * head_tile, *dy = t.dy + h * head_tile;
      const float *k = t.k_panels + h / group * k_tile, *v = t.v_panels + h / group * v_tile;
      for (int64_t r = 0; r < padded; r += MR)
        for (int64_t c = 0; c < MIX_KEYS; c += NR) {
          gemm_rows<M, Into::fresh>(q_rows + r * t.q_stride, t.q_stride, 1, k + c / NR * k_panel, NR,
                                    x + r * MIX_KEYS + c, MIX_KEYS, q_depth, NR / VL);
          gemm_rows<M, Into::fresh>(o_rows + r * t.o_stride, t.o_stride, 1, v + c / NR * v_panel, NR,
                                    dy + r * MIX_KEYS + c, MIX_KEYS, v_depth, NR / VL);
        }
      scale_products(p, x, padded * MIX_KEYS, product_scale, t.cap ? t.cap + h * head_tile : nullptr);
    }
    if (shared_dense) progress.wait(before, step + 1);
    progress.wait(task - p.n_sequences, step + 1);

    for (int64_t r = 0; r < count; ++r) {
      const float* x = t.x + r * MIX_KEYS;
      t.inner.fetch(t.weights, i0 + r, j0);
      mix_hidden(t.weights, t.inner, x, head_tile, i0 + r, j0, t.hidden + r * t.hidden_row);
      mix_output(t.weights, t.inner, x, head_tile, i0 + r, j0, t.hidden + r * t.hidden_row, t.y + r * MIX_KEYS);
    }
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < padded; ++r) {
        float *y = t.y + h * head_tile + r * MIX_KEYS, *dy = t.dy + h * head_tile + r * MIX_KEYS;
        if (r >= count) {
          fill(y, 0.0F, MIX_KEYS);
          fill(dy, 0.0F, MIX_KEYS);
          continue;
        }
        const int64_t at = (s.b * heads + h) * p.q_len + s.q0 + i0 + r;
        const RowStep row{plain, s, t.bias[h], dropout, row_lse(p.lse[at]), rests[at], p.delta[at]};
        row.template run<M::exp_degree>(y, dy, i0 + r, j0, MIX_KEYS, 1.0F, nullptr, t.keep, t.grad.outer[h]);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      t.inner.fetch(t.weights, i0 + r, j0);
      mix_row_backward(t, t.x + r * MIX_KEYS, t.dy + r * MIX_KEYS, head_tile, t.hidden + r * t.hidden_row, i0 + r, j0,
                       weights_wanted);
    }
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t first = (s.b * heads + h) * p.q_len + s.q0 + i0, kv = h / group;
      float *y = t.y + h * head_tile, *dx = t.dy + h * head_tile;
      if (t.cap)
        for (int64_t c = 0; c < count * MIX_KEYS; c += VL)
          store(dx + c, load(dx + c) * load(t.cap + h * head_tile + c));
      for (int64_t r = 0; p.grad_q && r < padded; r += MR) {
        const float* ds_rows = dx + r * MIX_KEYS;
        if constexpr (M::pack == 2) {
          for (int64_t q = 0; q < MR; ++q) to_elements<M>(t.ds_rows + q * MIX_KEYS, dx + (r + q) * MIX_KEYS, MIX_KEYS);
          ds_rows = t.ds_rows;
        }
        add_to_grad_q<M>(p, first + r, imin(MR, count - r), ds_rows, MIX_KEYS, t.k_depth + kv * k_depth_tile,
                         MIX_KEYS / M::pack, t.dq);
      }
      const float *p_rows = y, *dx_rows = dx;
      if constexpr (M::pack == 2) {
        for (int64_t r = 0; r < padded; r += 2)
          for (int64_t c = 0; c < MIX_KEYS; c += VL) {
            const int64_t at = r * MIX_KEYS + c;
            store(t.p_pairs + at / 2 - c / 2 + c, bf16_pair(load(y + at), load(y + at + MIX_KEYS)));
            store(t.ds_pairs + at / 2 - c / 2 + c, bf16_pair(load(dx + at), load(dx + at + MIX_KEYS)));
          }
        p_rows = t.p_pairs, dx_rows = t.ds_pairs;
      }
      const float *o_depth = t.o_depth + h * t.rows / M::pack * t.v_width,
                  *q_deep = t.q_depth + h * t.rows / M::pack * t.q_width;
      for (int64_t k = 0; k < keys; k += MR) {
        if (p.grad_v)
          gemm_rows<M, Into::sum>(p_rows + k, 1, MIX_KEYS, o_depth, t.v_width,
                                  t.grad_v + (kv * key_rows + k) * t.v_width, t.v_width, padded / M::pack,
                                  t.v_width / VL);
        if (p.grad_k)
          gemm_rows<M, Into::sum>(dx_rows + k, 1, MIX_KEYS, q_deep, t.q_width,
                                  t.grad_k + (kv * key_rows + k) * t.q_width, t.q_width, padded / M::pack,
                                  t.q_width / VL);
      }
    }
    progress.publish(task, step + 1);
  }
  for (int64_t kv = 0; kv < p.kv_heads; ++kv)
    write_key_grads(p, s, kv, j0, keys, M::pack == 1 ? 1.0F : p.scale, t.grad_k + kv * key_rows * t.q_width, t.q_width,
                    t.grad_v + kv * key_rows * t.v_width, t.v_width);
}

template <class M>
void mix_backward(const Problem& p) {
  for_rows(p, row_dots);
  const int64_t longest = longest_queries(p);
  const int64_t tasks = ceil_div(p.max_k_len, MIX_KEYS) * p.n_sequences;
  Progress progress(tasks), flushed(tasks);
  auto* rests = static_cast<float*>(allocate(static_cast<size_t>(p.batch * p.heads * p.q_len) * 4));
  find_mix_rests<M>(p, longest, rests);
  run_tasks(
      p.threads, tasks, [&](Arena& arena) { MixBackwardScratch<M>(arena, p, longest); },
      [&](Arena& arena, int64_t task) {
        const Sequence& s = p.sequences[task % p.n_sequences];
        const int64_t j0 = task / p.n_sequences * MIX_KEYS;
        if (j0 < s.k_len && s.q_len > 0) {
          MixBackwardScratch<M> scratch(arena, p, longest);
          mix_backward_task<M>(p, s, j0, task, rests, progress, scratch);
          progress.publish(task, Progress::DONE);
          flushed.wait(task - 1, Progress::DONE);
          mix_flush(p, scratch);
        } else {
          // Done stands for all before it too: a later sequence may share a dense gradient with an earlier one.
          progress.wait(task % p.n_sequences == 0 ? -1 : task - 1, Progress::DONE);
          progress.publish(task, Progress::DONE);
          flushed.wait(task - 1, Progress::DONE);
        }
        flushed.publish(task, Progress::DONE);
      });
  release(rests);
  if (p.grad_q) for_rows(p, finish_grad_q);
}

}  // namespace posattn::POSATTN_ISA
