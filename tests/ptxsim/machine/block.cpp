// Scheduling, divergence and barriers of one thread block.
//
// A diverged warp runs its lanes at the lowest program counter first, which brings them together again at the join that
// the compiler laid out after both sides.
#include "block.h"

#include <algorithm>

namespace ptxsim {
namespace {

// A stuck kernel is a finding too; no test needs this many turns.
constexpr uint64_t kMaxTurns = 200'000'000;
// Turns for each running warp, all of them asking in vain, until they are taken to wait for ever.
constexpr size_t kMaxIdle = 100;

}  // namespace

Block::Block(const Program& program_, const Options& options_, GlobalMemory& global_, Report& report_,
             std::vector<uint8_t>& params, Dim grid, Dim threads, int dynamic_shared)
    : program(program_),
      options(options_),
      global(global_),
      report(report_),
      params_(params),
      grid_(grid),
      threads_(threads),
      dynamic_shared_(dynamic_shared),
      random_state_(options_.seed * 0x9E3779B97F4A7C15ull | 1) {}

uint64_t Block::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return random_state_;
}

float Block::approximate(float value) {
  if (!options.perturb || !std::isfinite(value) || value == 0) return value;
  const auto ulps = static_cast<float>(static_cast<int>((random() >> 20) % 5) - 2);
  return value * (1.0f + ulps * 1.1920929e-7f);
}

uint64_t Block::special(Special name, int warp, int lane, Dim at) const {
  const auto thread = static_cast<uint32_t>(warp * kLanes + lane);
  const uint64_t bit = uint64_t{1} << lane;
  switch (name) {
    case Special::TidX:
      return thread % threads_.x;
    case Special::TidY:
      return thread / threads_.x % threads_.y;
    case Special::TidZ:
      return thread / threads_.x / threads_.y;
    case Special::NtidX:
      return threads_.x;
    case Special::NtidY:
      return threads_.y;
    case Special::NtidZ:
      return threads_.z;
    case Special::CtaidX:
      return at.x;
    case Special::CtaidY:
      return at.y;
    case Special::CtaidZ:
      return at.z;
    case Special::NctaidX:
      return grid_.x;
    case Special::NctaidY:
      return grid_.y;
    case Special::NctaidZ:
      return grid_.z;
    case Special::Lane:
      return static_cast<uint64_t>(lane);
    case Special::Warp:
      return static_cast<uint64_t>(warp);
    case Special::WarpCount:
      return warps.size();
    case Special::MaskEq:
      return bit;
    case Special::MaskLt:
      return bit - 1;
    case Special::MaskLe:
      return bit * 2 - 1;
    case Special::MaskGt:
      return ~(bit * 2 - 1) & kAllLanes;
    case Special::MaskGe:
      return ~(bit - 1) & kAllLanes;
    case Special::SharedBytes:
      return shared.size();
    case Special::One:
      return 1;
    case Special::Zero:
      return 0;
  }
  return 0;
}

void Block::start_warp(Warp& warp, int id, Dim at) {
  warp.id = id;
  // A register read before it is written shows as an impossible value, not as a lucky zero.
  warp.registers.assign(static_cast<size_t>(program.registers) * kLanes, 0xDEADBEEFCAFEBABEull);
  warp.local.assign(static_cast<size_t>(program.local_bytes) * kLanes, 0xAB);
  const size_t agents = warps.size() + (program.uses_mbarriers ? Mbarriers::kMost : 0);
  warp.clock.assign(agents, 0);
  warp.clock[static_cast<size_t>(id)] = 1;
  warp.fenced_clock.assign(agents, 0);
  if (program.uses_wgmma) {
    warp.pending.assign(static_cast<size_t>(program.registers), 0);
    warp.written_epoch.assign(static_cast<size_t>(program.registers), 0);
  }
  if (program.uses_tensor_memory) warp.tensor_fenced.assign(agents, 0);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (id * kLanes + lane < static_cast<int>(threads_.count())) warp.live |= LaneMask{1} << lane;
  }
  for (const auto& [reg, value] : program.constants) std::fill_n(warp.lanes(reg), kLanes, value);
  for (const auto& [name, reg] : program.specials) {
    for (int lane = 0; lane < kLanes; ++lane) warp.lanes(reg)[lane] = special(name, id, lane, at);
  }
}

