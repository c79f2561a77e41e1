// DAPE's MLP on one row of logits: 64 neighbouring keys of one query, all heads. Both linear layers are products with
// the keys in the vector lanes, so the inner loop is gemm.h's.
//
// With an inner bias b that depends on the distance alone, the first layer's share of it does too: w1_b b(d) + b1 is
// tabulated once per distance, and a third of the MLP's work (half of its first layer) is gone.
#pragma once

#include "bias_grad.h"
#include "dropout.h"

namespace posattn::POSATTN_ISA {

constexpr int64_t MIX_KEYS = 64;
static_assert(MIX_KEYS % NR == 0);
constexpr float LEAK = 0.01F;

// ROWS accumulator rows by NV vectors: as many as fit the registers, for counts that 6 or 8 divide best.
constexpr int64_t padded_rows(int64_t n) {
  return round_up(n, 8) <= round_up(n, 6) ? round_up(n, 8) : round_up(n, 6);
}

template <int ROWS, class Start, class Finish>
POSATTN_INLINE void mix_block(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, int64_t k_len,
                              int64_t r0, const Start& start, const Finish& finish) {
  constexpr int NV = ROWS == 8 && NV_MAX == 4 ? 2 : NV_MAX == 4 ? 4 : (ROWS == 8 ? 1 : 2);
  for (int64_t c = 0; c < MIX_KEYS; c += NV * VL) {
    vf acc[ROWS][NV];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = start(r0 + i, c + j * VL);
    accumulate<F32>(acc, a, a_row, a_k, b + c, b_k, k_len);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) finish(r0 + i, c + j * VL, acc[i][j]);
  }
}

// out[rows x MIX_KEYS] = start + a[rows x k] b[k x MIX_KEYS], handed to finish(row, column, vector) and stored by it.
// a has padded_rows(rows) rows; finish must bear the padding ones.
template <class Start, class Finish>
POSATTN_INLINE void mix_product(int64_t rows, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k,
                                int64_t k_len, const Start& start, const Finish& finish) {
  const int64_t padded = padded_rows(rows);
  if (padded % 8 == 0)
    for (int64_t r = 0; r < padded; r += 8) mix_block<8>(a + r * a_row, a_row, a_k, b, b_k, k_len, r, start, finish);
  else
    for (int64_t r = 0; r < padded; r += 6) mix_block<6>(a + r * a_row, a_row, a_k, b, b_k, k_len, r, start, finish);
}

// The MLP's weights, padded and in the orders that the products read.
struct MixWeights {
  int64_t heads, width, h_pad, w_pad, w_lanes;
  bool inner, residual, folded;  // residual: the bare + b; folded: b is tabulated by distance
  float *w1x, *w1b, *b1;         // [w_pad][heads], [w_pad][heads], [w_pad]
  float *w2, *b2;                // [h_pad][width], [h_pad]
  float *w1x_t, *w1b_t, *w2_t;   // transposed, for backward: [h_pad][width], [h_pad][width], [w_pad][heads]

  MixWeights(Arena& arena, const Problem& p) {
    const HeadMix& m = p.head_mix;
    heads = p.heads, width = m.width, h_pad = padded_rows(heads), w_pad = padded_rows(width);
    w_lanes = round_up(width, VL);
    inner = m.has_inner, residual = inner && m.form != MixForm::concat;
    folded = inner && !m.inner.psi && !m.inner.dense && !p.q_positions;
    w1x = arena.floats(w_pad * heads), w1b = arena.floats(w_pad * heads), b1 = arena.floats(w_pad);
    w2 = arena.floats(h_pad * width), b2 = arena.floats(h_pad);
    w1x_t = arena.floats(h_pad * width), w1b_t = arena.floats(h_pad * width), w2_t = arena.floats(w_pad * heads);
  }

  void load(const HeadMix& m) {
    fill(w1x, 0.0F, w_pad * heads), fill(w1b, 0.0F, w_pad * heads), fill(w2_t, 0.0F, w_pad * heads);
    fill(w1x_t, 0.0F, h_pad * width), fill(w1b_t, 0.0F, h_pad * width), fill(w2, 0.0F, h_pad * width);
    fill(b1, 0.0F, w_pad);
    fill(b2, 0.0F, h_pad);
    const int64_t at_b = m.inputs - heads;  // in the add form b meets the same weights as x
    for (int64_t w = 0; w < width; ++w) {
      b1[w] = m.b1[w];
      for (int64_t h = 0; h < heads; ++h) {
        w1x[w * heads + h] = w1x_t[h * width + w] = m.w1[w * m.inputs + h];
        w1b[w * heads + h] = w1b_t[h * width + w] = m.w1[w * m.inputs + at_b + h];
        w2[h * width + w] = w2_t[w * heads + h] = m.w2[h * width + w];
      }
    }
    for (int64_t h = 0; h < heads; ++h) b2[h] = m.b2[h];
  }
};

// The tiles of one Bias for every head.
struct HeadTiles {
  BiasTile* tiles = nullptr;

