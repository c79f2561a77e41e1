// Decoding: a few queries against many keys, bound by reading the keys once. Keys are split into runs of a fixed length
// (so that the result does not depend on threads), every run is read as it lies in memory for all queries and heads
// that share it, and a second pass combines the runs.
//
// Where a bias may fall with the distance, the logits of the keys near the queries are computed first. Keys are read
// all the same, a bound by their norms would have to read them too, but the values of a tile whose every logit is too
// far below those of the near keys to count are not.
#pragma once

#include <cmath>

#include "forward.h"

namespace posattn::POSATTN_ISA {

constexpr int64_t DECODE_ROWS = 16;       // queries up to which packing keys does not pay
constexpr int64_t KEYS_PER_SPLIT = 1024;  // half a megabyte of K and V at D = 64: some hundred tasks at 32768 keys
constexpr int64_t DECODE_KEYS = 128;      // a tile: K and V stay in the first-level caches for all queries
constexpr int64_t LIMITS_FROM = 4096;     // keys from which looking at a tile of near ones first costs 1% at most
static_assert(KEYS_PER_SPLIT % DECODE_KEYS == 0 && DECODE_KEYS % (2 * VL) == 0);

inline bool is_decoding(const Problem& p) {
  return p.q_len <= DECODE_ROWS && p.max_k_len > KEYS_PER_SPLIT;
}

// What a run of keys leaves behind: [rows x width] unnormalised output, then [rows] maxima and [rows] sums.
struct Partials {
  float* memory;
  int64_t splits, rows, width;

  int64_t each() const { return rows * (width + 2); }
  float* out(int64_t group, int64_t split) const { return memory + (group * splits + split) * each(); }
  float* most(int64_t group, int64_t split) const { return out(group, split) + rows * width; }
  float* sum(int64_t group, int64_t split) const { return most(group, split) + rows; }
};

struct DecodeScratch {
  int64_t q_stride, v_stride;
  float *q, *k, *v, *logits, *keep;
  BiasTile bias;

