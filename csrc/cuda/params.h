// What kernels take, by value: one struct a kernel family, built from the pieces they share.
//
// posattn/backends/common/structs.py reads this file and packs the same layout, so members come one to a line, of the
// types it knows: pointers, int32_t, uint32_t, int64_t, float, or a struct above. Const pointers are never written
// through. Strides count elements; those of a dimension of size 1 are 0 where it repeats.
#pragma once
#include "common/types.h"

namespace posattn {

struct Strides {
  int64_t batch;
  int64_t head;
  int64_t token;
};

// [B or 1, H or 1, Tq, Tk]
struct PairStrides {
  int64_t batch;
  int64_t head;
  int64_t query;
  int64_t key;
};

// A sequence is a batch entry, or a packed document.
struct ShapeParams {
  int32_t heads;
  int32_t group;     // query heads that share a key head
  int32_t q_tokens;  // of the tensors' token axes
  int32_t k_tokens;
  int32_t q_blocks;  // of the longest sequence, BLOCK_M queries each
  int32_t k_blocks;  // BLOCK_N keys each
};

struct MaskParams {
  const int32_t* k_lengths;
  const int32_t* k_starts;
  const int32_t* cu_q;
  const int32_t* cu_k;
  const int32_t* offsets;
  const uint8_t* boolean;
  PairStrides boolean_strides;
  int32_t offset;
  int32_t left;
  int32_t right;
};

struct PositionParams {
  const int64_t* q;
  const int64_t* k;
  int64_t q_batch;
  int64_t k_batch;
};

struct BiasParams {
  const float* slope;
  int64_t slope_batch;
  const float* table;
  int64_t table_head;
  const float* psi;
  const float* psi_bounds;  // [blocks, 2]: least and greatest of blocks n and n + 1, BOUNDS_BLOCK entries each
  const float* row_scale;
  const float* row_bounds;  // the same of row_scale
  const float* knots;
  const float* segment_slope;      // [H, knots + 1]
  const float* segment_intercept;  // [H, knots + 1]
  const void* dense;
  PairStrides dense_strides;
  int32_t table_first;  // the distances of the first and the last entry
  int32_t table_last;
  int32_t psi_first;
  int32_t psi_last;
  int32_t row_first;  // the positions of the first and the last entry
  int32_t row_last;
  int32_t num_knots;
};

// [B or 1, T, half] each.
struct AngleParams {
  const float* cos;
  const float* sin;
  int64_t batch;
};

struct DropoutParams {
  const int64_t* seed;  // [1], Philox's key: in memory, so that each replay of a captured graph may draw its own
  uint32_t threshold;   // words at least this are kept
  float keep_scale;
};

// Where k and v are pages [pages, Hkv, page, D]: int32 [B, entries], and the pool's last page.
struct PageParams {
  const int32_t* table;
  int64_t entries;
  int32_t last;
};

struct ForwardParams {
  const void* q;
  const void* k;
  const void* v;
  void* out;   // of the element type; float32 partial outputs [splits, ...] when the keys are split
  float* lse;  // [B, H, Tq] or [splits, B, H, Tq]
  const float* sinks;
  Strides q_strides;
  Strides k_strides;
  Strides v_strides;
  Strides out_strides;
  int64_t out_split;
  int64_t lse_split;
  ShapeParams shape;
  MaskParams mask;
  PositionParams positions;
  BiasParams bias;
  AngleParams q_angles;
  AngleParams k_angles;
  DropoutParams dropout;
  float scale;
  float softcap;
  int32_t split_tiles;  // tiles of keys for one split
  PageParams pages;
  const int32_t* reach;  // ReachParams.reach, of blocks of REACH_ROWS queries
};

// Which keys blocks of BLOCK_M queries cannot do without, from the largest norms of BLOCK_N keys each.
struct ReachParams {
  const void* q;
  const void* k;
  const float* q_amplitude;  // [1], by how much rotating may lengthen a row; or null
  const float* k_amplitude;
  float* norms;    // [Hkv, cells]
  int32_t* reach;  // [blocks of queries of all sequences, H, 2]: the first key, and the end
  const float* slope;
  const float* table;   // [H, entries]
  const float* behind;  // [H, table_cells]: the highest value from a cell's beginning on, BLOCK_N entries each
  const float* before;  // [H, table_cells]: up to a cell's end
  int64_t slope_batch;
  int64_t table_head;
  Strides q_strides;
  Strides k_strides;
  ShapeParams shape;
  MaskParams mask;
  PageParams pages;
  int32_t table_first;
  int32_t table_last;
  int32_t table_cells;
  int32_t cells;  // of all sequences
  float scale;    // not negative
  float softcap;
};

struct CombineParams {
  const float* partial;      // [splits, rows, DIM_V]
  const float* partial_lse;  // [splits, rows]
  void* out;
  float* lse;
  const float* sinks;
  Strides out_strides;
  int64_t rows;
  int32_t heads;
  int32_t q_tokens;
  int32_t splits;
};

// The same for blocks of BLOCK_N keys, in blocks of BLOCK_M queries.
struct TurnParams {
  const int32_t* of_queries;  // ReachParams.reach
  int32_t* reach;             // [blocks of keys of all sequences, Hkv, 2]: the first block of queries, and the end
  int32_t* first;             // [blocks of queries, Hkv]: the first block of keys that walks them
  ShapeParams shape;
  MaskParams mask;
};

// DAPE's MLP, contiguous: w1 [WIDTH, INPUTS], b1 [WIDTH], w2 [HEADS, WIDTH], b2 [HEADS].
struct HeadMixParams {
  const float* w1;
  const float* b1;
  const float* w2;
  const float* b2;
};

struct HeadMixForwardParams {
  const void* q;
  const void* tiles;  // [Hkv, rows / 24] of keys (rotated) and values, and one tile more, see cuda/headmix_rows.py
  void* out;
  float* lse;  // [B, H, Tq]
  const float* sinks;
  Strides q_strides;
  Strides out_strides;
  ShapeParams shape;
  MaskParams mask;
  PositionParams positions;
  BiasParams inner;
  BiasParams outer;
  HeadMixParams mix;
  DropoutParams dropout;
  int64_t key_rows;  // padded rows of all sequences, each beginning at a multiple of 24
  float scale;
  float softcap;
};

// Where HeadMix's kernel adds up the gradient of a bias, zeroed; null where it is not wanted. All but slopes are
// float32, or, with an order that must not matter, int64 in units of 1 / *units.
struct BiasGradParams {
  float* slope;     // [key blocks, H]
  void* table;      // [H, diagonals] if the bias depends on the distance alone, else [H, entries]
  void* psi;        // [entries]
  void* row_scale;  // [padded rows]
  void* segments;   // [H, 2, knots + 1]: sums of dS, sums of dS y
  void* dense;
  const float* units;
  PairStrides dense_strides;
};

struct HeadMixBackwardParams {
  const void* tiles;  // [H, rows / 24]: queries (rotated), output gradients and row statistics, see headmix/rows.h
  const void* k;      // rotated
  const void* v;
  const float* by_distance;  // [H, diagonals], the inner table at each distance
  float* dq;                 // [H, rows / 8, 8 HEAD_DIM], zeroed, in the order of the fragments
  float* dk;                 // [B, H, Tk, HEAD_DIM], by query head
  float* dv;                 // [B, H, Tk, HEAD_DIM_V]
  float* dw1;                // [key blocks, MLP warps, WIDTH, INPUTS]
  float* db1;                // [key blocks, MLP warps, WIDTH]
  float* dw2;                // [key blocks, MLP warps, HEADS, WIDTH]
  int32_t* dq_semaphore;     // ordered: a ticket, then [H, rows / 24] counts of key blocks
  BiasGradParams dinner;
  BiasGradParams douter;
  Strides k_strides;
  Strides v_strides;
  ShapeParams shape;
  MaskParams mask;
  PositionParams positions;
  BiasParams inner;
  BiasParams outer;
  HeadMixParams mix;
  DropoutParams dropout;
  int64_t rows;            // padded query rows of all sequences, each beginning at a multiple of 24
  int32_t diagonals;       // distances that tiles can meet
  int32_t first_distance;  // of the first diagonal
  float scale;
  float softcap;
};

// x [B, H, T, DIM], or pages of such, rotated by its tokens' angles into out, contiguous.
struct RotaryParams {
  const void* x;
  void* out;
  Strides x_strides;
  AngleParams angles;
  int32_t batch;
  int32_t heads;
  int32_t tokens;
  PageParams pages;
};

// The backward pass keeps what it needs of queries by padded rows: a sequence begins at a multiple of BLOCK_M, so
// `rows` is a little more than the tokens of all sequences.
struct BackwardRowsParams {
  const void* out;
  const void* grad_out;
  const float* lse;       // [B, H, Tq]
  const float* grad_lse;  // the same, or null
  float* lse2;            // [H, rows]
  float* minus_delta;     // [H, rows]
  float* row_scale;       // [rows], of a profile
  Strides out_strides;
  Strides grad_out_strides;
  ShapeParams shape;
  MaskParams mask;
  PositionParams positions;
  BiasParams bias;
  int32_t rows;
};

// Queries and dO as the tiles that attention_backward of sm_90a copies whole.
struct BackwardTilesParams {
  const void* q;  // rotated
  const void* grad_out;
  void* q_tiles;  // [H, rows / BLOCK_M, BLOCK_M * PADDED]
  void* grad_tiles;
  Strides q_strides;
  Strides grad_out_strides;
  ShapeParams shape;
  MaskParams mask;
  int32_t rows;
};

struct BackwardParams {
  const void* q;  // rotated, as k
  const void* k;
  const void* v;
  const void* grad_out;
  const float* lse2;         // [H, rows]
  const float* minus_delta;  // [H, rows]
  const float* row_scale;    // [rows]
  const float* table;        // [H, diagonals], its value at each distance; explicit positions use bias's
  const float* psi;          // [diagonals]
  float* dq;                 // [H, rows / BLOCK_M, BLOCK_M * PADDED], in the order of the fragments
  void* dk;
  void* dv;
  float* dslope;     // [warps of the key blocks of all sequences, H]
  void* dtable;      // [slots, H, diagonals], see common/global_sums.h; [slots, H, entries] with explicit positions
  void* dpsi;        // the same
  void* drow_scale;  // [H, rows]
  void* dsegments;   // [slots, H, 2, knots + 1]
  void* ddense;      // as strided; float32 where each element has one logit
  const float* units;
  int32_t* dq_semaphore;  // ordered: a ticket, then [H, rows / BLOCK_M] counts of key blocks
  Strides q_strides;
  Strides k_strides;
  Strides v_strides;
  Strides grad_out_strides;
  Strides dk_strides;
  Strides dv_strides;
  PairStrides ddense_strides;
  ShapeParams shape;
  MaskParams mask;
  PositionParams positions;
  BiasParams bias;
  AngleParams k_angles;
  DropoutParams dropout;
  int32_t rows;
  int32_t slots;      // sequence s adds to slot s % slots of the operands' sums
  int32_t diagonals;  // distances that tiles can meet, a multiple of 4
  float scale;
  float scale2;  // times log2(e)
  float softcap;
  int32_t first_distance;  // of the first diagonal
  const int32_t* reach;    // TurnParams.reach
  const int32_t* first;    // TurnParams.first, if ordered
};

// The accumulated gradient of the queries, scaled, rotated back and rounded.
struct BackwardQueriesParams {
  const float* accumulated;  // BackwardParams.dq
  void* dq;
  Strides dq_strides;
  AngleParams angles;
  ShapeParams shape;
  MaskParams mask;
  int32_t rows;
  float scale;
};

}  // namespace posattn
