// mbarrier.init, inval, arrive, expect_tx, complete_tx, test_wait, try_wait.
#include <algorithm>

#include "handlers.h"
#include "tensor_memory.h"

namespace ptxsim {
namespace {

enum Mode : uint8_t { kByState, kByParity, kRelaxed = 2 };  // Instruction::mode of waits, as bits

// The shared address of an mbarrier operand, wherever the instruction says it lies; its 8 bytes are touched as `kind`.
uint64_t object_address(Block& block, Warp& warp, const Instruction& in, size_t i, int lane,
                        SharedMemory::Access kind) {
  const Operand& where = in.operands[i];
  uint64_t address = warp.lanes(where.reg)[lane] + static_cast<uint64_t>(where.offset);
  if (in.space == Space::Shared) address &= 0xffffffffu;
  if (block.resolve(in, address) != Space::Shared) throw Fault("mbarrier outside shared memory, " + in.where());
  block.shared.access(warp, in, address, 8, kind, kWarpWrites, block.report);
  return address;
}

Mbarrier& object_of(Block& block, Warp& warp, const Instruction& in, size_t i, int lane) {
  const uint64_t address = object_address(block, warp, in, i, lane, SharedMemory::Access::Atomic);
  return block.mbarriers.find(warp, in, address, block.report);
}

void init(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  for_lanes(mask, [&](int lane) {
    const uint64_t address = object_address(block, warp, in, 0, lane, SharedMemory::Access::Write);
    block.mbarriers.init(warp, in, address, truncate(operand(warp, in, 1)[lane], 4));
  });
}

void invalidate(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  for_lanes(mask, [&](int lane) {
    block.mbarriers.invalidate(in, object_address(block, warp, in, 0, lane, SharedMemory::Access::Write));
  });
}

// An arrival speaks for the thread that makes it: what other lanes did is behind it only after a bar.warp.sync.
void check_lanes(Block& block, const Warp& warp, const Instruction& in, LaneMask mask) {
  const LaneMask others = warp.touched & ~mask;
  if (!others) return;
  block.report.add(Finding::IntraWarpRace, [&] {
    return "arrival of lane " + std::to_string(__builtin_ctz(mask)) + " alone, while lane " +
           std::to_string(__builtin_ctz(others)) + " touched shared memory with no bar.warp.sync since, " + in.where();
  });
}

template <bool expects>
void arrive(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  check_lanes(block, warp, in, mask);
  const bool given = in.operands.size() > 2;
  for_lanes(mask, [&](int lane) {
    Mbarrier& object = object_of(block, warp, in, 1, lane);
    const uint64_t number = given ? truncate(operand(warp, in, 2)[lane], 4) : 1;
    if (expects) block.mbarriers.expect(object, static_cast<int64_t>(number));
    operand(warp, in, 0)[lane] = block.mbarriers.arrive(warp, in, object, expects ? 1 : number);
  });
  ++warp.clock[static_cast<size_t>(warp.id)];  // what follows is not behind the arrival
}

template <bool expects>
void count_bytes(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  for_lanes(mask, [&](int lane) {
    Mbarrier& object = object_of(block, warp, in, 0, lane);
    const auto bytes = static_cast<int64_t>(truncate(operand(warp, in, 1)[lane], 4));
    if (expects) {
      block.mbarriers.expect(object, bytes);
    } else {
      block.mbarriers.complete(object, bytes);
    }
  });
}

void wait(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  const uint64_t* wanted = operand(warp, in, 2);
  const Mbarrier* last = nullptr;
  uint64_t last_wanted = 0;
  bool over = false, all_over = true;
  for_lanes(mask, [&](int lane) {
    Mbarrier& object = object_of(block, warp, in, 1, lane);
    if (&object != last || wanted[lane] != last_wanted) {  // the lanes of a warp ask as one
      last = &object;
      last_wanted = wanted[lane];
      const auto done = [&](uint64_t phase) {
        return in.mode & kByParity ? (phase & 1) != (last_wanted & 1) : phase > last_wanted;
      };
      over = block.mbarriers.test(object, block.shared, done) || (land_commits(block, object) && done(object.phase));
    }
    operand(warp, in, 0)[lane] = over;
    all_over &= over;
    if (!over || in.mode & kRelaxed) return;
    warp.seen.join(object.completed_seen);
    for (size_t i = 0; i < object.completed.size(); ++i) {
      if (i != static_cast<size_t>(warp.id)) warp.clock[i] = std::max(warp.clock[i], object.completed[i]);
    }
  });
  warp.waits = !all_over;
}

Handler select_arrive(Instruction& in) {
  require_operands(in, 2);
  if (in.operands[0].kind == Operand::Kind::Address) unsupported(in, "an arrival at another block is not modelled");
  return in.name == "mbarrier.arrive" ? arrive<false> : arrive<true>;
}
Handler select_wait(Instruction& in) {
  require_operands(in, 3);
  in.mode = static_cast<uint8_t>((in.has("parity") ? kByParity : kByState) | (in.has("relaxed") ? kRelaxed : 0));
  return wait;
}
template <Handler handler, size_t operands>
Handler plain(Instruction& in) {
  require_operands(in, operands);
  return handler;
}

}  // namespace

const OpcodeRows& mbarrier_opcodes() {
  static const char* const arrival = "release relaxed cta cluster shared shared::cta";
  static const char* const waiting = "acquire relaxed cta cluster shared shared::cta parity";
  static const OpcodeRows rows = {
      {"mbarrier.init", "shared shared::cta", plain<init, 2>, false},
      {"mbarrier.inval", "shared shared::cta", plain<invalidate, 1>, false},
      {"mbarrier.arrive", arrival, select_arrive},
      {"mbarrier.arrive.expect_tx", arrival, select_arrive},
      {"mbarrier.expect_tx", arrival, plain<count_bytes<true>, 2>, false},
      {"mbarrier.complete_tx", arrival, plain<count_bytes<false>, 2>, false},
      {"mbarrier.test_wait", waiting, select_wait},
      {"mbarrier.try_wait", waiting, select_wait},
  };
  return rows;
}

}  // namespace ptxsim
