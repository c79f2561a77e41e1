// Which blocks of queries a block of keys walks in the backward pass.
#pragma once
#include "common/mask.h"

namespace posattn {

// The blocks of queries that see keys first .. last: [lo, hi), all of whose queries see all of the keys in
// [full_lo, full_hi). Queries past the end have weight zero and need no mask.
struct QuerySpans {
  int lo = 0;
  int full_lo = 0;
  int full_hi;
  int hi;

  __device__ __forceinline__ QuerySpans(const Sequence& s, const MaskParams& mask, int first, int last) {
    hi = full_hi = ceil_div(s.q_len, BLOCK_M);
    if constexpr (HAS_RIGHT) {
      lo = max(first - s.offset() - mask.right, 0) / BLOCK_M;
      full_lo = ceil_div(max(last - s.offset() - mask.right, 0), BLOCK_M);
    }
    if constexpr (HAS_LEFT) {
      hi = min(hi, ceil_div(max(last - s.offset() + mask.left + 1, 0), BLOCK_M));
      full_hi = min(full_hi, max(first - s.offset() + mask.left + 1, 0) / BLOCK_M);
    }
    if (last >= s.k_len) full_lo = hi;
  }

  __device__ __forceinline__ bool border(int block) const { return block < full_lo || block >= full_hi; }
};

// A block of queries of one of the heads that share the key head.
struct Cursor {
  int head;
  int block;
  uint32_t row;  // its first padded row, of all heads; their accumulators fit in memory, so their number fits here
};

}  // namespace posattn
