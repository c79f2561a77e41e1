// Operands given for each pair of a query and a key: a dense bias of any floating type, a boolean mask.
#pragma once
#include "common/element.h"
#include "common/mask.h"

namespace posattn {

enum DenseType { NO_DENSE = 0, DENSE_FLOAT32 = 1, DENSE_FLOAT16 = 2, DENSE_BFLOAT16 = 3 };

__device__ __forceinline__ int64_t pair_offset(const PairStrides& strides, int64_t b, int64_t h, int64_t i, int64_t j) {
  return b * strides.batch + h * strides.head + i * strides.query + j * strides.key;
}

__device__ __forceinline__ float dense_at(const void* bias, int64_t at) {
  if constexpr (DENSE == DENSE_FLOAT32) {
    return static_cast<const float*>(bias)[at];
  } else if constexpr (DENSE == DENSE_FLOAT16) {
    return ptx::cvt_f32_f16(static_cast<const uint16_t*>(bias)[at]);
  } else {
    return bf16_to_float(static_cast<const uint16_t*>(bias)[at]);
  }
}

}  // namespace posattn
