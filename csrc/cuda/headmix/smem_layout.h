// The tiling of the HeadMix kernels, from the constants that a source is compiled with, and where things lie in shared
// memory.
//
// A block owns BLOCK_M queries of all heads and walks the keys BLOCK_N at a time. A warp owns HEADS_PER_WARP heads: it
// alone needs their keys and values, so it reads those from global memory straight into fragments, and no tile of them
// ever lies in shared memory. What the heads exchange does:
//   x   [PLANES][BLOCK_M][BLOCK_N]           16-bit inputs of the MLP: logits, after them the inner bias (concat forms)
//   mix [heads, padded][BLOCK_M / 2][BLOCK_N] what the MLP adds to the logits of rows i and i + 8 of a fragment, as a
//   pair
// Both have strides without bank conflicts: eight heads' rows of x for ldmatrix, four heads' pairs of mix for stores.
#pragma once
#include "params.h"
#include "ptx/ptx.h"

namespace posattn::headmix {

constexpr int GROUPS = BLOCK_M / 16;
constexpr int N8 = BLOCK_N / 8;
constexpr int COLUMNS = CONCAT ? 2 * HEADS : HEADS;  // of w1

// A slope's bias is the distance times a number of each head, so layer 1 takes it as the distance times one column of
// weights: the distance rounded, what is left of it, and once more the distance for what rounding leaves of the column.
constexpr int INPUTS = FOLD_SLOPE ? HEADS + 3 : COLUMNS;
constexpr int STORED = FOLD_SLOPE ? HEADS + 2 : COLUMNS;  // planes of x
// Products take inputs by eights. Where the last eight is not full, an input of ones brings b1 in with the weights, and
// takes its gradient out with theirs.
constexpr bool ONES = INPUTS % 8 != 0;
constexpr int PLANES = STORED + ONES;
constexpr int INPUT_BLOCKS = ceil_div(INPUTS, 8);
constexpr int HEAD_BLOCKS = ceil_div(HEADS, 8);
constexpr int WIDTH_PAIRS = ceil_div(WIDTH, 16);  // sixteen hidden units: two n8 tiles of layer 1, one k16 step of 2
static_assert(N8 % 2 == 1, "eight rows of 2 * BLOCK_N bytes then fall into different banks");
static_assert(BLOCK_M % 16 == 0 && BLOCK_M <= 32);
static_assert(THREADS == WARPS * WARP);
static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM_V % 32 == 0);

// Sixteen positions, the rows of an MLP product: eight keys of row i and of row i + 8.
constexpr int POSITION_TILES = BLOCK_M * BLOCK_N / 16;

constexpr int X_ROW = BLOCK_N * 2;
constexpr int X_HEAD = BLOCK_M * X_ROW + 16;
constexpr int MIXED_HEAD = (BLOCK_M / 2 * BLOCK_N + 4) * 4;
constexpr int Q_HEAD = BLOCK_M * HEAD_DIM * 2;
constexpr int Q_BYTES = HEADS * Q_HEAD;
constexpr int X_BYTES = PLANES * X_HEAD;
constexpr int MIXED_BYTES = HEAD_BLOCKS * 8 * MIXED_HEAD;

// The plane of x that an input has; inputs past the last one meet weights of zero.
__device__ __forceinline__ int plane_of(int input) {
  return FOLD_SLOPE && input == HEADS + 2 ? HEADS : min(input, PLANES - 1);
}

struct Lane {
  int lane, warp, g, t;
};

__device__ __forceinline__ Lane lane_of(int thread) {
  const int lane = thread % WARP;
  return {lane, thread / WARP, lane / 4, lane % 4};
}

__device__ __forceinline__ Lane this_lane() {
  return lane_of(threadIdx.x);
}

// A tile of positions: where its first row's keys lie in x, and its pairs in mix. The second row is 8 X_ROW further.
struct Position {
  int x, mix;
};

__device__ __forceinline__ Position position(int step, int warp) {
  const int tile = step * MLP_WARPS + warp;
  const int block = GROUPS == 1 ? 0 : BLOCK_N % MLP_WARPS == 0 ? step * MLP_WARPS / BLOCK_N : tile >= BLOCK_N;
  return {16 * tile + block * 8 * X_ROW, 32 * tile};
}

}  // namespace posattn::headmix
