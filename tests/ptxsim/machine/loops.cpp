// A loop is what lies between a backward branch and its target, which holds for the code that compilers lay out.
#include "loops.h"

#include <algorithm>

namespace ptxsim {

bool in_main_loop(const Program& program, size_t index) {
  size_t first = 0, last = program.code.size();
  bool found = false;
  for (const Instruction& in : program.code) {
    if (in.control != Control::Branch || in.target > in.index) continue;
    const auto head = static_cast<size_t>(in.target), tail = static_cast<size_t>(in.index);
    if (index < head || index > tail || tail - head >= last - first) continue;
    first = head;
    last = tail;
    found = true;
  }
  const auto at = [&](size_t i) { return program.code.begin() + static_cast<std::ptrdiff_t>(i); };
  return found && std::any_of(at(first), at(last), [](const Instruction& in) {
           return in.name == "mma" || in.name == "wgmma.mma_async" || in.name == "tcgen05.mma";
         });
}

}  // namespace ptxsim
