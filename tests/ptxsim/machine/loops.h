// Where the loops of a kernel lie, for reports.
#pragma once

#include "program.h"

namespace ptxsim {

// Whether the innermost loop around an instruction holds a tensor-core instruction.
bool in_main_loop(const Program& program, size_t index);

}  // namespace ptxsim
