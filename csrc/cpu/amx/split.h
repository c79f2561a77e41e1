// Float32 numbers as sums of bfloat16 parts, so that tiles can multiply them: the high half of a float is its first
// part, the high half of what that leaves is the second, and three hold all 24 bits. Parts have the number's sign.
//
// A product of two sums leaves out what is below its last part's rounding: of three parts six products are taken, of
// two parts three.
#pragma once

#include "../pack.h"
#include "products.h"

namespace posattn::POSATTN_ISA {

// Operands whose largest number is outside these are left to the general mode: parts of smaller ones would be flushed,
// an infinity has none, and products of larger ones would overflow in parts that cancel.
constexpr uint32_t LEAST_TO_SPLIT = 0x21800000;  // 2^-60
constexpr uint32_t MOST_TO_SPLIT = 0x5d800000;   // 2^60

// Whether the largest number, of which these are the bits without the sign, can be split: NaN's are above all.
inline bool fits_in_parts(uint32_t bits) {
  return bits == 0 || (bits >= LEAST_TO_SPLIT && bits <= MOST_TO_SPLIT);
}

// The largest number seen, lane by lane.
class Largest {
public:
  void see(const float* x, int64_t n) {
    const __m512i size = _mm512_set1_epi32(0x7fffffff);
    int64_t c = 0;
    for (; c + VL <= n; c += VL) bits_ = _mm512_max_epu32(bits_, _mm512_and_si512(size, (__m512i)load(x + c)));
    if (c == n) return;
    const auto rest = static_cast<__mmask16>((1U << (n - c)) - 1);
    bits_ = _mm512_max_epu32(bits_, _mm512_and_si512(size, _mm512_maskz_loadu_epi32(rest, x + c)));
  }
  uint32_t bits() const { return _mm512_reduce_max_epu32(bits_); }

private:
  __m512i bits_ = _mm512_setzero_si512();
};

// The same over tasks.
class SharedLargest {
public:
  void see(const Largest& largest) {
    const uint32_t bits = largest.bits();
    uint32_t seen = __atomic_load_n(&bits_, __ATOMIC_RELAXED);
    while (bits > seen && !__atomic_compare_exchange_n(&bits_, &seen, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  bool fits() const { return fits_in_parts(bits_); }

private:
  uint32_t bits_ = 0;
};

// The high halves of both as pairs, a's below b's: one shuffle, on the port that does not multiply.
POSATTN_INLINE vf high_halves(vf a, vf b) {
  const __m512i down = _mm512_set4_epi32(0x0f0e, 0x0b0a, 0x0706, 0x0302);
  return (vf)_mm512_mask_shuffle_epi8((__m512i)b, 0x3333333333333333U, (__m512i)a, down);
}

// x becomes what its high half leaves of it.
POSATTN_INLINE vf without_high_half(vf x) {
  return x - (vf)_mm512_and_si512((__m512i)x, _mm512_set1_epi32(static_cast<int>(0xffff0000U)));
}

// The last of two parts is rounded: what is below it is lost.
template <int PARTS>
POSATTN_INLINE vf last_part(vf x) {
  return PARTS == 3 ? x : (vf)_mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000));
}

// a and b as pairs, part by part.
template <int PARTS>
POSATTN_INLINE void split_pair(vf a, vf b, float* to, int64_t part) {
#pragma GCC unroll 3
  for (int t = 0; t < PARTS - 1; ++t) {
    store(to + t * part, high_halves(a, b));
    a = without_high_half(a), b = without_high_half(b);
  }
  store(to + (PARTS - 1) * part, high_halves(last_part<PARTS>(a), last_part<PARTS>(b)));
}

// What makes products logits in units of log2.
constexpr double LN2 = 0.6931471805599453;
inline double scale_of_log2(float scale) {
  return static_cast<double>(scale) / LN2;
}

// A row times a number that float32 would round, with one rounding.
inline const float* scale_row_by(float* to, const float* row, double by, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] = static_cast<float>(static_cast<double>(row[c]) * by);
  return to;
}

// Row r of those from `first` on, zero beyond the width and from `count` on; where it lies, if it lies like that.
inline const float* read_row(float* buffer, const Source& src, int64_t first, int64_t r, int64_t count,
                             int64_t padded) {
  if (r < count && src.width == padded && src.view.dtype == DType::f32 && !src.cos && src.scale == 1.0F)
    return reinterpret_cast<const float*>(src.row(first + r));
  const int64_t valid = r < count ? src.width : 0;
  if (valid > 0) src.read(buffer, first + r);
  fill(buffer + valid, 0.0F, padded - valid);
  return buffer;
}

// Operands of parts lie tile by tile, so that the rows of one do not meet in the first-level cache.
constexpr int64_t TILE_FLOATS = TILE * TILE;

// The A operand of products over the width: [rows / 16][steps][PARTS] tiles of rows times `scale`. Rows past `count`
// are zero.
template <int PARTS>
inline void split_rows(float* dst, const Source& src, int64_t first, int64_t count, int64_t rows, double scale,
                       Largest& largest) {
  alignas(64) float buffer[MAX_WIDTH];
  const int64_t steps = ceil_div(src.width, TILE_DEPTH), padded = steps * TILE_DEPTH;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = read_row(buffer, src, first, r, count, padded);
    if (scale != 1.0) row = scale_row_by(buffer, row, scale, padded);
    largest.see(row, padded);
    float* to = dst + r / TILE * steps * PARTS * TILE_FLOATS + r % TILE * TILE;
    for (int64_t k = 0; k < steps; ++k)
      split_pair<PARTS>(load(row + k * TILE_DEPTH), load(row + k * TILE_DEPTH + VL), to + k * PARTS * TILE_FLOATS,
                        TILE_FLOATS);
  }
}

