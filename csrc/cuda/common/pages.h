// Where tokens lie whose keys and values are in pages: [pages, H, PAGE, dim], found by a block table.
#pragma once
#include "params.h"

namespace posattn {

// The tokens of one sequence. An entry that names no page of the pool, which nobody could look for, reads its first or
// its last.
template <int PAGE>
struct PagedTokens {
  const int32_t* table;
  int32_t last;
  Strides strides;

  __device__ __forceinline__ PagedTokens(const PageParams& pages, const Strides& strides, int sequence)
      : table(pages.table + sequence * pages.entries), last(pages.last), strides(strides) {}

  // In elements from the pool's first row of a head on.
  __device__ __forceinline__ int64_t offset(int token) const {
    const int page = min(max(table[token / PAGE], 0), last);
    return page * strides.batch + token % PAGE * strides.token;
  }
};

}  // namespace posattn
