// Tensors of any dtype become float32 (or bfloat16-pair) tiles in the layouts that gemm.h reads. Rotary turns a row
// while it passes through.
#pragma once

#include "gemm.h"
#include "problem.h"

namespace posattn::POSATTN_ISA {

inline const char* row_pointer(const View& v, int64_t b, int64_t h, int64_t t) {
  int64_t bytes = v.dtype == DType::f32 ? 4 : 2;
  return static_cast<const char*>(v.data) + (b * v.batch + h * v.head + t * v.row) * bytes;
}

inline void load_floats(float* dst, const void* src, DType dtype, int64_t n) {
  if (dtype == DType::f32) {
    std::memcpy(dst, src, static_cast<size_t>(n) * 4);
  } else if (dtype == DType::bf16) {
    const auto* p = static_cast<const uint16_t*>(src);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(dst + i, load_bf16(p + i));
    for (; i < n; ++i) dst[i] = bf16_to_float(p[i]);
  } else {
    const auto* p = static_cast<const uint16_t*>(src);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(dst + i, load_f16(p + i));
    for (; i < n; ++i) dst[i] = f16_to_float(p[i]);
  }
}

inline void store_floats(void* dst, const float* src, DType dtype, int64_t n) {
  if (dtype == DType::f32) {
    std::memcpy(dst, src, static_cast<size_t>(n) * 4);
  } else if (dtype == DType::bf16) {
    auto* p = static_cast<uint16_t*>(dst);
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 2 * VL <= n; i += 2 * VL)
      store(reinterpret_cast<float*>(p + i), bf16_row(load(src + i), load(src + i + VL)));
#endif
    for (; i < n; ++i) p[i] = float_to_bf16(src[i]);
  } else {
    auto* p = static_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; ++i) p[i] = float_to_f16(src[i]);
  }
}

// Turns one row by its angles; sign -1 is the inverse turn, which is also the gradient's.
inline void rotate(float* x, const float* __restrict cos, const float* __restrict sin, int64_t half, bool interleaved,
                   float sign) {
  if (interleaved) {
    for (int64_t c = 0; c < half; ++c) {
      const float a = x[2 * c], b = x[2 * c + 1], s = sign * sin[c];
      x[2 * c] = a * cos[c] - b * s;
      x[2 * c + 1] = b * cos[c] + a * s;
    }
    return;
  }
  int64_t c = 0;
  for (const vf signs = set1(sign); c + VL <= half; c += VL) {
    const vf a = load(x + c), b = load(x + half + c), turn = load(cos + c), s = signs * load(sin + c);
    store(x + c, a * turn - b * s);
    store(x + half + c, b * turn + a * s);
  }
  for (; c < half; ++c) {
    const float a = x[c], b = x[c + half], s = sign * sin[c];
    x[c] = a * cos[c] - b * s;
    x[c + half] = b * cos[c] + a * s;
  }
}

// Where a tile's rows come from.
struct Source {
  View view;
  int64_t b = 0, h = 0, t0 = 0;  // row r of the tile is token t0 + r
  int64_t width = 0;
  const float *cos = nullptr, *sin = nullptr;  // of token 0, or null
  int64_t half = 0;
  bool interleaved = false;
  float scale = 1.0F;
  const int32_t* pages = nullptr;  // of sequence b, each view.batch elements; or null, and tokens lie in one run
  int64_t page = 0;                // tokens a page

  const char* row(int64_t r) const {
    const int64_t t = t0 + r;
    if (!pages) return row_pointer(view, b, h, t);
    const auto entry = static_cast<uint32_t>(t) / static_cast<uint32_t>(page);
    return row_pointer(view, pages[entry], h, t - entry * page);
  }
  // Whether rows first .. first + count are view.row apart.
  bool in_one_run(int64_t first, int64_t count) const { return !pages || (t0 + first) % page + count <= page; }

  void read(float* dst, int64_t r) const {
    load_floats(dst, row(r), view.dtype, width);
    if (cos) rotate(dst, cos + (t0 + r) * half, sin + (t0 + r) * half, half, interleaved, 1.0F);
    if (scale != 1.0F)
      for (int64_t c = 0; c < width; ++c) dst[c] *= scale;
  }
};

// Whether rows, as they lie in memory, are elements of mode M already and whole vectors wide.
template <class M>
inline bool lies_ready(const Source& src) {
  const bool same = src.view.dtype == (M::pack == 1 ? DType::f32 : DType::bf16);
  return same && !src.cos && src.scale == 1.0F && src.width % (M::pack * VL) == 0 && src.view.row % M::pack == 0;
}

