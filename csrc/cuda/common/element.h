// The 16-bit element type of a specialisation: bfloat16 if BF16, else float16. Kept as its bits; arithmetic is float32.
#pragma once
#include "ptx/ptx.h"

namespace posattn {

using Element = uint16_t;

__device__ __forceinline__ float bf16_to_float(uint16_t x) {
  return __uint_as_float(static_cast<uint32_t>(x) << 16);
}

__device__ __forceinline__ float to_float(Element x) {
  if constexpr (BF16) {
    return bf16_to_float(x);
  } else {
    return ptx::cvt_f32_f16(x);
  }
}

// Two elements in a register, the one at the lower address in the lower half.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (BF16) {
    return ptx::cvt_bf16x2(low, high);
  } else {
    return ptx::cvt_f16x2(low, high);
  }
}

__device__ __forceinline__ float low_float(uint32_t pair) {
  return to_float(static_cast<Element>(pair));
}
__device__ __forceinline__ float high_float(uint32_t pair) {
  return to_float(static_cast<Element>(pair >> 16));
}
__device__ __forceinline__ Element from_float(float x) {
  return static_cast<Element>(pack(x, 0.0f));
}

// d [16, 8] += a [16, 16] b [16, 8]; ptx/mma.h has the fragments.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (BF16) {
    ptx::mma_m16n8k16_bf16(d, a, b0, b1);
  } else {
    ptx::mma_m16n8k16_f16(d, a, b0, b1);
  }
}

}  // namespace posattn