template <int PARTS>
inline TileOperand split_rows_operand(const float* at, int64_t width) {
  const int64_t steps = ceil_div(width, TILE_DEPTH);
  return {at, 64, PARTS * TILE_FLOATS * 4, steps * PARTS * TILE_FLOATS * 4, TILE_FLOATS * 4};
}

// Rows as columns, the B operand of products over the width: [rows / 16][steps][PARTS] tiles, those of split_rows
// turned.
template <int PARTS>
inline void split_columns(float* dst, const Source& src, int64_t first, int64_t count, int64_t rows, Largest& largest) {
  split_rows<PARTS>(dst, src, first, count, rows, 1.0, largest);
  const int64_t tiles = rows / TILE * ceil_div(src.width, TILE_DEPTH) * PARTS;
  for (int64_t t = 0; t < tiles; ++t) transpose(dst + t * TILE_FLOATS, TILE, dst + t * TILE_FLOATS, TILE);
}

// 32 rows turned, the A operand of products over them with rows (2 k, 2 k + 1) as pairs: [width / 16][PARTS] tiles.
template <int PARTS>
inline void split_row_columns(float* dst, const Source& src, int64_t first, int64_t count, Largest& largest) {
  alignas(64) float buffer[2][MAX_WIDTH];
  const int64_t tiles = ceil_div(src.width, TILE), padded = tiles * TILE;
  for (int64_t r = 0; r < TILE_DEPTH; r += 2) {
    const float* even = read_row(buffer[0], src, first, r, count, padded);
    const float* odd = read_row(buffer[1], src, first, r + 1, count, padded);
    largest.see(even, padded);
    largest.see(odd, padded);
    for (int64_t t = 0; t < tiles; ++t)
      split_pair<PARTS>(load(even + t * TILE), load(odd + t * TILE), dst + t * PARTS * TILE_FLOATS + r / 2 * TILE,
                        TILE_FLOATS);
  }
  for (int64_t t = 0; t < tiles * PARTS; ++t) transpose(dst + t * TILE_FLOATS, TILE, dst + t * TILE_FLOATS, TILE);
}

// The B operand of products over the rows, with rows (r, r + 16) of each 32 as pairs: [rows / 32][width / 16][PARTS]
// tiles, zero beyond the width and past `count`.
template <int PARTS>
inline void split_depth(float* dst, const Source& src, int64_t first, int64_t count, int64_t rows, Largest& largest) {
  alignas(64) float buffer[2][MAX_WIDTH];
  const int64_t tiles = ceil_div(src.width, TILE), padded = tiles * TILE;
  for (int64_t r = 0; r < rows; r += TILE_DEPTH)
    for (int64_t l = 0; l < TILE; ++l) {
      const float* low = read_row(buffer[0], src, first, r + l, count, padded);
      const float* high = read_row(buffer[1], src, first, r + TILE + l, count, padded);
      largest.see(low, padded);
      largest.see(high, padded);
      float* to = dst + r / TILE_DEPTH * tiles * PARTS * TILE_FLOATS + l * TILE;
      for (int64_t t = 0; t < tiles; ++t)
        split_pair<PARTS>(load(low + t * TILE), load(high + t * TILE), to + t * PARTS * TILE_FLOATS, TILE_FLOATS);
    }
}

template <int PARTS>
inline TileOperand split_depth_operand(const float* at, int64_t width) {
  return {at, 64, ceil_div(width, TILE) * PARTS * TILE_FLOATS * 4, PARTS * TILE_FLOATS * 4, TILE_FLOATS * 4};
}

}  // namespace posattn::POSATTN_ISA
