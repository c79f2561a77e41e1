// Tiles of a [T, USED] tensor from global to shared memory by cp.async, zeros in rows past the end and columns past
// USED.
#pragma once
#include "common/element.h"
#include "common/swizzle.h"

namespace posattn {

// Walks a tensor down its tokens, ROWS at a time, by all THREADS threads. USED is a multiple of 8.
template <int DIM, int USED, int ROWS, int THREADS, typename Layout = Tile<DIM>>
struct Loader {
  static constexpr int LANES = Layout::PERIOD;  // threads that share a row
  static constexpr int STEP = THREADS / LANES;  // rows that one pass covers
  static constexpr int COLUMNS = Layout::CHUNKS / LANES;
  static_assert(USED % 8 == 0 && USED <= DIM && STEP % 8 == 0);

  const Element* from;
  int64_t step;
  uint32_t to;
  int row;
  int column;

  // `first` is the tensor's first row; tiles start at row `row0` of it.
  __device__ __forceinline__ Loader(const Element* first, int64_t token_stride, int row0, uint32_t tile, int thread) {
    row = thread / LANES;
    column = thread % LANES;
    from = first + (row0 + row) * token_stride + column * 8;
    step = STEP * token_stride;
    to = tile + Layout::offset(row, column);
  }

  // Starts the copies of the next tile into the buffer `base` bytes further; `rows` of it are inside the tensor.
  __device__ __forceinline__ void next(uint32_t base, int rows) {
#pragma unroll
    for (int r = 0; r < ROWS; r += STEP) {
      if (ROWS % STEP == 0 || row + r < ROWS) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          const bool inside = row + r < rows && (USED == DIM || (column + c * LANES) * 8 < USED);
          const uint32_t place = to + base + r * Layout::PITCH + c * Layout::PERIOD_STEP;
          ptx::cp_async_16(place, from + c * (LANES * 8), inside ? 16 : 0);
        }
      }
      from += step;
    }
    if constexpr (ROWS % STEP != 0) from += (ROWS % STEP - STEP) * (step / STEP);
  }
};

}  // namespace posattn