  DecodeScratch(Arena& arena, const Problem& p, int64_t rows)
      : q_stride(round_up(p.head_dim, 2 * VL)), v_stride(round_up(p.value_dim, VL)) {
    q = arena.floats(rows * q_stride);
    k = arena.floats(DECODE_KEYS * q_stride);
    v = arena.floats(DECODE_KEYS * v_stride);
    logits = arena.floats(ROW_MAX);
    keep = arena.floats(ROW_MAX);
    bias.layout(arena, p.bias, p.q_len, KEYS_PER_SPLIT);
  }
};

// Asks for rows to come. Half-precision rows are too short for the processor's own prefetcher, which serves float32
// rows better alone (98% of the read bandwidth against 78%). Inlined by force: GCC takes a function that only
// prefetches for one without effect and drops its calls.
POSATTN_INLINE void prefetch_rows(const Source& src, int64_t first, int64_t count) {
  const int64_t bytes = src.width * (src.view.dtype == DType::f32 ? 4 : 2);
  for (int64_t r = 0; r < count; ++r) {
    const char* row = src.row(first + r);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// The rows of a tile, equally far apart, or one by one where they lie in pages.
struct Strided {
  const float* first;
  int64_t step;
  POSATTN_INLINE const float* operator()(int64_t c) const { return first + c * step; }
};

struct Scattered {
  const float* const* rows;
  POSATTN_INLINE const float* operator()(int64_t c) const { return rows[c]; }
};

// Whether the rows of a tile lie ready for mode M, but in several pages; `rows` then says where.
template <class M>
inline bool scattered(const float** rows, const Source& src, int64_t first, int64_t count) {
  if (src.in_one_run(first, count) || !lies_ready<M>(src)) return false;
  for (int64_t r = 0; r < count; ++r) rows[r] = reinterpret_cast<const float*>(src.row(first + r));
  return true;
}

// x[c] = <q, k_c> for n keys: VL dot products at a time, summed over lanes by one transpose. q and k are rows of
// `width` elements.
template <class M, class Rows>
inline void dot_keys(float* x, const float* q, const Rows& k, int64_t n, int64_t width) {
  for (int64_t c = 0; c < n; c += VL) {
    vf sum[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
      const float* row = k(imin(c + i, n - 1));  // past the last key: any key, its logit is masked
      vf a = zero();
      for (int64_t d = 0; d < width; d += VL) a = M::dot(a, load(q + d), load(row + d));
      sum[i] = a;
    }
    transpose_block(sum);
    vf total = sum[0];
#pragma GCC unroll 16
    for (int i = 1; i < VL; ++i) total += sum[i];
    store(x + c, total);
  }
}

#if defined(__AVX512BF16__)
// out[width] += sum of w_c v_c over n keys, v's rows bfloat16 as they lie in memory: two rows at a time are interleaved
// into the pairs that the dot product takes. weights has a zero after the last of an odd number.
template <int BLOCKS, class Rows>
inline void add_pairs(float* out, const float* weights, const Rows& v, int64_t d, int64_t n) {
  vf acc[BLOCKS][2];
#  pragma GCC unroll 8
  for (int b = 0; b < BLOCKS; ++b) acc[b][0] = load(out + 32 * b), acc[b][1] = load(out + 32 * b + 16);
  for (int64_t c = 0; c < n; c += 2) {
    const uint16_t* even = reinterpret_cast<const uint16_t*>(v(c)) + d;
    const uint16_t* odd = reinterpret_cast<const uint16_t*>(v(imin(c + 1, n - 1))) + d;
    const uint32_t pair = float_to_bf16(weights[c]) | static_cast<uint32_t>(float_to_bf16(weights[c + 1])) << 16;
    const vf w = set1(bits_to_float(pair));
#  pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
      vf low, high;
      interleave(even + 32 * b, odd + 32 * b, low, high);
      acc[b][0] = BF16::dot(acc[b][0], w, low);
      acc[b][1] = BF16::dot(acc[b][1], w, high);
    }
  }
#  pragma GCC unroll 8
  for (int b = 0; b < BLOCKS; ++b) store(out + 32 * b, acc[b][0]), store(out + 32 * b + 16, acc[b][1]);
}

template <class Rows>
inline void add_values(BF16, float* out, float* weights, const Rows& v, int64_t n, int64_t width) {
  weights[n] = 0.0F;
  int64_t d = 0;
  for (; d + 64 <= width; d += 64) add_pairs<2>(out + d, weights, v, d, n);
  if (d < width) add_pairs<1>(out + d, weights, v, d, n);
}
#endif

// out[width] += sum of w_c v_c over n keys, v's rows floats.
inline void add_values(F32, float* out, const float* weights, const Strided& v, int64_t n, int64_t width) {
  int64_t d = 0;
  for (; d + NR <= width; d += NR) micro<F32, 1, NV_MAX, Into::sum>(weights, 0, 1, v.first + d, v.step, out + d, 0, n);
  for (; d < width; d += VL) micro<F32, 1, 1, Into::sum>(weights, 0, 1, v.first + d, v.step, out + d, 0, n);
}

// The same sums, in the same order.
template <int BLOCKS>
inline void add_floats(float* out, const float* weights, const Scattered& v, int64_t d, int64_t n) {
  vf acc[BLOCKS] = {};
  for (int64_t c = 0; c < n; ++c) {
    const float* row = v(c) + d;
    const vf w = set1(weights[c]);
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) acc[b] = fma(w, load(row + b * VL), acc[b]);
  }
#pragma GCC unroll 8
  for (int b = 0; b < BLOCKS; ++b) store(out + b * VL, load(out + b * VL) + acc[b]);
}

inline void add_values(F32, float* out, const float* weights, const Scattered& v, int64_t n, int64_t width) {
  int64_t d = 0;
  for (; d + NR <= width; d += NR) add_floats<NV_MAX>(out + d, weights, v, d, n);
  for (; d < width; d += VL) add_floats<1>(out + d, weights, v, d, n);
}

template <class M>
inline void pack_queries(const Problem& p, const Sequence& s, int64_t kv_head, DecodeScratch& t) {
  const int64_t group = p.heads / p.kv_heads;
  // Half-precision queries keep their bits, so the scale waits for the product.
  const float q_scale = M::pack == 1 ? p.scale : 1.0F;
  for (int64_t g = 0; g < group; ++g)
    pack_rows<M>(t.q + g * s.q_len * t.q_stride, t.q_stride, query_source(p, s, kv_head * group + g, q_scale), 0,
                 s.q_len, s.q_len);
}

// Calls use(r, h, i, top, mul) for each row r of a key head, i of its head h, with its logits over keys j .. j + n in
// t.logits, whole pairs of vectors, still to be multiplied with mul; top is the greatest of them, multiplied.
template <class M, class Use>
inline void for_logits(const Problem& p, const Sequence& s, int64_t kv_head, int64_t j, int64_t n, DecodeScratch& t,
                       const Use& use) {
  const int64_t group = p.heads / p.kv_heads, padded = round_up(n, 2 * VL);
  const int64_t depth = round_up(elements<M>(p.head_dim), VL);
  const Source keys = key_source(p, s, kv_head);
  const float* rows[DECODE_KEYS];
  const bool paged = scattered<M>(rows, keys, j, n);
  Strided k{in_place<M>(keys, j, n), p.k.row / M::pack};
  if (!k.first && !paged) pack_rows<F32>(t.k, t.q_stride, keys, j, n, n), k = {t.k, t.q_stride};
  for (int64_t g = 0; g < group; ++g) {
    const int64_t h = kv_head * group + g;
    t.bias.prepare(p, p.bias, s, h, {0, s.q_len, j, j + n});
    for (int64_t i = 0; i < s.q_len; ++i) {
      const int64_t r = g * s.q_len + i;
      const float* q = t.q + r * t.q_stride;
      paged ? dot_keys<M>(t.logits, q, Scattered{rows}, n, depth) : dot_keys<M>(t.logits, q, k, n, depth);
      fill(t.logits + round_up(n, VL), 0.0F, padded - round_up(n, VL));
      float mul = M::pack == 1 ? 1.0F : p.scale;
      const vf top = finish_row(p, s, t.bias, t.logits, i, allowed(p, s, i), j, padded, mul);
      use(r, h, i, reduce_max(top) * mul, mul);
    }
  }
}

// What keys may weigh together, over the weight of a near key, and be left out: each row's logit below which all k_len
// of them do. The near keys end DECODE_ROWS past the first query's own.
template <class M>
inline void find_limits(const Problem& p, const Sequence& s, int64_t kv_head, float* limits, DecodeScratch& t) {
  const Interval any = allowed_by_any(p, s, 0, s.q_len);
  if (any.lo >= any.hi) return;
  pack_queries<M>(p, s, kv_head, t);
  const int64_t own = iclamp(s.offset, any.lo, any.hi - 1), j = imax(0, own + 1 + DECODE_ROWS - DECODE_KEYS);
  const float least = REACH_NATS + ::logf(static_cast<float>(s.k_len));
  for_logits<M>(p, s, kv_head, j, imin(DECODE_KEYS, s.k_len - j), t,
                [&](int64_t r, int64_t, int64_t, float top, float) { limits[r] = top - least; });
}

// Whether all of x (times mul) is below the limit: NaN is not, and a maximum need not show one.
inline bool all_below(const float* x, int64_t n, float mul, float limit) {
  for (int64_t c = 0; c < n; c += VL) {
    const vi not_below = ~(load(x + c) * mul < limit);
    int32_t any = 0;
    for (int i = 0; i < VL; ++i) any |= not_below[i];
    if (any) return false;
  }
  return true;
}

template <class M>
inline void decode_split(const Problem& p, const Sequence& s, int64_t kv_head, int64_t j_begin, const float* limits,
                         float* out, float* most, float* sum, DecodeScratch& t) {
  const int64_t rows = p.heads / p.kv_heads * s.q_len, j_end = imin(j_begin + KEYS_PER_SPLIT, s.k_len);
  const Source keys = key_source(p, s, kv_head), values = value_source(p, s, kv_head);
  const Dropout dropout(p);
  pack_queries<M>(p, s, kv_head, t);
  fill(out, 0.0F, rows * t.v_stride);
  fill(most, NEG_INF, rows);
  fill(sum, 0.0F, rows);

  const float* v_rows[DECODE_KEYS];
  const Interval any = allowed_by_any(p, s, 0, s.q_len);
  bool reached = true;  // by any row, in the last tile
  for (int64_t j = j_begin; j < j_end; j += DECODE_KEYS) {
    const int64_t n = imin(DECODE_KEYS, j_end - j), padded = round_up(n, 2 * VL);
    if (any.lo >= j + n || any.hi <= j) continue;
    if (M::pack == 2) {
      const int64_t ahead = imin(DECODE_KEYS, s.k_len - j - n);  // perhaps the next task's
      prefetch_rows(keys, j + n, ahead);
      if (reached) prefetch_rows(values, j + n, ahead);
    }
    bool v_paged = false;
    Strided v{nullptr, 0};
    reached = false;
    for_logits<M>(p, s, kv_head, j, n, t, [&](int64_t r, int64_t h, int64_t i, float top, float mul) {
      if (top < limits[r] && all_below(t.logits, padded, mul, limits[r])) return;
      if (!reached) {
        reached = true;
        v_paged = scattered<M>(v_rows, values, j, n);
        v = {in_place<M>(values, j, n), p.v.row / M::pack};
        if (!v.first && !v_paged) pack_depth<F32>(t.v, t.v_stride, values, j, n, n), v = {t.v, t.v_stride};
      }
      float* o = out + r * t.v_stride;
      add_tile<F32>(t.logits, t.logits, padded, top, mul, most[r], sum[r], o, t.v_stride);
      if (p.dropout_p > 0.0) drop_row<F32>(p, s, dropout, t.keep, t.logits, h, i, j, n);
      v_paged ? add_values(M{}, o, t.logits, Scattered{v_rows}, n, t.v_stride)
              : add_values(M{}, o, t.logits, v, n, t.v_stride);
    });
  }
}

// The runs of one sequence and key head become its rows of the result.
inline void combine_splits(const Problem& p, const Sequence& s, int64_t kv_head, int64_t n, const Partials& partials) {
  const int64_t group = p.heads / p.kv_heads, splits = ceil_div(s.k_len, KEYS_PER_SPLIT);
  alignas(64) float out[MAX_WIDTH];
  for (int64_t r = 0; r < group * s.q_len; ++r) {
    float top = NEG_INF, sum = 0.0F;
    for (int64_t c = 0; c < splits; ++c) top = fmax2(top, partials.most(n, c)[r]);
    fill(out, 0.0F, partials.width);
    for (int64_t c = 0; c < splits; ++c) {
      if (partials.sum(n, c)[r] == 0.0F) continue;
      const float weight = exp2_scalar((partials.most(n, c)[r] - top) * LOG2E);
      sum += partials.sum(n, c)[r] * weight;
      const float* part = partials.out(n, c) + r * partials.width;
      for (int64_t d = 0; d < partials.width; ++d) out[d] += part[d] * weight;
    }
    write_row(p, s, kv_head * group + r / s.q_len, r % s.q_len, out, top, sum);
  }
}

// M is the mode in which K and V are read as they lie; F32 converts what does not lie so.
template <class M>
void decode_as(const Problem& p) {
  const int64_t groups = p.n_sequences * p.kv_heads, rows = p.heads / p.kv_heads * p.q_len;
  Partials partials{nullptr, ceil_div(p.max_k_len, KEYS_PER_SPLIT), rows, round_up(p.value_dim, VL)};
  partials.memory = static_cast<float*>(allocate(static_cast<size_t>(groups * partials.splits * partials.each()) * 4));
  auto* limits = static_cast<float*>(allocate(static_cast<size_t>(imax(1, groups * rows)) * 4));
  fill(limits, NEG_INF, groups * rows);
  if (p.bias.any() && p.max_k_len >= LIMITS_FROM)
    run_tasks(
        p.threads, groups, [&](Arena& arena) { DecodeScratch(arena, p, rows); },
        [&](Arena& arena, int64_t n) {
          DecodeScratch scratch(arena, p, rows);
          find_limits<M>(p, p.sequences[n / p.kv_heads], n % p.kv_heads, limits + n * rows, scratch);
        });
  run_tasks(
      p.threads, groups * partials.splits, [&](Arena& arena) { DecodeScratch(arena, p, rows); },
      [&](Arena& arena, int64_t task) {
        const int64_t n = task / partials.splits, split = task % partials.splits;
        const Sequence& s = p.sequences[n / p.kv_heads];
        if (split * KEYS_PER_SPLIT >= s.k_len) return;
        DecodeScratch scratch(arena, p, rows);
        decode_split<M>(p, s, n % p.kv_heads, split * KEYS_PER_SPLIT, limits + n * rows, partials.out(n, split),
                        partials.most(n, split), partials.sum(n, split), scratch);
      });
  run_tasks(
      p.threads, groups, [](Arena&) {},
      [&](Arena&, int64_t n) { combine_splits(p, p.sequences[n / p.kv_heads], n % p.kv_heads, n, partials); });
  release(limits);
  release(partials.memory);
}

inline void decode(const Problem& p) {
#if defined(__AVX512BF16__)
  const Sequence first{};
  if (p.q.dtype == DType::bf16 && lies_ready<BF16>(key_source(p, first, 0)) &&
      lies_ready<BF16>(value_source(p, first, 0)))
    return decode_as<BF16>(p);
#endif
  decode_as<F32>(p);
}

}  // namespace posattn::POSATTN_ISA
