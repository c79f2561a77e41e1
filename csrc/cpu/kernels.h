// What each instruction set's object file offers.
#pragma once

#include "problem.h"

namespace posattn {

struct Kernels {
  const char* name;
  bool bf16_dot;
  void (*forward)(const Problem&);
  void (*backward)(const Problem&);
  void (*append)(const Append&);
  double (*probe_flops)(const char* kind, int64_t iterations);  // operations done, or 0 for an unknown kind
  double (*probe_read)(const float* data, int64_t count);
};

}  // namespace posattn
