// What the kernels that look for reach share: sums over a block's threads, and the largest norms of rows.
//
// The argument is the one of kernels/attention/reach.py: keys whose logits lie far enough below the nearest visible
// one's weigh, all together, less than 2^-40 of a row.
#pragma once
#include "common/element.h"
#include "common/mask.h"

namespace posattn {

constexpr float REACH_NATS = 27.7258872f;  // 2^40
// What rounding the operands (rotated ones, say) may add to their norms.
constexpr float NORM_SLACK = 1.01f;

__device__ __forceinline__ int shfl_bfly(int x, int mask) {
  return static_cast<int>(ptx::shfl_bfly(static_cast<uint32_t>(x), mask));
}
__device__ __forceinline__ float shfl_bfly(float x, int mask) {
  return ptx::shfl_bfly(x, mask);
}

// The greatest of all threads' numbers, to all of them. `scratch` holds one for each warp.
template <typename Number>
__device__ __forceinline__ Number greatest(Number x, Number* scratch) {
#pragma unroll
  for (int mask = WARP / 2; mask; mask /= 2) x = max(x, shfl_bfly(x, mask));
  ptx::bar_sync();
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
  ptx::bar_sync();
  x = scratch[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / WARP; ++warp) x = max(x, scratch[warp]);
  return x;
}

}  // namespace posattn
