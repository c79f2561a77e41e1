// Which segments of a profile a warp's logits can meet.
#pragma once
#include "backward/bands.h"

namespace posattn {

// The segments of the profile that a warp's logits can meet, from the lowest to the highest.
struct SegmentRange {
  int low = 0;
  int high = 0;

  SegmentRange() = default;

  __device__ __forceinline__ SegmentRange(const BiasParams& bias, float least, float most) {
#pragma unroll 1
    for (int m = 0; m < KNOTS; ++m) {
      const float knot = __ldg(bias.knots + m);
      low += knot < least;
      high += knot < most;
    }
  }
};

// The ranges of 32 parts of blocks of queries at a time, one for each lane, so that a step takes one shuffle.
//
// They come from the host's bounds of psi over the tile's distances and of the row scale over its rows: too wide at
// worst.
struct SegmentRanges {
  uint32_t packed = 0;

  // `at` is the warp's place in the first of them.
  __device__ __forceinline__ void find(const BiasParams& bias, const LogitPlace& at, int shift, int lane) {
    static_assert(8 * BANDS + 7 <= BOUNDS_BLOCK && WARP_QUERIES <= BOUNDS_BLOCK);
    const int i0 = at.i0 + lane * PART;
    const float2 psi = bounds(bias.psi_bounds, i0 + shift - at.j0 - (WARP_KEYS - 1), bias.psi_first, bias.psi_last);
    const float2 row = bounds(bias.row_bounds, i0 + shift, bias.row_first, bias.row_last);
    const float a = psi.x * row.x, b = psi.x * row.y, c = psi.y * row.x, d = psi.y * row.y;
    const SegmentRange range(bias, fminf(fminf(a, b), fminf(c, d)), fmaxf(fmaxf(a, b), fmaxf(c, d)));
    packed = range.low | range.high << 16;
  }

  __device__ __forceinline__ SegmentRange of(int part) const {
    const uint32_t both = ptx::shfl_idx(packed, part);
    SegmentRange range;
    range.low = both & 0xffff;
    range.high = both >> 16;
    return range;
  }

private:
  __device__ static __forceinline__ float2 bounds(const float* of, int index, int first, int last) {
    const int block = (min(max(index, first), last) - first) / BOUNDS_BLOCK;
    return __ldg(reinterpret_cast<const float2*>(of) + block);
  }
};

}  // namespace posattn
