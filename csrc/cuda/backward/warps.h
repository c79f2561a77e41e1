// How the backward pass's five products are cut over the warps of a block, and the product of one warp.
//
// The logits of BLOCK_N keys and BLOCK_M queries are held transposed, keys by queries: their fragments are then, two by
// two, the A operands of dV += P^T dO and dK += dS^T Q. Where a warp holds whole rows of P^T (LOGIT_COLUMNS = 1) they
// go there from registers; else P^T is passed through shared memory. dS^T always is, since dQ += dS K needs all keys.
#pragma once
#include "common/element.h"
#include "common/swizzle.h"

namespace posattn {

constexpr int THREADS = WARPS * WARP;
// Warps along queries and keys of the logits, along the head dimension of dK and dV, and of dQ.
constexpr int LOGIT_ROWS = WARPS / LOGIT_COLUMNS;
constexpr int KEY_ROWS = WARPS / KEY_COLUMNS;
constexpr int QUERY_ROWS = WARPS / QUERY_COLUMNS;
// Elements of a warp's part.
constexpr int WARP_KEYS = BLOCK_N / LOGIT_ROWS;
constexpr int WARP_QUERIES = BLOCK_M / (LOGIT_COLUMNS * QUERY_PARTS);
constexpr int PART = BLOCK_M / QUERY_PARTS;  // queries whose logits a block holds at a time

// The same in fragments of mma.m16n8k16: groups of 16 rows, eights of columns.
struct Logits {
  static constexpr int GROUPS = WARP_KEYS / 16;
  static constexpr int EIGHTS = WARP_QUERIES / 8;
};
struct KeyGradients {
  static constexpr int GROUPS = BLOCK_N / KEY_ROWS / 16;
  static constexpr int EIGHTS = PADDED / KEY_COLUMNS / 8;
};
struct QueryGradients {
  static constexpr int GROUPS = BLOCK_M / QUERY_ROWS / 16;
  static constexpr int EIGHTS = PADDED / QUERY_COLUMNS / 8;
};

constexpr bool WEIGHTS_IN_REGISTERS = LOGIT_COLUMNS == 1 && KEY_COLUMNS == 1;

static_assert(Logits::GROUPS * LOGIT_ROWS * 16 == BLOCK_N && Logits::EIGHTS * LOGIT_COLUMNS * 8 == PART);
static_assert(KeyGradients::GROUPS * KEY_ROWS * 16 == BLOCK_N && KeyGradients::EIGHTS * KEY_COLUMNS * 8 == PADDED);
static_assert(QueryGradients::GROUPS * QUERY_ROWS * 16 == BLOCK_M);
static_assert(QueryGradients::EIGHTS * QUERY_COLUMNS * 8 == PADDED);
static_assert(Logits::EIGHTS % 2 == 0 && KeyGradients::EIGHTS % 2 == 0 && QueryGradients::EIGHTS % 2 == 0);

template <class Part>
using Fragments = float[Part::GROUPS][Part::EIGHTS][4];

// Where one lane reads an operand of ldmatrix in a tile [rows, DIM], as common/swizzle.h's Reader, but in one register:
// the chunk of 16 columns k differs from that of columns 0 in bits that only the swizzle sets, so it is one exclusive
// or away. That needs the PART chunks of a warp not to straddle the swizzle's period; else there is an offset for each.
// The tile's own place is added last, so that tiles of one shape, which differ in it alone, share the rest.
template <int DIM, int PART = DIM / 8>
struct Rows {
  static constexpr int PERIOD = Tile<DIM>::PERIOD;
  static constexpr int STEPS = PERIOD / 2;
  static constexpr bool ONE = PART % PERIOD == 0 || PERIOD % PART == 0;
  uint32_t offsets[ONE ? 1 : STEPS];
  uint32_t tile;

  // A lane's row, and its chunk among the columns' first two.
  __device__ __forceinline__ Rows(uint32_t tile, int row, int chunk) : tile(tile) {
#pragma unroll
    for (int k = 0; k < (ONE ? 1 : STEPS); ++k) offsets[k] = Tile<DIM>::offset(row, 2 * k + chunk);
  }

  // For rows from `row` (a multiple of 8) on, columns 16 k .. 16 k + 15.
  __device__ __forceinline__ uint32_t at(int row, int k) const {
    const uint32_t first = ONE ? offsets[0] ^ (k % STEPS * 32) : offsets[ONE ? 0 : k % STEPS];
    return first + tile + row * Tile<DIM>::PITCH + k / STEPS * (STEPS * 32);
  }

  // Rows of the tile are rows of A, or rows of B: lanes 0 .. 15 give rows, the others the chunk beside.
  __device__ static __forceinline__ Rows by_rows(uint32_t tile, int row, int chunk, int lane) {
    return Rows(tile, row + (lane & 15), chunk + (lane >> 4));
  }

