// Rotary embedding of a tile in shared memory, in place: pair c of a row rotates by the angle whose cosine and sine are
// given. Pairs are columns (2c, 2c + 1) if INTERLEAVED, else (c, c + HALF).
#pragma once
#include "common/element.h"
#include "common/swizzle.h"
#include "params.h"

namespace posattn {

// The angles of row r are those of token token_of(r); rows from `rows` on are left alone.
template <typename Layout, int ROWS, int THREADS, typename TokenOf>
__device__ __forceinline__ void rotate_tile(unsigned char* tile, const float* cos, const float* sin, int rows,
                                            int thread, TokenOf token_of) {
  constexpr int BOTH = HALF % 2 == 0 && !INTERLEAVED ? 2 : 1;  // neighbouring pairs that one thread rotates at once
  constexpr int WORK = HALF / BOTH;
  for (int x = thread; x < ROWS * WORK; x += THREADS) {
    const int row = x / WORK, c = x % WORK * BOTH;
    if (row >= rows) break;
    const float* row_cos = cos + static_cast<int64_t>(token_of(row)) * HALF + c;
    const float* row_sin = sin + static_cast<int64_t>(token_of(row)) * HALF + c;
    if constexpr (BOTH == 2) {
      uint32_t& first = *reinterpret_cast<uint32_t*>(tile + Layout::element(row, c));
      uint32_t& second = *reinterpret_cast<uint32_t*>(tile + Layout::element(row, c + HALF));
      const float x0 = low_float(first), x1 = high_float(first), y0 = low_float(second), y1 = high_float(second);
      first = pack(x0 * row_cos[0] - y0 * row_sin[0], x1 * row_cos[1] - y1 * row_sin[1]);
      second = pack(y0 * row_cos[0] + x0 * row_sin[0], y1 * row_cos[1] + x1 * row_sin[1]);
    } else {
      Element& first = *reinterpret_cast<Element*>(tile + Layout::element(row, INTERLEAVED ? 2 * c : c));
      Element& second = *reinterpret_cast<Element*>(tile + Layout::element(row, INTERLEAVED ? 2 * c + 1 : c + HALF));
      const float x0 = to_float(first), y0 = to_float(second);
      first = from_float(x0 * row_cos[0] - y0 * row_sin[0]);
      second = from_float(y0 * row_cos[0] + x0 * row_sin[0]);
    }
  }
}

// The same where angles point at the tile's first row.
template <typename Layout, int ROWS, int THREADS>
__device__ __forceinline__ void rotate_tile(unsigned char* tile, const float* cos, const float* sin, int rows,
                                            int thread) {
  rotate_tile<Layout, ROWS, THREADS>(tile, cos, sin, rows, thread, [](int row) { return row; });
}

}  // namespace posattn
