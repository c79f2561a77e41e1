// Products of bfloat16 matrices on tiles, and of sums of up to three of them. A lies in rows; B lies in pairs of rows,
// as pack.h packs it: element (k, n) of 32 bits holds rows 2k and 2k + 1 of column n.
#pragma once

#include "tiles.h"

namespace posattn::POSATTN_ISA {

// Where an operand's tiles lie, in bytes: from one row of a tile to the next, from one step of the sum to the next,
// from one tile to the next across the sum (down A's rows, along B's columns), and from one part to the next.
struct TileOperand {
  const void* at;
  int64_t row, step, across, part;
  const char* tile(int64_t step_, int64_t across_, int part_ = 0) const {
    return static_cast<const char*>(at) + step_ * step + across_ * across + part_ * part;
  }
};

// The products of parts that a step takes, the small ones first. One operand of each is the last one's, so that four
// tiles serve; four sums at a time pass through them.
template <int PARTS>
struct Terms;
template <>
struct Terms<1> {
  static constexpr int n = 1, a[] = {0}, b[] = {0};
};
template <>
struct Terms<2> {
  static constexpr int n = 3, a[] = {0, 0, 1}, b[] = {1, 0, 0};
};
template <>
struct Terms<3> {
  static constexpr int n = 6, a[] = {0, 0, 1, 1, 2, 0}, b[] = {2, 1, 1, 0, 0, 0};
};

// C's tiles 0 .. 3 += term T of A B: tiles i, i + 1 of A's rows by j, j + 1 of B's columns.
template <int PARTS, int ROWS, int COLS, int T>
POSATTN_INLINE void tile_term(const TileOperand& a, int64_t i, const TileOperand& b, int64_t j, int64_t k) {
  using Term = Terms<PARTS>;
  constexpr int of_a = Term::a[T], of_b = Term::b[T];
  constexpr bool new_a = T == 0 || of_a != Term::a[T ? T - 1 : 0], new_b = T == 0 || of_b != Term::b[T ? T - 1 : 0];
  if constexpr (new_a) tile_load<4>(a.tile(k, i, of_a), a.row);
  if constexpr (new_b) tile_load<6>(b.tile(k, j, of_b), b.row);
  tile_dot<0, 4, 6>();
  if constexpr (COLS == 2) {
    if constexpr (new_b) tile_load<7>(b.tile(k, j + 1, of_b), b.row);
    tile_dot<1, 4, 7>();
  }
  if constexpr (ROWS == 2) {
    if constexpr (new_a) tile_load<5>(a.tile(k, i + 1, of_a), a.row);
    tile_dot<2, 5, 6>();
    if constexpr (COLS == 2) tile_dot<3, 5, 7>();
  }
}

template <int PARTS, int ROWS, int COLS>
POSATTN_INLINE void tile_step(const TileOperand& a, int64_t i, const TileOperand& b, int64_t j, int64_t k) {
  tile_term<PARTS, ROWS, COLS, 0>(a, i, b, j, k);
  if constexpr (PARTS > 1) {
    tile_term<PARTS, ROWS, COLS, 1>(a, i, b, j, k);
    tile_term<PARTS, ROWS, COLS, 2>(a, i, b, j, k);
  }
  if constexpr (PARTS > 2) {
    tile_term<PARTS, ROWS, COLS, 3>(a, i, b, j, k);
    tile_term<PARTS, ROWS, COLS, 4>(a, i, b, j, k);
    tile_term<PARTS, ROWS, COLS, 5>(a, i, b, j, k);
  }
}

template <int ROWS, int COLS>
POSATTN_INLINE void zero_tiles() {
  tile_zero<0>();
  if constexpr (COLS == 2) tile_zero<1>();
  if constexpr (ROWS == 2) tile_zero<2>();
  if constexpr (ROWS == 2 && COLS == 2) tile_zero<3>();
}

template <int ROWS, int COLS>
POSATTN_INLINE void load_tiles(const float* at, int64_t c_row) {
  tile_load<0>(at, c_row * 4);
  if constexpr (COLS == 2) tile_load<1>(at + TILE, c_row * 4);
  if constexpr (ROWS == 2) tile_load<2>(at + TILE * c_row, c_row * 4);
  if constexpr (ROWS == 2 && COLS == 2) tile_load<3>(at + TILE * c_row + TILE, c_row * 4);
}

template <int ROWS, int COLS>
POSATTN_INLINE void store_tiles(float* at, int64_t c_row) {
  tile_store<0>(at, c_row * 4);
  if constexpr (COLS == 2) tile_store<1>(at + TILE, c_row * 4);
  if constexpr (ROWS == 2) tile_store<2>(at + TILE * c_row, c_row * 4);
  if constexpr (ROWS == 2 && COLS == 2) tile_store<3>(at + TILE * c_row + TILE, c_row * 4);
}

// C[16 ROWS x 16 COLS] (+)= A B over `steps` times 32 numbers. C stays in tiles all the while: one that is loaded again
// holds up the next product by a hundred cycles.
template <int PARTS, int ROWS, int COLS, bool ADD>
POSATTN_INLINE void tile_block(const TileOperand& a, int64_t i, const TileOperand& b, int64_t j, float* c,
                               int64_t c_row, int64_t steps) {
  float* at = c + i * TILE * c_row + j * TILE;
  if constexpr (ADD)
    load_tiles<ROWS, COLS>(at, c_row);
  else
    zero_tiles<ROWS, COLS>();
  for (int64_t k = 0; k < steps; ++k) tile_step<PARTS, ROWS, COLS>(a, i, b, j, k);
  store_tiles<ROWS, COLS>(at, c_row);
}

// C[16 rows x 16 cols] (+)= A B, rows and cols counted in tiles.
template <int PARTS, bool ADD>
inline void tile_product(const TileOperand& a, int64_t rows, const TileOperand& b, int64_t cols, float* c,
                         int64_t c_row, int64_t steps) {
  int64_t j = 0;
  for (; j + 2 <= cols; j += 2) {
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) tile_block<PARTS, 2, 2, ADD>(a, i, b, j, c, c_row, steps);
    if (i < rows) tile_block<PARTS, 1, 2, ADD>(a, i, b, j, c, c_row, steps);
  }
  if (j == cols) return;
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2) tile_block<PARTS, 2, 1, ADD>(a, i, b, j, c, c_row, steps);
  if (i < rows) tile_block<PARTS, 1, 1, ADD>(a, i, b, j, c, c_row, steps);
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
  tile_product<1, false>(a, 2, b, cols, c, c_row, steps);
}

