// cp.async and its groups. Groups belong to threads: a lane waits for its own copies only.
//
// A copy is in flight from its issue to its thread's wait. With Options::late its bytes arrive at that wait, the latest
// moment allowed, else at once, the earliest; a correct kernel cannot tell the difference.
#include <algorithm>

#include "handlers.h"
#include "traffic.h"

namespace ptxsim {
namespace {

enum SourceRule : uint8_t { ByteCount, IgnorePredicate };  // Instruction::mode, set by the parser

void copy_async(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  using Access = SharedMemory::Access;
  const Operand &to = in.operands[0], &from = in.operands[1];
  const auto bytes = static_cast<int>(operand(warp, in, 2)[0]);
  const bool limited = in.operands.size() > 3;
  const uint64_t* limit = limited ? operand(warp, in, 3) : nullptr;
  const uint64_t *to_base = warp.lanes(to.reg), *from_base = warp.lanes(from.reg);
  uint64_t destinations[kLanes], sources[kLanes];
  for_lanes(mask, [&](int lane) {
    destinations[lane] = (to_base[lane] + static_cast<uint64_t>(to.offset)) & 0xffffffffu;
    sources[lane] = from_base[lane] + static_cast<uint64_t>(from.offset);
  });
  if (block.options.stats) {
    count_bank_conflicts(block.report, in, destinations, mask, bytes);
    count_sectors(block.report, sources, mask, bytes);
  }
  for_lanes(mask, [&](int lane) {
    int present = bytes;  // bytes that are read; the rest is zero
    if (limited && in.mode == IgnorePredicate) {
      const bool ignore = ((limit[lane] & 1) != 0) != in.operands[3].negated;
      present = ignore ? 0 : bytes;
    } else if (limited) {
      present = static_cast<int>(std::min<uint64_t>(limit[lane] & 0xffffffffu, static_cast<uint64_t>(bytes)));
    }
    AsyncCopy copy{static_cast<uint32_t>(destinations[lane]),
                   warp.commits[lane],
                   static_cast<uint8_t>(bytes),
                   static_cast<int8_t>(lane),
                   {}};
    if (present == bytes) {
      std::memcpy(copy.data,
                  block.global.access(warp, in, sources[lane], bytes, GlobalMemory::Access::Read, lane, block.report),
                  static_cast<size_t>(bytes));
    } else {
      for (int i = 0; i < present; ++i) {
        copy.data[i] = *block.global.access(warp, in, sources[lane] + static_cast<uint64_t>(i), 1,
                                            GlobalMemory::Access::Read, lane, block.report);
      }
    }
    uint8_t* landing = block.shared.access(warp, in, destinations[lane], bytes, Access::CopyIssue, lane, block.report);
    if (!block.options.late) std::memcpy(landing, copy.data, copy.bytes);
    warp.copies.push_back(copy);
  });
}

// Lands the copies that `done` accepts, in the order of their issue.
template <class Done>
void land(Block& block, Warp& warp, const Instruction& in, Done done) {
  const auto keep = std::stable_partition(warp.copies.begin(), warp.copies.end(), done);
  for (auto copy = warp.copies.begin(); copy != keep; ++copy) {
    uint8_t* landing = block.shared.access(warp, in, copy->destination, copy->bytes, SharedMemory::Access::CopyLand,
                                           copy->lane, block.report);
    if (block.options.late) std::memcpy(landing, copy->data, copy->bytes);
  }
  warp.copies.erase(warp.copies.begin(), keep);
}

void commit_group(Block&, Warp& warp, const Instruction&, LaneMask mask) {
  for_lanes(mask, [&](int lane) { ++warp.commits[lane]; });
}

void wait_group(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  const auto keep = static_cast<uint32_t>(operand(warp, in, 0)[0]);
  land(block, warp, in,
       [&](const AsyncCopy& copy) { return (mask >> copy.lane & 1) && copy.group + keep < warp.commits[copy.lane]; });
}

void wait_all(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  land(block, warp, in, [&](const AsyncCopy& copy) { return (mask >> copy.lane & 1) != 0; });
}

Handler select_copy(Instruction& in) {
  require_operands(in, 3);
  if (in.has("L2::cache_hint")) in.operands.pop_back();
  return copy_async;
}
template <Handler handler>
Handler always(Instruction&) {
  return handler;
}

// fence.proxy.async makes this thread's earlier writes, and those ordered before them, visible to wgmma.
void fence_proxy(Block&, Warp& warp, const Instruction&, LaneMask) {
  ++warp.proxy_fences;
  warp.fenced_clock = warp.clock;
}

// Publishes the initialisation of mbarriers to the async proxy.
void fence_mbarriers(Block&, Warp& warp, const Instruction&, LaneMask) {
  ++warp.mbarrier_fences;
}

}  // namespace

const OpcodeRows& async_opcodes() {
  static const OpcodeRows rows = {
      {"cp.async", "ca cg shared shared::cta global cache", select_copy, false},
      {"cp.async.commit_group", "", always<commit_group>, false},
      {"cp.async.wait_group", "", always<wait_group>, false},
      {"cp.async.wait_all", "", always<wait_all>, false},
      {"fence.proxy.async", "shared::cta global", always<fence_proxy>, false},
      {"fence.mbarrier_init", "release cluster", always<fence_mbarriers>, false},
  };
  return rows;
}

}  // namespace ptxsim
