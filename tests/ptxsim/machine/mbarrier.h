// mbarrier objects: arrivals, expected bytes, phases, and the bulk copies that report to them.
//
// A phase orders memory: whoever sees it complete is behind everything that arrived at it, and behind the bytes of the
// bulk copies that it counted. Such bytes are written by no warp, so each object has an entry of its own in the vector
// clocks, after those of the warps, which ticks when its copies land.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "shared_memory.h"
#include "warp.h"

namespace ptxsim {

// 16 bytes on their way to shared memory.
struct BulkPiece {
  uint32_t destination;
  std::array<uint8_t, 16> data;
};

struct Mbarrier {
  int slot = 0;           // its entry in the vector clocks
  uint32_t count = 0;     // arrivals of a phase
  uint32_t pending = 0;   // still to come in this phase
  int64_t bytes = 0;      // expected less completed; below zero while copies are ahead of their expectation
  uint64_t phase = 0;     // complete ones
  uint32_t landings = 0;  // the clock of its slot
  int commits = 0;        // of tcgen05, that have not arrived yet
  int commit_polls = 0;   // waits that found them missing
  int polls = 0;          // waits that found nothing missing but copies on their way
  std::vector<BulkPiece> on_their_way;
  std::vector<uint32_t> arrived;    // clocks of this phase's arrivals, joined
  std::vector<uint32_t> completed;  // of all complete phases
  Knowledge arrived_seen, completed_seen;
  int initialiser = 0;  // the warp that made it, when, and how many fences it had done
  uint32_t made_at = 0, fences = 0;
};

class Mbarriers {
public:
  static constexpr size_t kMost = 64;  // live at a time in a block

  void reset(size_t warps) {
    warps_ = warps;
    objects_.clear();
  }
  void init(Warp& warp, const Instruction& in, uint64_t address, uint64_t count);
  void invalidate(const Instruction& in, uint64_t address);
  // The object at an address; a Fault if there is none, a finding if the warp may be ahead of its initialisation.
  Mbarrier& find(Warp& warp, const Instruction& in, uint64_t address, Report& report);

  // Counts arrivals in with what the warp has done so far, and returns the phase that they belong to.
  uint64_t arrive(Warp& warp, const Instruction& in, Mbarrier& object, uint64_t count);
  // The same of a tcgen05.commit, whose thread had done what `clock` says when it issued it.
  void arrive(const Instruction& in, Mbarrier& object, const std::vector<uint32_t>& clock);
  void expect(Mbarrier& object, int64_t bytes) { object.bytes += bytes; }
  void complete(Mbarrier& object, int64_t bytes);
  // Whether the wait is over. One that only lacks bytes on their way lets them land, at the second time of asking.
  template <class Done>
  bool test(Mbarrier& object, SharedMemory& shared, Done done) {
    if (done(object.phase)) return true;
    if (object.pending == 0 && object.bytes == 16 * static_cast<int64_t>(object.on_their_way.size()) &&
        object.polls++ > 0)
      land(object, shared);
    return done(object.phase);
  }
  // Writes the bytes that are on their way.
  void land(Mbarrier& object, SharedMemory& shared);

  // Copies that nobody waited for.
  size_t unwaited() const;
  // What the objects wait for, for the report of a deadlock.
  std::string describe() const;

private:
  void finish_phase(Mbarrier& object);

  std::map<uint64_t, Mbarrier> objects_;
  size_t warps_ = 0;
};

}  // namespace ptxsim
