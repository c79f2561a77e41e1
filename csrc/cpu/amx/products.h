// Products of bfloat16 matrices on tiles. A lies in rows; B lies in pairs of rows, as pack.h packs it: element (k, n)
// of 32 bits holds rows 2k and 2k + 1 of column n.
#pragma once

#include "tiles.h"

namespace posattn::POSATTN_ISA {

// Where an operand's tiles lie, in bytes: from one row of a tile to the next, from one step of the sum to the next, and
// from one tile to the next across the sum (down A's rows, along B's columns).
struct TileOperand {
  const void* at;
  int64_t row, step, across;
  const char* tile(int64_t step_, int64_t across_) const {
    return static_cast<const char*>(at) + step_ * step + across_ * across;
  }
};

// C[16 ROWS x 16 COLS] (+)= A B over `steps` times 32 numbers. C stays in tiles all the while: one that is loaded again
// holds up the next product by a hundred cycles.
template <int ROWS, int COLS, bool ADD>
POSATTN_INLINE void tile_block(const TileOperand& a, int64_t i, const TileOperand& b, int64_t j, float* c,
                               int64_t c_row, int64_t steps) {
  float* at = c + i * TILE * c_row + j * TILE;
  const int64_t bytes = c_row * 4;
  if constexpr (ADD) {
    tile_load<0>(at, bytes);
    if constexpr (COLS == 2) tile_load<1>(at + TILE, bytes);
    if constexpr (ROWS == 2) tile_load<2>(at + TILE * c_row, bytes);
    if constexpr (ROWS == 2 && COLS == 2) tile_load<3>(at + TILE * c_row + TILE, bytes);
  } else {
    tile_zero<0>();
    if constexpr (COLS == 2) tile_zero<1>();
    if constexpr (ROWS == 2) tile_zero<2>();
    if constexpr (ROWS == 2 && COLS == 2) tile_zero<3>();
  }
  for (int64_t k = 0; k < steps; ++k) {
    tile_load<4>(a.tile(k, i), a.row);
    tile_load<6>(b.tile(k, j), b.row);
    tile_dot<0, 4, 6>();
    if constexpr (COLS == 2) {
      tile_load<7>(b.tile(k, j + 1), b.row);
      tile_dot<1, 4, 7>();
    }
    if constexpr (ROWS == 2) {
      tile_load<5>(a.tile(k, i + 1), a.row);
      tile_dot<2, 5, 6>();
      if constexpr (COLS == 2) tile_dot<3, 5, 7>();
    }
  }
  tile_store<0>(at, bytes);
  if constexpr (COLS == 2) tile_store<1>(at + TILE, bytes);
  if constexpr (ROWS == 2) tile_store<2>(at + TILE * c_row, bytes);
  if constexpr (ROWS == 2 && COLS == 2) tile_store<3>(at + TILE * c_row + TILE, bytes);
}

// C[16 rows x 16 cols] (+)= A B, rows and cols counted in tiles.
template <bool ADD>
inline void tile_product(const TileOperand& a, int64_t rows, const TileOperand& b, int64_t cols, float* c,
                         int64_t c_row, int64_t steps) {
  int64_t j = 0;
  for (; j + 2 <= cols; j += 2) {
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) tile_block<2, 2, ADD>(a, i, b, j, c, c_row, steps);
    if (i < rows) tile_block<1, 2, ADD>(a, i, b, j, c, c_row, steps);
  }
  if (j == cols) return;
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2) tile_block<2, 1, ADD>(a, i, b, j, c, c_row, steps);
  if (i < rows) tile_block<1, 1, ADD>(a, i, b, j, c, c_row, steps);
}

// C[32 x 16 cols] = A B where a row of A is STEPS = 1 or 2 tiles: all of A stays in tiles.
template <int STEPS>
POSATTN_INLINE void tile_short_rows(const TileOperand& a, const TileOperand& b, int64_t cols, float* c, int64_t c_row) {
  tile_load<4>(a.tile(0, 0), a.row);
  tile_load<5>(a.tile(0, 1), a.row);
  if constexpr (STEPS == 2) {
    tile_load<6>(a.tile(1, 0), a.row);
    tile_load<7>(a.tile(1, 1), a.row);
  }
  for (int64_t j = 0; j < cols; ++j) {
    tile_load<3>(b.tile(0, j), b.row);
    tile_zero<0>();
    tile_dot<0, 4, 3>();
    tile_zero<1>();
    tile_dot<1, 5, 3>();
    if constexpr (STEPS == 2) {
      tile_load<2>(b.tile(1, j), b.row);
      tile_dot<0, 6, 2>();
      tile_dot<1, 7, 2>();
    }
    tile_store<0>(c + j * TILE, c_row * 4);
    tile_store<1>(c + TILE * c_row + j * TILE, c_row * 4);
  }
}

// C[32 x 16 cols] = A B over a row of A, whatever its length.
inline void tile_rows(const TileOperand& a, const TileOperand& b, int64_t cols, float* c, int64_t c_row,
                      int64_t steps) {
  if (steps == 2) return tile_short_rows<2>(a, b, cols, c, c_row);
  if (steps == 1) return tile_short_rows<1>(a, b, cols, c, c_row);
  tile_product<false>(a, 2, b, cols, c, c_row, steps);
}

}  // namespace posattn::POSATTN_ISA
