// Softcap of a logit.
#pragma once
#include "ptx/ptx.h"

namespace posattn {

// cap * tanh(x / cap). The error of this form is absolute, under 2^-22 of cap, as a logit's should be.
__device__ __forceinline__ float capped(float x, float cap) {
  const float e = ptx::ex2_approx(x * (2.0f * LOG2E / cap));
  return cap - 2.0f * cap * ptx::rcp_approx(1.0f + e);
}

}  // namespace posattn
