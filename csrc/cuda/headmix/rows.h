// What the backward kernel reads of queries: tiles of BLOCK_N rows of one head, laid out ahead of the kernel in the
// order of the fragments, so that a warp reads whole lines from one pointer and no row needs an address or a bound.
//
// A tile holds, sixteen bytes a lane each:
//   queries, dO         as B operands of K Q^T and V dO^T: columns are rows, see ColumnFragments
//   statistics          of row 8 c + g, word c: see STATISTICS
//   queries, dO by pairs as B operands of dX^T Q and P^T dO, whose products sum over rows: pairs of neighbouring rows
// posattn/backends/cuda/headmix_rows.py makes it. Rows past the end are zeros.
#pragma once
#include "headmix/operands.h"

namespace posattn::headmix {

constexpr int Q_TILE = BLOCK_N * HEAD_DIM * 2;  // bytes
constexpr int GRAD_TILE = BLOCK_N * HEAD_DIM_V * 2;
constexpr int Q_COLUMNS_AT = 0;
constexpr int GRAD_COLUMNS_AT = Q_COLUMNS_AT + Q_TILE;
constexpr int STATISTICS_AT = GRAD_COLUMNS_AT + GRAD_TILE;
constexpr int Q_PAIRS_AT = STATISTICS_AT + WARP * 16;
constexpr int GRAD_PAIRS_AT = Q_PAIRS_AT + Q_TILE;
constexpr int TILE_BYTES = GRAD_PAIRS_AT + GRAD_TILE;

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

}  // namespace posattn::headmix
