// Integer types, and the two element types as what they are in memory. NVRTC has no <cstdint> of its own, and the
// kernels shall need no header package.
#pragma once

namespace posattn {

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

static_assert(sizeof(int32_t) == 4 && sizeof(int64_t) == 8 && sizeof(void*) == 8);

constexpr int WARP = 32;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
// Below every finite logit in base 2, so that a row with no key yet has weight exp2(-inf - LOWEST) = 0 and never NaN.
constexpr float LOWEST = -3.0e38f;

__device__ __forceinline__ float infinity() {
  return __int_as_float(0x7f800000);
}

__host__ __device__ constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

}  // namespace posattn
