// Barriers join the vector clocks of the warps that meet, which is all the ordering between warps that there is.
#include "barriers.h"

#include <algorithm>

namespace ptxsim {

void Barriers::arrive(Warp& warp, const Instruction& in) {
  const auto operand = [&](size_t i) {
    return static_cast<int>(warp.lanes(in.operands[i].reg)[__builtin_ctz(warp.live)]);
  };
  const int id = in.operands.empty() ? 0 : operand(0);
  const int threads = in.operands.size() > 1 ? operand(1) : 0;
  if (threads % kLanes) throw Fault("barrier count is no multiple of the warp size, " + in.where());
  Barrier& barrier = barriers_[id];
  if (id < 0 || id > 15) throw Fault("barrier " + std::to_string(id) + " does not exist, " + in.where());
  if (barrier.arrived && barrier.needed != threads / kLanes) {
    throw Fault("barrier " + std::to_string(id) + " with another number of threads than before, " + in.where());
  }
  barrier.needed = threads / kLanes;
  join(barrier.clock, warp.clock);
  barrier.seen.join(warp.seen);
  ++barrier.arrived;
  ++warp.clock[static_cast<size_t>(warp.id)];
  warp.synchronise_lanes();  // a block barrier orders the lanes of its warps too
  if (in.control == Control::BarrierSync) {
    barrier.waiting.push_back(warp.id);
    warp.state = Warp::State::AtBarrier;
  }
}

bool Barriers::release(std::vector<Warp>& warps) {
  const auto live =
      std::count_if(warps.begin(), warps.end(), [](const Warp& w) { return w.state != Warp::State::Done; });
  bool any = false;
  for (auto& [id, barrier] : barriers_) {
    const int needed = barrier.needed ? barrier.needed : static_cast<int>(live);
    if (barrier.waiting.empty() || barrier.arrived < needed) continue;
    for (const int waiter : barrier.waiting) {
      Warp& warp = warps[static_cast<size_t>(waiter)];
      for (size_t i = 0; i < warp.clock.size(); ++i) {
        if (static_cast<int>(i) != waiter) warp.clock[i] = std::max(warp.clock[i], barrier.clock[i]);
      }
      warp.seen.join(barrier.seen);
      warp.state = Warp::State::Running;
    }
    barrier = Barrier{};
    any = true;
  }
  return any;
}

}  // namespace ptxsim