// The first of `count` rows as they lie in memory, if they lie ready and in one run.
template <class M>
inline const float* in_place(const Source& src, int64_t first, int64_t count) {
  if (!lies_ready<M>(src) || !src.in_one_run(first, count)) return nullptr;
  return reinterpret_cast<const float*>(src.row(first));
}

inline Source query_source(const Problem& p, const Sequence& s, int64_t h, float scale) {
  Source src{p.q, s.b, h, s.q0, p.head_dim};
  if (p.rotary.q_cos) {
    src.cos = p.rotary.q_cos + s.b * p.rotary.q_batch, src.sin = p.rotary.q_sin + s.b * p.rotary.q_batch;
    src.half = p.rotary.half, src.interleaved = p.rotary.interleaved;
  }
  src.scale = scale;
  return src;
}

// Keys or values of a sequence, in pages if the call has them so.
inline Source cached_source(const Problem& p, const Sequence& s, const View& view, int64_t kv_head, int64_t width) {
  Source src{view, s.b, kv_head, s.k0, width};
  if (p.block_table) src.pages = p.block_table + s.b * p.block_entries, src.page = p.page;
  return src;
}

inline Source key_source(const Problem& p, const Sequence& s, int64_t kv_head) {
  Source src = cached_source(p, s, p.k, kv_head, p.head_dim);
  if (p.rotary.k_cos) {
    src.cos = p.rotary.k_cos + s.b * p.rotary.k_batch, src.sin = p.rotary.k_sin + s.b * p.rotary.k_batch;
    src.half = p.rotary.half, src.interleaved = p.rotary.interleaved;
  }
  return src;
}

inline Source value_source(const Problem& p, const Sequence& s, int64_t kv_head) {
  return cached_source(p, s, p.v, kv_head, p.value_dim);
}

// Elements of a row of `width` numbers.
template <class M>
constexpr int64_t elements(int64_t width) {
  return (width + M::pack - 1) / M::pack;
}

inline void fill(float* dst, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = value;
}

// A row in elements: floats as they are, or neighbours along the row as bfloat16 pairs. dst has round_up(width, 2 VL).
template <class M>
inline void to_elements(float* dst, const float* row, int64_t padded) {
  if constexpr (M::pack == 1) {
    for (int64_t c = 0; c < padded; c += VL) store(dst + c, load(row + c));
  } else {
    for (int64_t c = 0; c < padded; c += 2 * VL) store(dst + c / 2, bf16_row(load(row + c), load(row + c + VL)));
  }
}

// Largest head dimension (MAX_HEAD_DIM of posattn/backends/cpu.py), padded: what a row buffer on the stack must hold.
constexpr int64_t MAX_WIDTH = 1024 + 2 * VL;

// Row-major elements [rows][stride]: the A operand of products over the width. Rows past `count` are zero.
template <class M>
inline void pack_rows(float* dst, int64_t stride, const Source& src, int64_t first, int64_t count, int64_t rows) {
  alignas(64) float buffer[MAX_WIDTH];
  int64_t padded = round_up(src.width, 2 * VL);
  const bool same = lies_ready<M>(src);
  for (int64_t r = 0; r < rows; ++r) {
    if (r < count && same) {
      std::memcpy(dst + r * stride, src.row(first + r), static_cast<size_t>(src.width / M::pack) * 4);
    } else if (r < count) {
      float* row = M::pack == 1 ? dst + r * stride : buffer;
      src.read(row, first + r);
      fill(row + src.width, 0.0F, padded - src.width);
      if constexpr (M::pack == 2) to_elements<M>(dst + r * stride, row, padded);
    } else {
      fill(dst + r * stride, 0.0F, padded / M::pack);
    }
  }
}

#if defined(__AVX512BF16__)
// 32 bfloat16 numbers of each of two rows, as they lie, become pairs: of the first 16 columns, and of the others.
POSATTN_INLINE void interleave(const void* even, const void* odd, vf& low, vf& high) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i x = _mm512_loadu_si512(even), y = _mm512_loadu_si512(odd);
  low = (vf)_mm512_permutex2var_epi16(x, first, y);
  high = (vf)_mm512_permutex2var_epi16(x, _mm512_or_si512(first, _mm512_set1_epi16(16)), y);
}

