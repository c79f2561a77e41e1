// The state of one warp: registers, where each lane is, clocks, and what it has in flight.
#pragma once

#include <cstdint>
#include <vector>

#include "knowledge.h"
#include "program.h"

namespace ptxsim {

// One cp.async of one lane. Commit groups belong to a thread: `group` counts this lane's commits before it.
struct AsyncCopy {
  uint32_t destination;
  uint32_t group;
  uint8_t bytes;
  int8_t lane;
  uint8_t data[16];
};

// One bulk copy from shared to global memory, of 16-byte pieces of which some bytes may lie outside the tensor.
struct BulkStore {
  struct Piece {
    uint32_t source;
    uint64_t destination;
    uint8_t first, last;  // the bytes that are stored
  };
  const Instruction* in;
  std::vector<Piece> pieces;
  uint32_t group;
  int8_t lane;
  bool read = false;  // its source may be used again
};

// One wgmma.mma_async with its operands as they were at its issue.
struct AsyncMatrix {
  const Instruction* in;
  uint64_t a_descriptor;
  uint64_t b_descriptor;
  bool accumulate;
};

inline constexpr uint32_t kBeforeAnyFence = 1;

// Columns of tensor memory in some of its eight groups of 16 lanes.
struct TensorRegion {
  uint8_t groups;
  int column, columns;
};

struct Mbarrier;

// One tcgen05.mma, cp or commit of one lane, with its operands as they were at its issue.
struct TensorOperation {
  const Instruction* in;
  int lane;
  uint64_t a = 0, b = 0;  // descriptors; of an A in tensor memory, its address
  uint32_t d = 0, shape = 0;
  bool accumulate = false;
  Mbarrier* commit = nullptr;
  std::vector<uint32_t> clock;  // at a commit
};

struct Warp {
  enum class State : uint8_t { Running, AtBarrier, Done };

  int id = 0;
  State state = State::Running;
  LaneMask live = 0;

  // While the live lanes agree, pc alone says where they are; after a divergent branch, lane_pc does.
  bool converged = true;
  uint32_t pc = 0;
  uint32_t lane_pc[kLanes] = {};

  std::vector<uint64_t> registers;  // [register][lane]
  std::vector<uint8_t> local;       // [lane][byte]

  std::vector<uint32_t> clock;         // vector clock over the block's warps, then its mbarriers
  std::vector<uint32_t> fenced_clock;  // the same at the last fence.proxy.async
  Knowledge seen;                      // of other blocks
  Knowledge observed;                  // what relaxed reads met, which a fence turns into knowledge
  Knowledge fenced;                    // what the last fence lets relaxed writes publish
  uint32_t proxy_fences = 0;
  uint32_t mbarrier_fences = 0;
  uint32_t warp_syncs = 0;
  LaneMask touched = 0;  // lanes that accessed shared memory since the last of them
  bool waits = false;    // its last instruction asked an mbarrier in vain

  std::vector<AsyncCopy> copies;
  uint32_t commits[kLanes] = {};
  std::vector<BulkStore> bulk_stores;
  uint32_t bulk_commits[kLanes] = {};

  std::vector<AsyncMatrix> open_matrices;               // issued, not committed
  std::vector<std::vector<AsyncMatrix>> matrix_groups;  // committed, not waited for
  std::vector<uint8_t> pending;                         // accumulator registers of the two above
  int pending_count = 0;
  std::vector<uint32_t> written_epoch;  // per register: the wgmma.fence epoch of its last ordinary write
  uint32_t fence_epoch = kBeforeAnyFence;

  std::vector<TensorOperation> tensor_operations;         // in the order of their issue
  std::vector<TensorRegion> tensor_loads, tensor_stores;  // not waited for
  std::vector<TensorRegion> tensor_unpublished;           // stores before any tcgen05.fence
  std::vector<uint32_t> tensor_fenced;                    // the clock at the last fence::after_thread_sync
  std::vector<int> tensor_registers;                      // of loads that are not waited for

  // All lanes have met: what each did before is behind what any does next.
  void synchronise_lanes() {
    ++warp_syncs;
    touched = 0;
  }
  uint64_t* lanes(int reg) { return &registers[static_cast<size_t>(reg) * kLanes]; }
  const uint64_t* lanes(int reg) const { return &registers[static_cast<size_t>(reg) * kLanes]; }
};

template <class F>
inline void for_lanes(LaneMask mask, F f) {
  if (mask == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
    return;
  }
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

}  // namespace ptxsim