// Products C[32 x 64] = A B that are taken a few instructions at a time, between those of other work: tiles and vector
// registers compute at the same time only where instructions of both are near one another, and vectors are slow for
// hundreds of cycles after the last product. What is between uses no tile.
//
// Two steps of an even column of tiles, then the same two of the next one. A column's sums are stored half a column's
// time after its last product: stores that wait for it would leave no room for anything else to wait.
template <int PARTS>
class PiecewiseProducts {
public:
  static constexpr int PIECES = 16;

  // `c` has rows of 64.
  void add(const TileOperand& a, const TileOperand& b, float* c, int64_t steps) { jobs_[n_++] = {a, b, c, steps}; }

  // The pieces 0 .. PIECES - 1 are called one after the other, and over again.
  template <int PIECE>
  POSATTN_INLINE void take() {
    constexpr int ODD = PIECE / 8, AT = PIECE % 8, FIRST = AT * 3 / 2, LAST = (AT + 1) * 3 / 2;  // of 12 terms
    if constexpr (AT == 4 || AT == 5) store_column<!ODD, AT - 4>();
    if (at_ == n_) return;
    if constexpr (AT == 0) zero_column<ODD>();
    terms<ODD, FIRST>();
    if constexpr (LAST - FIRST == 2) terms<ODD, FIRST + 1>();
    if constexpr (AT == 7) end_column<ODD>();
  }