  void layout(Arena& arena, const Bias& bias, int64_t heads, int64_t n_rows, int64_t n_keys) {
    tiles = reinterpret_cast<BiasTile*>(arena.floats(static_cast<int64_t>(sizeof(BiasTile)) / 4 * heads));
    for (int64_t h = 0; h < heads; ++h) {
      BiasTile tile;
      tile.layout(arena, bias, n_rows, n_keys);
      if (arena.block) tiles[h] = tile;
    }
  }
  void prepare(const Problem& p, const Bias& bias, const Sequence& s, const Rectangle& area) {
    for (int64_t h = 0; h < p.heads; ++h) tiles[h].prepare(p, bias, s, h, area);
  }
  BiasTile& operator[](int64_t h) const { return tiles[h]; }
};

// The inner bias over a rectangle, for all heads, and its tabulated share of the first layer.
struct MixBias {
  HeadTiles tiles;
  float* hidden = nullptr;  // [w_pad][stride]: w1_b b + b1 by j - i - base, when folded
  float* rows = nullptr;    // [heads][MIX_KEYS]: b of one row, when not
  int64_t stride = 0;

  void layout(Arena& arena, const Problem& p, const MixWeights& w, int64_t n_rows, int64_t n_keys) {
    if (!w.inner) return;
    tiles.layout(arena, p.head_mix.inner, w.heads, n_rows, n_keys);
    stride = round_up(BiasTile::capacity(n_rows, n_keys), 16) + 16;
    if (w.folded)
      hidden = arena.floats(w.w_pad * stride);
    else
      rows = arena.floats(w.heads * MIX_KEYS);
  }

  void prepare(const Problem& p, const MixWeights& w, const Sequence& s, const Rectangle& area) {
    if (!w.inner) return;
    tiles.prepare(p, p.head_mix.inner, s, area);
    if (!w.folded) return;
    const int64_t n = round_up(tiles[0].length + MIX_KEYS, VL);
    for (int64_t o = 0; o < w.w_pad; ++o) {
      float* out = hidden + o * stride;
      for (int64_t c = 0; c < n; c += VL) {
        vf sum = set1(w.b1[o]);
        for (int64_t h = 0; h < w.heads; ++h) sum = fma(set1(w.w1b[o * w.heads + h]), load(tiles[h].relative + c), sum);
        store(out + c, sum);
      }
    }
  }

  // Where the residual's bias of head h over keys j .. of row i lies; call `fetch` first when not folded.
  const float* row(int64_t h, int64_t i, int64_t j) const {
    return rows ? rows + h * MIX_KEYS : tiles[h].relative + (j - i - tiles[h].base);
  }
  void fetch(const MixWeights& w, int64_t i, int64_t j) const {
    if (!rows) return;
    for (int64_t h = 0; h < w.heads; ++h) {
      fill(rows + h * MIX_KEYS, 0.0F, MIX_KEYS);
      tiles[h].add(rows + h * MIX_KEYS, i, j, MIX_KEYS, 1.0F);
    }
  }
};

// hidden[w_pad][MIX_KEYS] = leaky_relu(w1 z + b1) for row i, keys j ..; x is [heads] rows, `x_head` apart.
inline void mix_hidden(const MixWeights& w, const MixBias& bias, const float* x, int64_t x_head, int64_t i, int64_t j,
                       float* hidden) {
  auto leaky = [&](int64_t r, int64_t c, vf v) { store(hidden + r * MIX_KEYS + c, max(v, v * LEAK)); };
  if (w.folded) {
    const float* start = bias.hidden + (j - i - bias.tiles[0].base);
    const int64_t stride = bias.stride;
    mix_product(
        w.width, w.w1x, w.heads, 1, x, x_head, w.heads,
        [=](int64_t r, int64_t c) { return load(start + r * stride + c); }, leaky);
    return;
  }
  auto b1 = [&](int64_t r, int64_t) { return set1(w.b1[r]); };
  if (!w.inner) return mix_product(w.width, w.w1x, w.heads, 1, x, x_head, w.heads, b1, leaky);
  mix_product(w.width, w.w1b, w.heads, 1, bias.rows, MIX_KEYS, w.heads, b1,
              [&](int64_t r, int64_t c, vf v) { store(hidden + r * MIX_KEYS + c, v); });
  mix_product(
      w.width, w.w1x, w.heads, 1, x, x_head, w.heads,
      [&](int64_t r, int64_t c) { return load(hidden + r * MIX_KEYS + c); }, leaky);
}

// out[h] = x[h] (+ b[h]) + w2 hidden + b2; out may be x.
inline void mix_output(const MixWeights& w, const MixBias& bias, const float* x, int64_t x_head, int64_t i, int64_t j,
                       const float* hidden, float* out) {
  const int64_t heads = w.heads;
  // The MLP's share is summed by itself: x and b can be far larger.
  mix_product(
      heads, w.w2, w.width, 1, hidden, MIX_KEYS, w.width, [&](int64_t h, int64_t) { return set1(w.b2[h]); },
      [&](int64_t h, int64_t c, vf v) {
        if (h >= heads) return;
        vf whole = load(x + h * x_head + c);
        if (w.residual) whole += load(bias.row(h, i, j) + c);
        store(out + h * x_head + c, whole + v);
      });
}

// Rows whose logits of all heads make a tile of about 96 KB, so that a few such tiles stay in a second-level cache.
inline int64_t mix_rows(const Problem& p) {
  return iclamp(96 * 1024 / (p.heads * MIX_KEYS * 4) / MR, 1, 4) * MR;
}

}  // namespace posattn::POSATTN_ISA