  // Rows of the tile are columns of B, or columns of A.
  __device__ static __forceinline__ Rows by_columns(uint32_t tile, int row, int chunk, int lane) {
    return Rows(tile, row + (lane & 7) + (lane >> 4 << 3), chunk + ((lane >> 3) & 1));
  }
};

// An operand whose tile holds it as it is multiplied (A by rows, B by columns), or transposed.
enum class As { IS, TRANSPOSED };

template <As as, class From>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const From& from, int group, int step) {
  if constexpr (as == As::IS) {
    ptx::ldmatrix_x4(a, from.at(16 * group, step));
  } else {
    ptx::ldmatrix_x4_trans(a, from.at(16 * step, group));
  }
}

// Columns 16 pair .. 16 pair + 15 of B.
template <As as, class From>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const From& from, int pair, int step) {
  if constexpr (as == As::IS) {
    ptx::ldmatrix_x4(b, from.at(16 * pair, step));
  } else {
    ptx::ldmatrix_x4_trans(b, from.at(16 * step, pair));
  }
}

// d += a b for one step of 16, a being step `at` of a's.
template <As b_as, int GROUPS, int EIGHTS, int STEPS, class From>
__device__ __forceinline__ void multiply(float (&d)[GROUPS][EIGHTS][4], const uint32_t (&a)[GROUPS][STEPS][4], int at,
                                         const From& b, int step) {
#pragma unroll
  for (int pair = 0; pair < EIGHTS / 2; ++pair) {
    uint32_t columns[4];
    load_b<b_as>(columns, b, pair, step);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      mma(d[group][2 * pair], a[group][at], columns[0], columns[1]);
      mma(d[group][2 * pair + 1], a[group][at], columns[2], columns[3]);
    }
  }
}

// d [16 GROUPS, 8 EIGHTS] += a b over 16 STEPS, both from shared memory.
template <int STEPS, As a_as, As b_as, int GROUPS, int EIGHTS, class FromA, class FromB>
__device__ __forceinline__ void product(float (&d)[GROUPS][EIGHTS][4], const FromA& a, const FromB& b) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    uint32_t rows[GROUPS][1][4];
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) load_a<a_as>(rows[group][0], a, group, step);
    multiply<b_as>(d, rows, 0, b, step);
  }
}

// The same with a in registers.
template <As b_as, int GROUPS, int EIGHTS, int GROUPS_A, int STEPS, class From>
__device__ __forceinline__ void product(float (&d)[GROUPS][EIGHTS][4], const uint32_t (&a)[GROUPS_A][STEPS][4],
                                        const From& b) {
  static_assert(GROUPS_A == GROUPS);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) multiply<b_as>(d, a, step, b, step);
}

// Fragments of a product rounded to elements: [group][step] is an A operand.
template <int GROUPS, int EIGHTS>
__device__ __forceinline__ void round_fragments(uint32_t (&to)[GROUPS][EIGHTS / 2][4],
                                                const float (&from)[GROUPS][EIGHTS][4]) {
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int n = 0; n < EIGHTS; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        to[group][n / 2][n % 2 * 2 + half] = pack(from[group][n][2 * half], from[group][n][2 * half + 1]);
      }
    }
  }
}

// Stores fragments of a warp's logits into a tile [BLOCK_N, BLOCK_M] in shared memory. `first` is where this lane has
// its first elements; the eights that follow are, as in Rows, an exclusive or away.
__device__ __forceinline__ uint32_t first_pair(uint32_t tile, int warp, int lane) {
  static_assert(SM90 || Tile<BLOCK_M>::PERIOD % Logits::EIGHTS == 0);
  static_assert(QUERY_PARTS == 1 || BLOCK_M / 8 == Tile<BLOCK_M>::PERIOD);
  const int row = warp / LOGIT_COLUMNS * WARP_KEYS + lane / 4, eight = warp % LOGIT_COLUMNS * Logits::EIGHTS;
  return tile + Tile<BLOCK_M>::offset(row, eight) + lane % 4 * 4;
}

__device__ __forceinline__ void store_pairs(uint32_t first,
                                            const uint32_t (&from)[Logits::GROUPS][Logits::EIGHTS / 2][4]) {
#pragma unroll
  for (int n = 0; n < Logits::EIGHTS; ++n) {
    const uint32_t to = first ^ (n * 16);
#pragma unroll
    for (int group = 0; group < Logits::GROUPS; ++group) {
      ptx::st_shared(to + 16 * group * Tile<BLOCK_M>::PITCH, from[group][n / 2][n % 2 * 2]);
      ptx::st_shared(to + (16 * group + 8) * Tile<BLOCK_M>::PITCH, from[group][n / 2][n % 2 * 2 + 1]);
    }
  }
}

}  // namespace posattn
