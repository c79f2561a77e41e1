// What the backward kernel reads of queries: tiles of BLOCK_N rows of one head, laid out ahead of the kernel in the
// order of the fragments, so that a warp reads whole lines from one pointer and no row needs an address or a bound.
//
// A tile holds, sixteen bytes a lane each:
//   queries, dO         as B operands of K Q^T and V dO^T: columns are rows, see ColumnFragments
//   statistics          of row 8 c + g, word c: see STATISTICS
//   queries, dO by pairs as B operands of dX^T Q and P^T dO, whose products sum over rows: pairs of neighbouring rows
// posattn/backends/cuda_mix_rows.py makes it. Rows past the end are zeros.
#pragma once
#include "mix_operands.h"

namespace posattn::mix {

constexpr int Q_TILE = BLOCK_N * HEAD_DIM * 2;  // bytes
constexpr int GRAD_TILE = BLOCK_N * HEAD_DIM_V * 2;
constexpr int Q_COLUMNS_AT = 0;
constexpr int GRAD_COLUMNS_AT = Q_COLUMNS_AT + Q_TILE;
constexpr int STATISTICS_AT = GRAD_COLUMNS_AT + GRAD_TILE;
constexpr int Q_PAIRS_AT = STATISTICS_AT + WARP * 16;
constexpr int GRAD_PAIRS_AT = Q_PAIRS_AT + Q_TILE;
constexpr int TILE_BYTES = GRAD_PAIRS_AT + GRAD_TILE;

__device__ __forceinline__ uint4 load_16(const unsigned char* p) {
  return *reinterpret_cast<const uint4*>(p);
}

// `tile`: this lane's sixteen bytes of the part in question.
template <int DIM>
__device__ __forceinline__ void load_columns(ColumnFragments<DIM>& to, const unsigned char* tile) {
#pragma unroll
  for (int c = 0; c < N8; ++c) {
#pragma unroll
    for (int d = 0; d < DIM / 32; ++d) to.r[c][d] = load_16(tile + (c * (DIM / 32) + d) * (WARP * 16));
  }
}

// B operands whose rows are rows of a tile: (rows 8 c + 2t and 8 c + 2t + 1, dimension 8 n + g). Two eights of rows
// come in neighbouring registers, as one product takes them; the last eight is alone.
template <int DIM>
struct PairFragments {
  uint4 both[DIM / 16];  // of eights 0 and 1: dimensions 8 n and 8 (n + 1)
  uint4 last[DIM / 32];  // of eight 2: four of them

  __device__ __forceinline__ void load(const unsigned char* tile) {
    static_assert(N8 == 3);
#pragma unroll
    for (int m = 0; m < DIM / 16; ++m) both[m] = load_16(tile + m * (WARP * 16));
#pragma unroll
    for (int m = 0; m < DIM / 32; ++m) last[m] = load_16(tile + (DIM / 16 + m) * (WARP * 16));
  }

  __device__ __forceinline__ uint32_t operand(int c, int n) const {
    return c == 2 ? word(last[n / 4], n % 4) : word(both[n / 2], n % 2 * 2 + c);
  }

private:
  __device__ static __forceinline__ uint32_t word(const uint4& w, int x) {
    return x == 0 ? w.x : x == 1 ? w.y : x == 2 ? w.z : w.w;
  }
};

// The statistics of a row are eight bfloat16 numbers: the log-sum-exp (less b2, in base 2, negative) in three parts and
// zero, and the same of delta. As the inner dimension of a product with ones they are added to every key's sum,
// exactly: three parts have the bits of a float32.
struct Statistics {
  uint32_t row[N8];  // (parts 2t and 2t + 1, row 8 c + g)

  __device__ __forceinline__ void load(const unsigned char* tile) {
    const uint4 w = load_16(tile);
    static_assert(N8 == 3);
    row[0] = w.x, row[1] = w.y, row[2] = w.z;
  }

  // sum[c] += the numbers whose parts are 4 `which` .. 4 `which` + 2.
  __device__ __forceinline__ void add(float (&sum)[N8][4], int which, int t) const {
    constexpr uint32_t ONE = 0x3f80u, ONES = 0x3f803f80u;
    const uint32_t part = t / 2 != which ? 0 : t % 2 ? ONE : ONES;
    const uint32_t a[2] = {part, part};
#pragma unroll
    for (int c = 0; c < N8; ++c) ptx::mma_m16n8k8_bf16(sum[c], a, row[c]);
  }
};

}  // namespace posattn::mix
