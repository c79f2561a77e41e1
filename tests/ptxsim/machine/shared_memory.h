// The shared memory of one block and the shadow that finds races on it.
//
// Each granule remembers its last writer (warp and vector-clock time) and when each warp last read it. An access is a
// race when an earlier conflicting one is not ordered before it by the clocks, which only barriers join.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "program.h"
#include "report.h"

namespace ptxsim {

// Who makes an access when it is no single lane: instructions of a whole warp, which read or write 16 bytes for a lane
// other than the ones that need or have them.
inline constexpr int kWarpReads = -1, kWarpWrites = -2;
// The async proxy on behalf of a warp. What it reads is held until a wait, so it needs no place among the readers.
inline constexpr int kAsyncReads = -3;

class SharedMemory {
public:
  enum class Access : uint8_t {
    Read,
    Write,
    Rewrite,  // a write of the value that is there already
    Atomic,
    AtomicRead,  // volatile, relaxed or acquiring: may meet atomics
    CopyIssue,   // cp.async: the bytes are in flight from here
    CopyLand,    // and readable by their thread from here
  };

  // `granule` is the shadow's unit in bytes: 1, 2 or 4.
  void reset(size_t bytes, int warps, int granule, const Options& options);

  uint8_t* data() { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }

  // Bounds, alignment and races of one lane's (or the whole warp's) access; returns its bytes.
  uint8_t* access(Warp& warp, const Instruction& in, uint64_t address, int bytes, Access kind, int lane,
                  Report& report);

  // An ordinary store. Compilers let several warps store the same replicated value, so a store that changes nothing
  // races with nothing.
  void store(Warp& warp, const Instruction& in, uint64_t address, const uint8_t* data, int bytes, int lane,
             Report& report);

  // wgmma and bulk copies read through the async proxy: generic writes must have been published by fence.proxy.async,
  // by the writer or by the reader after a barrier.
  void async_read(Warp& warp, const Instruction& in, uint64_t address, int bytes, const std::vector<Warp>& warps,
                  Report& report);
  // Bulk copies write through the async proxy too: bytes are in flight from here, and generic accesses to them must
  // have been fenced.
  void bulk_issue(Warp& warp, const Instruction& in, uint64_t address, const std::vector<Warp>& warps, Report& report);
  // 16 bytes of one arrive. `writer` counts on from the warps, see mbarrier.h.
  void land(uint64_t address, const std::array<uint8_t, 16>& data, int writer, uint32_t clock);
  // Between the issue of a wgmma (or of a bulk copy from here) and its wait nobody may write what it reads.
  void hold(uint64_t address, int bytes, int change);

private:
  struct Cell {
    uint32_t write_clock = 0;
    uint32_t fences = 0;      // the writer's proxy fences so far
    uint32_t warp_syncs = 0;  // the writer's bar.warp.sync so far
    uint16_t holds = 0;       // wgmmas and bulk copies in flight that read it
    int16_t writer = -1;      // warp, or beyond them the mbarrier of a bulk copy
    int8_t lane = -1;
    int16_t reader = -1;      // the last warp that read it, for races inside that warp
    int8_t reader_lane = -1;  // kSeveralLanes when more than one since reader_syncs
    uint32_t reader_syncs = 0;
    bool written = false;
    bool in_flight = false;
    bool atomic = false;  // the last write was one
  };
  bool fenced(const Warp& warp, const Cell& cell, const std::vector<Warp>& warps) const;
  std::string name_of_writer(int writer) const;
  void check(Warp& warp, const Instruction& in, size_t cell, Access kind, int lane, Report& report);

  std::vector<uint8_t> bytes_;
  std::vector<Cell> cells_;
  std::vector<uint32_t> read_clocks_;  // [cell][warp]
  int warps_ = 0;
  int shift_ = 2;
  bool checked_ = true;
};

}  // namespace ptxsim