void Block::start(Dim at) {
  const auto count = static_cast<int>((threads_.count() + kLanes - 1) / kLanes);
  shared.reset(static_cast<size_t>(program.static_shared + dynamic_shared_), count, program.shared_granule, options);
  index_ = static_cast<int>(at.x + grid_.x * (at.y + grid_.y * at.z));
  turns_ = idle_ = 0;
  barriers_.reset();
  mbarriers.reset(static_cast<size_t>(count));
  if (program.uses_tensor_memory) tensor.reset(static_cast<size_t>(count), options);
  warps.assign(static_cast<size_t>(count), Warp{});
  for (int id = 0; id < count; ++id) start_warp(warps[static_cast<size_t>(id)], id, at);
}

bool Block::turn() {
  if (++turns_ > kMaxTurns || (options.limit && report.warp_instructions > options.limit)) {
    throw Fault("the block does not end");
  }
  ready_.clear();
  for (const Warp& warp : warps) {
    if (warp.state == Warp::State::Running) ready_.push_back(warp.id);
  }
  if (ready_.empty()) {
    if (barriers_.release(warps)) return true;
    const bool done =
        std::all_of(warps.begin(), warps.end(), [](const Warp& w) { return w.state == Warp::State::Done; });
    if (!done) throw Fault("deadlock: some warps wait at a barrier that the others never reach");
    finish();
    return false;
  }
  if (idle_ > kMaxIdle * ready_.size()) throw Fault("deadlock: all warps that run wait" + mbarriers.describe());
  global.enter(index_);
  Warp& warp = warps[static_cast<size_t>(ready_[random() % ready_.size()])];
  warp.waits = false;
  // Turns of random length: a race whose order matters then shows in the numbers for some seed.
  for (uint64_t steps = 1 + random() % 400; steps && step(warp); --steps) {
  }
  idle_ = warp.waits ? idle_ + 1 : 0;
  barriers_.release(warps);
  return true;
}

void Block::finish() {
  if (program.uses_tensor_memory && tensor.allocated()) {
    report.add(Finding::TensorAllocation, [] { return "tensor memory that is not freed when the block ends"; });
  }
  report.unwaited_copies += mbarriers.unwaited();
  for (const Warp& warp : warps) {
    report.unwaited_copies += warp.copies.size();
    if (!warp.tensor_operations.empty()) {
      report.add(Finding::TensorInFlight,
                 [&] { return "the block ends before it is complete, " + warp.tensor_operations.front().in->where(); });
    }
    for (const BulkStore& store : warp.bulk_stores) {
      if (store.read) continue;
      report.add(Finding::InFlight,
                 [&] { return "the block ends before its bulk copy has read shared memory, " + store.in->where(); });
    }
  }
}

void Block::set_pc(Warp& warp, LaneMask active, uint32_t pc) {
  if (warp.converged) {
    warp.pc = pc;
  } else {
    for_lanes(active, [&](int lane) { warp.lane_pc[lane] = pc; });
  }
}

bool Block::step(Warp& warp) {
  uint32_t pc = warp.pc;
  LaneMask active = warp.live;
  if (!warp.converged) {
    pc = ~0u;
    for_lanes(warp.live, [&](int lane) { pc = std::min(pc, warp.lane_pc[lane]); });
    active = 0;
    for_lanes(warp.live, [&](int lane) { active |= LaneMask{warp.lane_pc[lane] == pc} << lane; });
    if (active == warp.live) {
      warp.converged = true;
      warp.pc = pc;
    } else {
      ++report.diverged_steps;
    }
  }
  if (pc >= program.code.size()) {  // the end of the body is an exit
    warp.live = 0;
    warp.state = Warp::State::Done;
    return false;
  }
  const Instruction& in = program.code[pc];
  LaneMask mask = active;
  if (in.guard >= 0) {
    const uint64_t* guard = warp.lanes(in.guard);
    LaneMask holds = 0;
    for (int lane = 0; lane < kLanes; ++lane) holds |= static_cast<LaneMask>(guard[lane] & 1) << lane;
    mask &= in.guard_negated ? ~holds : holds;
  }
  ++report.warp_instructions;
  if (mask) {
    ++report.opcodes[static_cast<size_t>(in.statistic)];
    ++report.executed[pc];
  }
  switch (in.control) {
    case Control::Branch:
      return take_branch(warp, in, active, mask);
    case Control::Exit:
      return exit_lanes(warp, active, mask);
    case Control::BarrierSync:
    case Control::BarrierArrive:
      set_pc(warp, active, pc + 1);
      if (!mask) return true;
      if (mask != warp.live) throw Fault("barrier that some live lanes of the warp do not reach, " + in.where());
      barriers_.arrive(warp, in);
      return false;
    case Control::None:
      break;
  }
  set_pc(warp, active, pc + 1);
  if (!mask || !in.handler) return true;
  if (program.uses_wgmma) check_wgmma_registers(warp, in);
  if (!warp.tensor_registers.empty()) check_tensor_registers(warp, in);
  in.handler(*this, warp, in, mask);
  return !warp.waits;
}

