// Branches, exits and block barriers, which the scheduler runs, and instructions that change nothing here.
#include "handlers.h"

namespace ptxsim {
namespace {

template <Control control>
Handler select_control(Instruction& in) {
  in.control = control;
  return nullptr;
}

// Fences between blocks matter; inside one, warps run one after another. Shared memory races are found by barriers
// alone.
void fence(Block& block, Warp& warp, const Instruction&, LaneMask) {
  block.global.fence(warp);
}
Handler select_fence(Instruction& in) {
  return in.has("cta") ? nullptr : fence;
}

// Caches and clocks do not exist.
Handler select_nothing(Instruction&) {
  return nullptr;
}

void trap(Block&, Warp&, const Instruction& in, LaneMask) {
  throw Fault("trap, " + in.where());
}
Handler select_trap(Instruction&) {
  return trap;
}

// Registers move between warpgroups, which no result shows; but their number must be one that exists.
void set_registers(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  if (mask != warp.live) throw Fault("setmaxnreg that some live lanes of the warp do not reach, " + in.where());
  const uint64_t count = operand(warp, in, 0)[0];
  if (count < 24 || count > 256 || count % 8) {
    throw Fault("setmaxnreg takes 24 to 256 registers in steps of 8, " + in.where());
  }
}
Handler select_set_registers(Instruction& in) {
  require_operands(in, 1);
  return set_registers;
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
      {"fence", "sc acq_rel cta gpu sys cluster", select_fence, false},
      {"membar", "cta gl sys", select_fence, false},
      {"nanosleep", "", select_nothing, false},
      {"prefetch", "global param L1 L2 cache tensormap", select_nothing, false},
      {"griddepcontrol", "wait launch_dependents", select_nothing, false},
      {"setmaxnreg", "inc dec sync aligned", select_set_registers, false},
      {"createpolicy", "fractional range cache global", select_nothing},
      {"trap", "", select_trap, false},
  };
  return rows;
}

}  // namespace ptxsim
