// What the kernels that look for reach share: the greatest number of a block's threads.
#pragma once
#include "common/mask.h"
#include "ptx/ptx.h"

namespace posattn {

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
