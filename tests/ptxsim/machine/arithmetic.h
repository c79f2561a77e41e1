// What the integer and the floating-point halves of the arithmetic opcodes share.
#pragma once

#include "handlers.h"

namespace ptxsim {

enum class Arithmetic { Add, Sub, Mul, Min, Max };

Handler select_float_binary(Instruction& in, Arithmetic op);
Handler select_float_extreme(Instruction& in, Arithmetic op);  // of three
Handler select_float_fma(Instruction& in);
Handler select_float_division(Instruction& in);

}  // namespace ptxsim
