// A launch: every block of a grid, one after another.
#pragma once

#include <vector>

#include "block.h"

namespace ptxsim {

struct TensorRange {
  uint64_t address;
  uint64_t bytes;
  bool writable;
};

struct Launch {
  Dim grid, threads;
  int dynamic_shared = 0;
  std::vector<uint8_t> params;
  std::vector<TensorRange> tensors;
};

Report run(const Program& program, Launch launch, const Options& options);

}  // namespace ptxsim
