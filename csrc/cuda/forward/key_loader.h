// Tiles of the keys, or values, of one sequence and key head, side by side or in pages.
#pragma once
#include "common/load.h"
#include "common/pages.h"

namespace posattn {

// Loader's walk where tokens lie in pages. A page that holds every tile of its whole is looked up once a tile, others
// once a row.
template <int DIM, int USED, int ROWS, int THREADS, int PAGE, typename Layout>
struct PagedLoader {
  using Rows = Loader<DIM, USED, ROWS, THREADS, Layout>;
  static constexpr bool WHOLE = PAGE % ROWS == 0 && !HAS_K_STARTS;

  PagedTokens<PAGE> tokens;
  const Element* first;  // of the head, from this thread's first chunk on
  uint32_t to;
  int row;
  int column;
  int token;  // the next tile's first

  __device__ __forceinline__ PagedLoader(const Element* first_row, const PagedTokens<PAGE>& tokens, int token0,
                                         uint32_t tile, int thread)
      : tokens(tokens), row(thread / Rows::LANES), column(thread % Rows::LANES), token(token0) {
    first = first_row + column * 8;
    to = tile + Layout::offset(row, column);
  }

  // As Loader::next.
  __device__ __forceinline__ void next(uint32_t base, int rows) {
    int64_t tile = 0;
    if constexpr (WHOLE) tile = tokens.offset(token) + row * tokens.strides.token;
#pragma unroll
    for (int r = 0; r < ROWS; r += Rows::STEP) {
      if (ROWS % Rows::STEP == 0 || row + r < ROWS) {
        const bool there = row + r < rows;
        const Element* from = first;
        if (there) from += WHOLE ? tile + r * tokens.strides.token : tokens.offset(token + row + r);
#pragma unroll
        for (int c = 0; c < Rows::COLUMNS; ++c) {
          const bool inside = there && (USED == DIM || (column + c * Rows::LANES) * 8 < USED);
          const uint32_t place = to + base + r * Layout::PITCH + c * Layout::PERIOD_STEP;
          ptx::cp_async_16(place, from + c * (Rows::LANES * 8), inside ? 16 : 0);
        }
      }
    }
    token += ROWS;
  }
};

// PAGE tokens a page, or 0 for keys side by side. Tiles start at token `token0`.
template <int DIM, int USED, int ROWS, int THREADS, int PAGE, typename Layout = Tile<DIM>>
struct KeyLoader : PagedLoader<DIM, USED, ROWS, THREADS, PAGE, Layout> {
  __device__ __forceinline__ KeyLoader(const void* pool, const Strides& strides, const PageParams& pages, int sequence,
                                       int head, int token0, uint32_t tile, int thread)
      : PagedLoader<DIM, USED, ROWS, THREADS, PAGE, Layout>(static_cast<const Element*>(pool) + head * strides.head,
                                                            PagedTokens<PAGE>(pages, strides, sequence), token0, tile,
                                                            thread) {}
};

template <int DIM, int USED, int ROWS, int THREADS, typename Layout>
struct KeyLoader<DIM, USED, ROWS, THREADS, 0, Layout> : Loader<DIM, USED, ROWS, THREADS, Layout> {
  __device__ __forceinline__ KeyLoader(const void* tensor, const Strides& strides, const PageParams&, int sequence,
                                       int head, int token0, uint32_t tile, int thread)
      : Loader<DIM, USED, ROWS, THREADS, Layout>(
            static_cast<const Element*>(tensor) + sequence * strides.batch + head * strides.head, strides.token, token0,
            tile, thread) {}
};

}  // namespace posattn
