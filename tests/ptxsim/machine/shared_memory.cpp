// Shared memory: bounds, alignment, races, bytes in flight, uninitialised reads.
#include "shared_memory.h"

#include "warp.h"

namespace ptxsim {
namespace {

constexpr int kSeveralLanes = -4;

}  // namespace

void SharedMemory::reset(size_t bytes, int warps, int granule, const Options& options) {
  bytes_.assign(bytes, 0);
  if (options.poison) {
    // 0x7fff is NaN in both 16-bit formats, and the pair of them is NaN in float32.
    for (size_t i = 0; i < bytes; ++i) bytes_[i] = i % 2 ? 0x7f : 0xff;
  }
  warps_ = warps;
  shift_ = granule >= 4 ? 2 : granule - 1;
  checked_ = options.race;
  if (!checked_) return;
  const size_t cells = (bytes >> shift_) + 1;
  cells_.assign(cells, Cell{});
  read_clocks_.assign(cells * static_cast<size_t>(warps), 0);
}

uint8_t* SharedMemory::access(Warp& warp, const Instruction& in, uint64_t address, int bytes, Access kind, int lane,
                              Report& report) {
  const auto length = static_cast<uint64_t>(bytes);
  if (address + length > bytes_.size()) {
    throw Fault("shared memory out of bounds: " + std::to_string(bytes) + " bytes at " + std::to_string(address) +
                " of " + std::to_string(bytes_.size()) + ", " + in.where());
  }
  if (address % length) throw Fault("misaligned shared access at " + std::to_string(address) + ", " + in.where());
  if (checked_) {
    const size_t last = (address + length - 1) >> shift_;
    for (size_t cell = address >> shift_; cell <= last; ++cell) check(warp, in, cell, kind, lane, report);
  }
  return bytes_.data() + address;
}

void SharedMemory::store(Warp& warp, const Instruction& in, uint64_t address, const uint8_t* data, int bytes, int lane,
                         Report& report) {
  const auto length = static_cast<size_t>(bytes);
  const bool same = address + length <= bytes_.size() && std::memcmp(&bytes_[address], data, length) == 0;
  std::memcpy(access(warp, in, address, bytes, same ? Access::Rewrite : Access::Write, lane, report), data, length);
}

void SharedMemory::check(Warp& warp, const Instruction& in, size_t index, Access kind, int lane, Report& report) {
  Cell& cell = cells_[index];
  if (lane >= 0) warp.touched |= LaneMask{1} << lane;
  uint32_t* read_clocks = &read_clocks_[index * static_cast<size_t>(warps_)];
  const auto place = [&](const std::string& what) {
    return what + " at shared+" + std::to_string(index << shift_) + " by warp " + std::to_string(warp.id) + ", " +
           in.where();
  };
  const bool reads_only = kind == Access::Read || kind == Access::AtomicRead;
  const bool both_atomic = (kind == Access::Atomic || kind == Access::AtomicRead) && cell.atomic;
  if (cell.in_flight && kind != Access::CopyLand) {
    report.add(Finding::InFlight, [&] { return place("bytes of an unfinished asynchronous copy touched"); });
    if (reads_only) return;  // by whom they are written is not settled yet
  }
  if (cell.holds && !reads_only) {
    report.add(Finding::InFlight, [&] { return place("what an unfinished wgmma or bulk copy reads is overwritten"); });
  }
  if (kind == Access::Rewrite && cell.written && cell.writer != warp.id) return;
  if (cell.writer >= 0 && cell.writer != warp.id && cell.write_clock > warp.clock[static_cast<size_t>(cell.writer)] &&
      !both_atomic) {
    report.add(Finding::SharedRace, [&] {
      return place((reads_only ? "read after write of " : "write after write of ") + name_of_writer(cell.writer));
    });
  }
  if (reads_only) {
    if (cell.writer == warp.id && cell.warp_syncs == warp.warp_syncs && cell.lane != lane) {
      report.add(Finding::IntraWarpRace, [&] {
        return place("lane " + std::to_string(lane) + " reads what lane " + std::to_string(cell.lane) + " wrote");
      });
    }
    if (!cell.written) report.add(Finding::UninitialisedShared, [&] { return place("read before any write"); });
    if (lane != kAsyncReads) {
      const bool again = cell.reader == warp.id && cell.reader_syncs == warp.warp_syncs;
      cell.reader_lane = static_cast<int8_t>(again && cell.reader_lane != lane ? kSeveralLanes : lane);
      cell.reader = static_cast<int16_t>(warp.id);
      cell.reader_syncs = warp.warp_syncs;
    }
    if (!both_atomic) read_clocks[warp.id] = warp.clock[static_cast<size_t>(warp.id)];
    return;
  }
  if (cell.reader == warp.id && cell.reader_syncs == warp.warp_syncs && cell.reader_lane != lane &&
      kind != Access::CopyLand) {
    report.add(Finding::IntraWarpRace, [&] {
      const std::string who = cell.reader_lane < 0 ? "lanes" : "lane " + std::to_string(cell.reader_lane);
      return place("lane " + std::to_string(lane) + " writes what other " + who + " read");
    });
  }
  for (int other = 0; other < warps_; ++other) {
    if (other != warp.id && read_clocks[other] > warp.clock[static_cast<size_t>(other)]) {
      report.add(Finding::SharedRace, [&] { return place("write after read of warp " + std::to_string(other)); });
    }
  }
  cell.writer = static_cast<int16_t>(warp.id);
  cell.write_clock = warp.clock[static_cast<size_t>(warp.id)];
  cell.fences = warp.proxy_fences;
  cell.warp_syncs = warp.warp_syncs;
  cell.lane = static_cast<int8_t>(lane);
  cell.written = true;
  cell.atomic = kind == Access::Atomic;
  if (kind == Access::CopyIssue) cell.in_flight = true;
  if (kind == Access::CopyLand) cell.in_flight = false;
}

bool SharedMemory::fenced(const Warp& warp, const Cell& cell, const std::vector<Warp>& warps) const {
  if (cell.writer < 0 || cell.writer >= warps_) return true;  // nobody, or the async proxy itself
  const auto writer = static_cast<size_t>(cell.writer);
  const bool by_writer = warps[writer].proxy_fences > cell.fences;
  const bool by_reader = cell.writer != warp.id && warp.fenced_clock[writer] >= cell.write_clock;
  return by_writer || by_reader;
}

std::string SharedMemory::name_of_writer(int writer) const {
  return writer < warps_ ? "warp " + std::to_string(writer) : "a bulk copy";
}

void SharedMemory::async_read(Warp& warp, const Instruction& in, uint64_t address, int bytes,
                              const std::vector<Warp>& warps, Report& report) {
  access(warp, in, address, bytes, Access::Read, kAsyncReads, report);
  if (!checked_) return;
  const size_t last = (address + static_cast<uint64_t>(bytes) - 1) >> shift_;
  for (size_t index = address >> shift_; index <= last; ++index) {
    const Cell& cell = cells_[index];
    if (fenced(warp, cell, warps)) continue;
    report.add(Finding::ProxyFence, [&] {
      return "read through the async proxy of shared+" + std::to_string(index << shift_) + " written by warp " +
             std::to_string(cell.writer) + " without a later fence.proxy.async, " + in.where();
    });
  }
}

void SharedMemory::bulk_issue(Warp& warp, const Instruction& in, uint64_t address, const std::vector<Warp>& warps,
                              Report& report) {
  if (checked_ && address + 16 <= bytes_.size()) {
    const Cell& cell = cells_[address >> shift_];
    if (!fenced(warp, cell, warps)) {
      report.add(Finding::ProxyFence, [&] {
        return "bulk copy over shared+" + std::to_string(address) + " written by warp " + std::to_string(cell.writer) +
               " without a later fence.proxy.async, " + in.where();
      });
    }
  }
  access(warp, in, address, 16, Access::CopyIssue, kWarpWrites, report);
}

void SharedMemory::land(uint64_t address, const std::array<uint8_t, 16>& data, int writer, uint32_t clock) {
  std::memcpy(&bytes_[address], data.data(), data.size());
  if (!checked_) return;
  for (size_t index = address >> shift_; index <= (address + 15) >> shift_; ++index) {
    Cell& cell = cells_[index];
    cell.writer = static_cast<int16_t>(writer);
    cell.write_clock = clock;
    cell.in_flight = false;
  }
}

void SharedMemory::hold(uint64_t address, int bytes, int change) {
  if (!checked_ || address + static_cast<uint64_t>(bytes) > bytes_.size()) return;
  const size_t last = (address + static_cast<uint64_t>(bytes) - 1) >> shift_;
  for (size_t index = address >> shift_; index <= last; ++index) {
    cells_[index].holds = static_cast<uint16_t>(cells_[index].holds + change);
  }
}

}  // namespace ptxsim
