// What a launch did: findings, each with its first place, and counts.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace ptxsim {

enum class Finding : uint8_t {
  SharedRace,           // two warps, one of them writing, with no barrier between
  IntraWarpRace,        // lanes of one warp: a read of another lane's write with no bar.warp.sync between
  InFlight,             // bytes of a cp.async or operands of a wgmma touched before its wait
  UninitialisedShared,  // a read of shared memory that nothing wrote
  ProxyFence,           // wgmma reads generic writes that no fence.proxy.async published
  WgmmaPending,         // an accumulator touched between wgmma and its wait_group
  WgmmaFence,           // wgmma uses registers written since the last wgmma.fence
  GlobalRace,           // two blocks or two warps at one global address, one of them writing, unordered
  TensorRace,           // tensor memory: a load or store of one warp, touched by another with no barrier between
  TensorInFlight,       // touched before the mbarrier of a tcgen05.commit says that its product is complete
  TensorWait,           // touched before tcgen05.wait::st, overwritten or its register read before wait::ld
  TensorFence,          // no tcgen05.fence on a side of the synchronisation
  TensorAllocation,     // not freed when the block ends
  UninitialisedTensor,  // read, or added to, before anything was written
};
inline constexpr int kFindings = 14;
const char* name_of(Finding finding);

struct Report {
  struct Seen {
    uint64_t count = 0;
    std::string first;
  };
  struct Conflict {
    uint64_t requests = 0;
    uint64_t wavefronts = 0;
    uint64_t ideal = 0;
  };
  std::array<Seen, kFindings> findings;
  uint64_t warp_instructions = 0;
  uint64_t diverged_steps = 0;
  uint64_t shared_requests = 0, shared_wavefronts = 0, shared_ideal_wavefronts = 0;
  uint64_t global_requests = 0, global_sectors = 0, global_ideal_sectors = 0;
  uint64_t unwaited_copies = 0;     // cp.async that no wait covered when their block ended
  std::vector<uint64_t> opcodes;    // executed, by Program::statistic_names
  std::vector<uint64_t> executed;   // by instruction, in some lane
  std::vector<Conflict> conflicts;  // by instruction

  // `place` is called for the first one only: making the text costs more than finding the fault.
  template <class Place>
  void add(Finding finding, Place place) {
    Seen& seen = findings[static_cast<size_t>(finding)];
    if (seen.count++ == 0) seen.first = place();
  }
};

// How a launch runs and what it checks.
struct Options {
  bool race = true;            // shared-memory races
  bool global_race = true;     // global-memory races, between blocks and inside one
  bool late = true;            // asynchronous copies and wgmma take effect at their wait instead of at once
  bool poison = true;          // shared memory starts as NaN patterns instead of zeros
  bool stats = true;           // bank conflicts and sectors
  bool perturb = false;        // approximate functions err by up to 2 ulp, tensor cores truncate
  bool reverse = false;        // blocks run from the last to the first
  bool tensor_strict = false;  // looks for what the ISA asks of tcgen05 and Triton's kernels do without
  int tensor_core = 0;         // 0: mma accumulates in float64; 80 or 90: as that architecture does, see tensor_core.h
  uint64_t limit = 0;          // warp instructions a launch may run; 0: no limit
  uint64_t seed = 1;           // the order in which warps run
};

}  // namespace ptxsim
