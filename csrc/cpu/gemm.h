// The one inner loop: C[MR x NV vectors] (+)= A[MR x K] B[K x NV vectors], all of C in registers. A's elements are
// broadcast one by one, at any two strides; B's rows are contiguous.
// An element is 32 bits: a float, or in the bfloat16 mode a pair of bfloat16 that are neighbours along K.
#pragma once

#include "simd.h"

#if defined(POSATTN_TILES)
#  include "amx/products.h"
#endif

namespace posattn::POSATTN_ISA {

// 24 accumulators, four (two) vectors of B and one broadcast fill 32 (16) registers.
constexpr int MR = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int NV_MAX = 4;
#else
constexpr int NV_MAX = 2;
#endif
constexpr int NR = NV_MAX * VL;

struct NoSession {};

struct F32 {
  using General = F32;             // the mode of what has no form of its own in this one
  using Session = NoSession;       // what a task holds while it computes
  static constexpr int pack = 1;   // logical K steps an element holds
  static constexpr int rows = MR;  // of C that a product takes at once
  static constexpr bool tiles = false;
  static constexpr int exp_degree = 5;
  static POSATTN_INLINE vf dot(vf c, vf a, vf b) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct BF16 {
  using General = BF16;
  using Session = NoSession;
  static constexpr int pack = 2;
  static constexpr int rows = MR;
  static constexpr bool tiles = false;
  static constexpr int exp_degree = 4;
  static POSATTN_INLINE vf dot(vf c, vf a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
};
#endif

#if defined(POSATTN_TILES)
// Products on tiles, everything else as BF16: the layouts of A, B and C are the same.
struct AMX {
  using General = AMX;
  using Session = TileSession;
  static constexpr int pack = 2;
  static constexpr int parts = 1;  // bfloat16 numbers that an operand's number is the sum of
  static constexpr int rows = 2 * TILE;
  static constexpr bool tiles = true;
  static constexpr int exp_degree = 4;
};

// Products on tiles of numbers that are sums of bfloat16 parts, for the kernels of amx/ alone.
template <int PARTS>
struct Split {
  using General = F32;
  using Session = TileSession;
  static constexpr int parts = PARTS;
  static constexpr int rows = 2 * TILE;
  static constexpr int exp_degree = 5;
};
#endif

// What becomes of C: it is the product, or the product is added to it. Added once, at the end: a running sum that went
// on in the accumulators would round at its full size in every step, which at long lengths is four times the error.
enum class Into { fresh, sum };

template <class M, int ROWS, int NV>
POSATTN_INLINE void accumulate(vf (&c)[ROWS][NV], const float* a, int64_t a_row, int64_t a_k, const float* b,
                               int64_t b_k, int64_t k_len) {
  for (int64_t k = 0; k < k_len; ++k) {
    vf row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) row[j] = load(b + j * VL);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      vf x = set1(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) c[i][j] = M::dot(c[i][j], x, row[j]);
    }
    a += a_k;
    b += b_k;
  }
}

template <class M, int ROWS, int NV, Into INTO>
POSATTN_INLINE void micro(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c,
                          int64_t c_row, int64_t k_len) {
  vf acc[ROWS][NV] = {};
  accumulate<M>(acc, a, a_row, a_k, b, b_k, k_len);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      float* at = c + i * c_row + j * VL;
      store(at, INTO == Into::sum ? load(at) + acc[i][j] : acc[i][j]);
    }
}

// C[MR x vectors * VL], any number of vectors.
template <class M, Into INTO>
inline void gemm_vectors(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c,
                         int64_t c_row, int64_t k_len, int64_t vectors) {
  for (; vectors >= NV_MAX; vectors -= NV_MAX, b += NR, c += NR)
    micro<M, MR, NV_MAX, INTO>(a, a_row, a_k, b, b_k, c, c_row, k_len);
  if constexpr (NV_MAX == 4) {
    if (vectors == 3) return micro<M, MR, 3, INTO>(a, a_row, a_k, b, b_k, c, c_row, k_len);
    if (vectors == 2) return micro<M, MR, 2, INTO>(a, a_row, a_k, b, b_k, c, c_row, k_len);
  }
  if (vectors == 1) micro<M, MR, 1, INTO>(a, a_row, a_k, b, b_k, c, c_row, k_len);
}

// C[M::rows x vectors * VL].
template <class M, Into INTO>
inline void gemm_rows(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c, int64_t c_row,
                      int64_t k_len, int64_t vectors) {
#if defined(POSATTN_TILES)
  if constexpr (M::tiles) {  // A's rows are contiguous (a_k is 1), and both are zero to the end of a tile
    const TileOperand rows{a, a_row * 4, 64, TILE * a_row * 4, 0}, pairs{b, b_k * 4, TILE * b_k * 4, 64, 0};
    return tile_product<1, INTO == Into::sum>(rows, 2, pairs, vectors, c, c_row, ceil_div(k_len, TILE));
  } else
#endif
    gemm_vectors<M, INTO>(a, a_row, a_k, b, b_k, c, c_row, k_len, vectors);
}

}  // namespace posattn::POSATTN_ISA
