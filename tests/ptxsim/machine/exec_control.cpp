// Branches, exits and block barriers, which the scheduler runs, and instructions that change nothing here.
#include "handlers.h"

namespace ptxsim {
namespace {

template <Control control>
Handler select_control(Instruction& in) {
  in.control = control;
  return nullptr;
}

// Memory fences order accesses, which one block at a time does by itself; caches and clocks do not exist.
Handler select_nothing(Instruction&) {
  return nullptr;
}

void trap(Block&, Warp&, const Instruction& in, LaneMask) {
  throw Fault("trap, " + in.where());
}
Handler select_trap(Instruction&) {
  return trap;
}

}  // namespace

const OpcodeRows& control_opcodes() {
  static const OpcodeRows rows = {
      {"bra", "uni", select_control<Control::Branch>, false},
      {"ret", "uni", select_control<Control::Exit>, false},
      {"exit", "", select_control<Control::Exit>, false},
      {"bar.sync", "", select_control<Control::BarrierSync>, false},
      {"bar.cta.sync", "", select_control<Control::BarrierSync>, false},
      {"barrier.sync", "aligned", select_control<Control::BarrierSync>, false},
      {"barrier.cta.sync", "aligned", select_control<Control::BarrierSync>, false},
      {"bar.arrive", "", select_control<Control::BarrierArrive>, false},
      {"barrier.cta.arrive", "aligned", select_control<Control::BarrierArrive>, false},
      {"fence", "sc acq_rel acquire release cta gpu sys cluster", select_nothing, false},
      {"membar", "cta gl sys", select_nothing, false},
      {"nanosleep", "", select_nothing, false},
      {"prefetch", "global L1 L2 cache", select_nothing, false},
      {"griddepcontrol", "wait launch_dependents", select_nothing, false},
      {"setmaxnreg", "inc dec sync aligned", select_nothing, false},
      {"createpolicy", "fractional range cache global", select_nothing},
      {"trap", "", select_trap, false},
  };
  return rows;
}

}  // namespace ptxsim
