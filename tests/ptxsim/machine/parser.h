// PTX text to a decoded Program.
#pragma once

#include <string>

#include "program.h"

namespace ptxsim {

// Parses the entry named `entry`, or the first one if `entry` is empty. Throws Unsupported with the line.
Program parse(const std::string& ptx, const std::string& entry);

}  // namespace ptxsim