  void finish() {
    store_column<1, 0>(), store_column<1, 1>();
    while (at_ < n_) {
      zero_column<0>();
      all_terms<0>();
      end_column<0>();
      zero_column<1>();
      all_terms<1>();
      end_column<1>();
      store_column<0, 0>(), store_column<0, 1>();
      store_column<1, 0>(), store_column<1, 1>();
    }
  }

private:
  struct Job {
    TileOperand a, b;
    float* c;
    int64_t steps;
  };
  // A column's tiles are C0 and C2, an odd one's C1 and C3.
  template <int ODD>
  POSATTN_INLINE void zero_column() {
    if (step_ > 0) return;
    tile_zero<ODD>();
    tile_zero<ODD + 2>();
  }
  template <int ODD, int T>
  POSATTN_INLINE void terms() {
    constexpr int STEP = T / 6, TERM = T % 6;
    if constexpr (TERM < Terms<PARTS>::n) {
      const Job& job = jobs_[at_];
      if (STEP == 0 || step_ + 1 < job.steps) column_term<ODD, TERM>(job, step_ + STEP);
    }
  }
  template <int ODD>
  POSATTN_INLINE void all_terms() {
    terms<ODD, 0>(), terms<ODD, 1>(), terms<ODD, 2>(), terms<ODD, 3>(), terms<ODD, 4>(), terms<ODD, 5>();
    terms<ODD, 6>(), terms<ODD, 7>(), terms<ODD, 8>(), terms<ODD, 9>(), terms<ODD, 10>(), terms<ODD, 11>();
  }
  template <int ODD, int T>
  POSATTN_INLINE void column_term(const Job& job, int64_t step) {
    using Term = Terms<PARTS>;
    constexpr int of_a = Term::a[T], of_b = Term::b[T];
    constexpr bool new_a = T == 0 || of_a != Term::a[T ? T - 1 : 0], new_b = T == 0 || of_b != Term::b[T ? T - 1 : 0];
    constexpr int B = 6 + T % 2;
    if constexpr (new_b) tile_load<B>(job.b.tile(step, column_ + ODD, of_b), job.b.row);
    (void)B;
    if constexpr (new_a) tile_load<4>(job.a.tile(step, 0, of_a), job.a.row);
    tile_dot<ODD, 4, b_tile(T)>();
    if constexpr (new_a) tile_load<5>(job.a.tile(step, 1, of_a), job.a.row);
    tile_dot<ODD + 2, 5, b_tile(T)>();
  }
  // The tile that holds term T's part of B: it was loaded for the first term of a run that shares it.
  static constexpr int b_tile(int t) {
    int first = t;
    while (first > 0 && Terms<PARTS>::b[first - 1] == Terms<PARTS>::b[t]) --first;
    return 6 + first % 2;
  }
  template <int ODD>
  POSATTN_INLINE void end_column() {
    const Job& job = jobs_[at_];
    if (step_ + 2 >= job.steps) done_[ODD] = job.c + (column_ + ODD) * TILE;
    if constexpr (ODD == 1) {
      if ((step_ += 2) < job.steps) return;
      step_ = 0, column_ += 2;
      if (column_ == 4) column_ = 0, ++at_;
    }
  }
  template <int ODD, int ROW>
  POSATTN_INLINE void store_column() {
    if (!done_[ODD]) return;
    tile_store<ODD + 2 * ROW>(done_[ODD] + ROW * TILE * 4 * TILE, 4 * TILE * 4);
    if constexpr (ROW == 1) done_[ODD] = nullptr;
  }

  Job jobs_[2];
  float* done_[2] = {};  // where the sums of columns belong that are complete
  int64_t n_ = 0, at_ = 0, column_ = 0, step_ = 0;
};

}  // namespace posattn::POSATTN_ISA