bool Block::take_branch(Warp& warp, const Instruction& in, LaneMask active, LaneMask taken) {
  const auto target = static_cast<uint32_t>(in.target), next = static_cast<uint32_t>(in.index) + 1;
  if (taken == active || taken == 0) {
    set_pc(warp, active, taken ? target : next);
    return true;
  }
  warp.converged = false;
  for_lanes(active, [&](int lane) { warp.lane_pc[lane] = taken >> lane & 1 ? target : next; });
  return true;
}

bool Block::exit_lanes(Warp& warp, LaneMask active, LaneMask leaving) {
  const uint32_t next = (warp.converged ? warp.pc : warp.lane_pc[__builtin_ctz(active)]) + 1;
  set_pc(warp, active, next);
  warp.live &= ~leaving;
  if (warp.live) return true;
  warp.state = Warp::State::Done;
  return false;
}

void Block::check_wgmma_registers(Warp& warp, const Instruction& in) {
  if (in.is_wgmma) return;  // it checks its own
  if (warp.pending_count) {
    const auto touch = [&](int reg) {
      if (reg < 0 || !warp.pending[static_cast<size_t>(reg)]) return;
      report.add(Finding::WgmmaPending, [&] { return "accumulator touched before wgmma.wait_group, " + in.where(); });
    };
    for (const Operand& op : in.operands) {
      touch(op.reg);
      for (const int reg : op.elements) touch(reg);
    }
  }
  // Compilers copy accumulators after the fence, and ptxas merges such copies away: a copy is as old as its source.
  const bool copy = in.is_copy && in.operands[1].kind == Operand::Kind::Register;
  for (const int reg : in.writes) {
    warp.written_epoch[static_cast<size_t>(reg)] =
        copy ? warp.written_epoch[static_cast<size_t>(in.operands[1].reg)] : warp.fence_epoch;
  }
}

void Block::check_tensor_registers(Warp& warp, const Instruction& in) {
  const auto touch = [&](int reg) {
    const auto& loading = warp.tensor_registers;
    if (reg < 0 || std::find(loading.begin(), loading.end(), reg) == loading.end()) return;
    report.add(Finding::TensorWait, [&] { return "a loaded register before tcgen05.wait::ld, " + in.where(); });
  };
  for (const Operand& op : in.operands) {
    touch(op.reg);
    for (const int reg : op.elements) touch(reg);
  }
}

Space Block::resolve(const Instruction& in, uint64_t& address) const {
  Space space = in.space;
  if (space == Space::Generic) {
    space = Space::Global;
    if (address - kSharedWindow < kWindowBytes) {
      address -= kSharedWindow;
      space = Space::Shared;
    } else if (address - kLocalWindow < kWindowBytes) {
      space = Space::Local;
    } else if (address - kParamWindow < kWindowBytes) {
      space = Space::Param;
    }
  }
  return space;
}

uint8_t* Block::memory(Warp& warp, const Instruction& in, uint64_t address, int bytes, bool write, int lane,
                       bool atomic) {
  switch (resolve(in, address)) {
    case Space::Shared: {
      using Access = SharedMemory::Access;
      const Access kind = write    ? (atomic ? Access::Atomic : Access::Write)
                          : atomic ? Access::AtomicRead
                                   : Access::Read;
      return shared.access(warp, in, address, bytes, kind, lane, report);
    }
    case Space::Param: {
      const uint64_t offset = address - kParamWindow;
      if (write || offset + static_cast<uint64_t>(bytes) > params_.size())
        throw Fault("parameter space out of bounds, " + in.where());
      return params_.data() + offset;
    }
    case Space::Local: {
      const uint64_t offset = address - kLocalWindow;
      const auto size = static_cast<uint64_t>(program.local_bytes);
      if (offset + static_cast<uint64_t>(bytes) > size) throw Fault("local memory out of bounds, " + in.where());
      return &warp.local[static_cast<uint64_t>(lane) * size + offset];
    }
    default: {
      using Access = GlobalMemory::Access;
      const Access kind = write    ? (atomic ? Access::Atomic : Access::Write)
                          : atomic ? Access::AtomicRead
                                   : Access::Read;
      return global.access(warp, in, address, bytes, kind, lane, report);
    }
  }
}

}  // namespace ptxsim
