// Sums in global memory to which blocks and warps add in any order.
//
// ORDERED: the sums are integers, in units so small that nothing is lost, and the order does not matter.
#pragma once
#include "ptx/ptx.h"

namespace posattn {

struct GlobalSums {
  void* sums;          // float32, or int64 if ORDERED
  const float* units;  // how many of them make 1, if ORDERED

  __device__ __forceinline__ GlobalSums(void* sums, const float* units) : sums(sums), units(units) {}

  __device__ __forceinline__ void add(int64_t at, float x) const {
    if constexpr (ORDERED) {
      ptx::red_add(static_cast<int64_t*>(sums) + at, __float2ll_rn(x * *units));
    } else {
      ptx::red_add(static_cast<float*>(sums) + at, x);
    }
  }
};

}  // namespace posattn