// Two rows of bfloat16 numbers as pairs; the width is a multiple of 32.
inline void pair_rows(float* dst, const void* even, const void* odd, int64_t width) {
  for (int64_t c = 0; c < width; c += 2 * VL) {
    vf low, high;
    interleave(static_cast<const uint16_t*>(even) + c, static_cast<const uint16_t*>(odd) + c, low, high);
    store(dst + c, low);
    store(dst + c + VL, high);
  }
}
#endif

// The B operand of products over the rows: [rows / pack][stride], zero beyond the width and past `count`.
template <class M>
inline void pack_depth(float* dst, int64_t stride, const Source& src, int64_t first, int64_t count, int64_t rows) {
  alignas(64) float buffer[2][MAX_WIDTH];
  int64_t r = 0;
#if defined(__AVX512BF16__)
  if (M::pack == 2 && stride == src.width && lies_ready<M>(src))
    for (; r + 2 <= count; r += 2)
      pair_rows(dst + r / 2 * stride, src.row(first + r), src.row(first + r + 1), src.width);
#endif
  for (; r < rows; r += M::pack) {
    float* out = dst + r / M::pack * stride;
    for (int i = 0; i < M::pack; ++i) {
      float* row = M::pack == 1 ? out : buffer[i];
      if (r + i < count) src.read(row, first + r + i);
      const int64_t valid = r + i < count ? src.width : 0;
      fill(row + valid, 0.0F, stride - valid);
    }
    if constexpr (M::pack == 2)
      for (int64_t c = 0; c < stride; c += VL) store(out + c, bf16_pair(load(buffer[0] + c), load(buffer[1] + c)));
  }
}

#if defined(__GNUC__) && !defined(__clang__)
// One butterfly step of a VL x VL transpose: exchanges lanes whose index differs in bit STEP.
template <int STEP>
POSATTN_INLINE void transpose_step(vf (&x)[VL]) {
  vi low, high;
  for (int l = 0; l < VL; ++l) {
    low[l] = (l & STEP) == 0 ? l : VL + l - STEP;
    high[l] = (l & STEP) == 0 ? l + STEP : VL + l;
  }
#  pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) {
    if (i & STEP) continue;
    vf a = x[i], b = x[i + STEP];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + STEP] = __builtin_shuffle(a, b, high);
  }
}

POSATTN_INLINE void transpose_block(vf (&x)[VL]) {
  transpose_step<1>(x);
  transpose_step<2>(x);
  if constexpr (VL > 4) transpose_step<(VL > 4 ? 4 : 1)>(x);
  if constexpr (VL > 8) transpose_step<(VL > 8 ? 8 : 1)>(x);
}
#else
inline void transpose_block(vf (&x)[VL]) {
  for (int i = 0; i < VL; ++i)
    for (int j = 0; j < i; ++j) {
      float swap = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = swap;
    }
}
#endif

inline void transpose(float* dst, int64_t dst_row, const float* src, int64_t src_row) {
  vf x[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) x[i] = load(src + i * src_row);
  transpose_block(x);
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) store(dst + i * dst_row, x[i]);
}

// Elements of a panel row count: whole transposed blocks are written, so a panel holds this many element rows.
template <class M>
constexpr int64_t panel_rows(int64_t width) {
  return (elements<M>(width) + VL - 1) / VL * VL;
}

// Columns: [panels][panel_rows][NR], the B operand of products over the width. Columns past `count` are zero.
template <class M>
inline void pack_panels(float* dst, const Source& src, int64_t first, int64_t count) {
  alignas(64) float packed[VL * MAX_WIDTH];
  int64_t depth = panel_rows<M>(src.width), panel = depth * NR;
  for (int64_t c = 0; c < count; c += VL) {
    const float* rows = count - c >= VL ? in_place<M>(src, first + c, VL) : nullptr;
    const int64_t stride = rows ? src.view.row / M::pack : MAX_WIDTH;
    if (!rows) {
      pack_rows<M>(packed, MAX_WIDTH, src, first + c, imin(VL, count - c), VL);
      rows = packed;
    }
    float* out = dst + c / NR * panel + c % NR;
    for (int64_t d = 0; d < depth; d += VL) transpose(out + d * NR, NR, rows + d, stride);
  }
  for (int64_t c = round_up(count, VL); c < round_up(count, NR); c += VL)
    for (int64_t d = 0; d < depth; ++d) store(dst + c / NR * panel + d * NR + c % NR, zero());
}

}  // namespace posattn::POSATTN_ISA
