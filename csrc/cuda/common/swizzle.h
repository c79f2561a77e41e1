// Tiles [rows, DIM] of 16-bit elements in shared memory, laid out so that ldmatrix, cp.async and the stores of
// fragments meet no bank conflict.
//
// A row is DIM / 8 chunks of 16 bytes, and eight chunks fill the 32 banks. ldmatrix reads one chunk column of eight
// rows: chunk c of row r is kept at column c ^ (r mod 8), which spreads it over all eight bank groups. Where a row is
// an odd number of half lines (DIM = 32, 96), neighbouring rows already differ by half a line, so two bits do: c ^ (r /
// 2 mod 4).
#pragma once
#include "ptx/ptx.h"

namespace posattn {

template <int DIM>
struct Tile {
  static_assert(DIM % 32 == 0);
  static constexpr int CHUNKS = DIM / 8;
  static constexpr int PITCH = DIM * 2;                   // bytes of a row
  static constexpr int PERIOD = CHUNKS % 8 == 0 ? 8 : 4;  // chunks that a swizzle permutes among themselves
  static constexpr int PERIOD_STEP = PERIOD * 16;         // bytes from one such run of chunks to the next

  __device__ static __forceinline__ int twist(int row) { return PERIOD == 8 ? row & 7 : (row >> 1) & 3; }

  // Where chunk `chunk` of row `row` begins, in bytes.
  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    return row * PITCH + ((chunk ^ twist(row)) << 4);
  }

  // Where element `column` of row `row` is.
  __device__ static __forceinline__ uint32_t element(int row, int column) {
    return offset(row, column >> 3) + (column & 7) * 2;
  }

  __host__ __device__ static constexpr int bytes(int rows) { return rows * PITCH; }
};

// The same in panels of 64 columns, one after another, [DIM / 64][ROWS][64]: the layout that wgmma reads.
template <int DIM, int ROWS>
struct Panels {
  static_assert(DIM % 64 == 0 && ROWS % 8 == 0);
  static constexpr int CHUNKS = DIM / 8;
  static constexpr int PITCH = 128;
  static constexpr int PERIOD = 8;
  static constexpr int PERIOD_STEP = ROWS * PITCH;

  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    return chunk / 8 * PERIOD_STEP + row * PITCH + ((chunk % 8 ^ (row & 7)) << 4);
  }

  __device__ static __forceinline__ uint32_t element(int row, int column) {
    return offset(row, column >> 3) + (column & 7) * 2;
  }
};

// The addresses one lane gives to ldmatrix for 16 columns after 16 columns of a tile: its row (less a multiple of 8)
// and its chunk of the two are fixed, so few sums are left for the loop.
template <int DIM>
struct Reader {
  static constexpr int STEPS = Tile<DIM>::PERIOD / 2;
  uint32_t offsets[STEPS];

  __device__ __forceinline__ Reader(uint32_t tile, int row, int chunk) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) offsets[k] = tile + Tile<DIM>::offset(row, 2 * k + chunk);
  }

  // For rows from `row` (a multiple of 8) on, columns 16 k .. 16 k + 15, in a tile `base` bytes further.
  __device__ __forceinline__ uint32_t at(uint32_t base, int row, int k) const {
    return offsets[k % STEPS] + base + row * Tile<DIM>::PITCH + k / STEPS * (STEPS * 32);
  }

  // A operand [16, 16]: rows of the tile are rows of A.
  __device__ static __forceinline__ Reader a_operand(uint32_t tile, int row0, int lane) {
    return Reader(tile, row0 + (lane & 15), lane >> 4);
  }

  // Two B operands [16, 8]: rows of the tile are columns of B, 16 of them, as for K in Q K^T.
  __device__ static __forceinline__ Reader b_operand(uint32_t tile, int lane) {
    return Reader(tile, (lane & 7) + (lane >> 4 << 3), (lane >> 3) & 1);
  }

  // Two B operands [16, 8] read with .trans: rows of the tile are rows of B, 16 columns of them, as for V in P V.
  __device__ static __forceinline__ Reader b_operand_trans(uint32_t tile, int lane) {
    return Reader(tile, lane & 15, lane >> 4);
  }
};

}  // namespace posattn
