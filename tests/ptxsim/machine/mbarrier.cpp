// The life of an mbarrier: phases end when no arrival and no byte is missing.
#include "mbarrier.h"

#include <algorithm>

namespace ptxsim {
namespace {

constexpr uint64_t kMaxCount = (1 << 20) - 1;

std::string at(uint64_t address) {
  return "the mbarrier at shared+" + std::to_string(address);
}

}  // namespace

void Mbarriers::init(Warp& warp, const Instruction& in, uint64_t address, uint64_t count) {
  if (count == 0 || count > kMaxCount) throw Fault("mbarrier count " + std::to_string(count) + ", " + in.where());
  const auto before = objects_.find(address);
  if (before != objects_.end() && before->second.commits) {
    throw Fault(at(address) + " still awaits a tcgen05.commit, " + in.where());
  }
  std::vector<bool> taken(kMost);
  for (const auto& [place, object] : objects_) taken[static_cast<size_t>(object.slot)] = place != address;
  const auto free = std::find(taken.begin(), taken.end(), false);
  if (free == taken.end()) throw Unsupported("more than " + std::to_string(kMost) + " mbarriers in a block");
  Mbarrier object;
  object.slot = static_cast<int>(free - taken.begin());
  object.count = object.pending = static_cast<uint32_t>(count);
  object.landings = warp.clock[warps_ + static_cast<size_t>(object.slot)];
  object.initialiser = warp.id;
  object.made_at = warp.clock[static_cast<size_t>(warp.id)];
  object.fences = warp.proxy_fences + warp.mbarrier_fences;
  objects_[address] = object;
}

void Mbarriers::invalidate(const Instruction& in, uint64_t address) {
  const auto found = objects_.find(address);
  if (found == objects_.end()) throw Fault(at(address) + " does not exist, " + in.where());
  if (found->second.commits) throw Fault(at(address) + " still awaits a tcgen05.commit, " + in.where());
  if (!found->second.on_their_way.empty()) throw Fault(at(address) + " still awaits bulk copies, " + in.where());
  objects_.erase(found);
}

Mbarrier& Mbarriers::find(Warp& warp, const Instruction& in, uint64_t address, Report& report) {
  const auto found = objects_.find(address);
  if (found == objects_.end()) throw Fault(at(address) + " was not initialised, " + in.where());
  Mbarrier& object = found->second;
  if (object.initialiser != warp.id && object.made_at > warp.clock[static_cast<size_t>(object.initialiser)]) {
    report.add(Finding::SharedRace, [&] {
      return at(address) + " used by warp " + std::to_string(warp.id) + " and initialised by warp " +
             std::to_string(object.initialiser) + " in no order, " + in.where();
    });
  }
  return object;
}

uint64_t Mbarriers::arrive(Warp& warp, const Instruction& in, Mbarrier& object, uint64_t count) {
  if (count > object.pending) {
    throw Fault("more arrivals in a phase than the mbarrier's count of " + std::to_string(object.count) + ", " +
                in.where());
  }
  const uint64_t phase = object.phase;
  join(object.arrived, warp.clock);
  object.arrived_seen.join(warp.seen);
  object.pending -= static_cast<uint32_t>(count);
  if (object.pending == 0 && object.bytes == 0) finish_phase(object);
  return phase;
}

void Mbarriers::arrive(const Instruction& in, Mbarrier& object, const std::vector<uint32_t>& clock) {
  if (object.pending == 0) throw Fault("more arrivals in a phase than the mbarrier's count, " + in.where());
  --object.commits;
  object.commit_polls = 0;
  join(object.arrived, clock);
  if (--object.pending == 0 && object.bytes == 0) finish_phase(object);
}

void Mbarriers::complete(Mbarrier& object, int64_t bytes) {
  object.bytes -= bytes;
  if (object.pending == 0 && object.bytes == 0) finish_phase(object);
}

void Mbarriers::finish_phase(Mbarrier& object) {
  ++object.phase;
  object.pending = object.count;
  object.polls = 0;
  join(object.completed, object.arrived);
  object.completed_seen.join(object.arrived_seen);
  uint32_t& seen = object.completed[warps_ + static_cast<size_t>(object.slot)];
  seen = std::max(seen, object.landings);
}

void Mbarriers::land(Mbarrier& object, SharedMemory& shared) {
  const int writer = static_cast<int>(warps_) + object.slot;
  ++object.landings;
  const auto pieces = std::move(object.on_their_way);
  object.on_their_way.clear();
  for (const BulkPiece& piece : pieces) shared.land(piece.destination, piece.data, writer, object.landings);
  complete(object, 16 * static_cast<int64_t>(pieces.size()));
}

size_t Mbarriers::unwaited() const {
  size_t pieces = 0;
  for (const auto& [address, object] : objects_) pieces += object.on_their_way.size();
  return pieces;
}

std::string Mbarriers::describe() const {
  std::string text;
  for (const auto& [address, object] : objects_) {
    text += "; " + at(address) + " lacks " + std::to_string(object.pending) + " arrivals and " +
            std::to_string(object.bytes) + " bytes (" + std::to_string(16 * object.on_their_way.size()) +
            " on their way) for phase " + std::to_string(object.phase);
  }
  return text;
}

}  // namespace ptxsim
