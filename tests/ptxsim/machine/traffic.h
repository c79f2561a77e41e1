// The cost model of memory instructions: shared-memory wavefronts and global sectors. Counts only; nothing fails on it.
#pragma once

#include <cstdint>

#include "program.h"
#include "report.h"

namespace ptxsim {

void count_bank_conflicts(Report& report, const Instruction& in, const uint64_t* addresses, LaneMask mask, int bytes);
void count_sectors(Report& report, const uint64_t* addresses, LaneMask mask, int bytes);

}  // namespace ptxsim
