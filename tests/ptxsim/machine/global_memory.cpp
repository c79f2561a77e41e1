// Global memory: bounds, read-only tensors, alignment, races.
#include "global_memory.h"

#include <algorithm>

#include "warp.h"

namespace ptxsim {
namespace {

// Whether a warp knows of an access of another block's warp. Of several warps (`by` < 0) no clock was kept, so knowing
// anything of their block has to do.
bool knows(const Warp& warp, int block, int by, uint32_t clock) {
  const auto found = warp.seen.blocks.find(block);
  if (found == warp.seen.blocks.end()) return false;
  return by < 0 || found->second[static_cast<size_t>(by)] >= clock;
}

}  // namespace

void GlobalMemory::start(const Program& program, const Options& options) {
  program_ = &program;
  checked_ = options.global_race;
  shift_ = program.global_granule >= 4 ? 2 : program.global_granule - 1;
  for (const auto& memory : program.module_memory) {
    allow(reinterpret_cast<uint64_t>(memory->data()), memory->size(), true);
  }
  // Merging tensors that share bytes (views of one storage) gives each byte one cell.
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<Range> merged;
  for (Range& range : ranges_) {
    if (!merged.empty() && range.begin < merged.back().end && range.writable == merged.back().writable) {
      merged.back().end = std::max(merged.back().end, range.end);
    } else {
      merged.push_back(std::move(range));
    }
  }
  ranges_ = std::move(merged);
  last_ = nullptr;
  for (Range& range : ranges_) {
    if (checked_ && range.writable) range.cells.resize(((range.end >> shift_) - (range.begin >> shift_)) + 1);
  }
}

uint8_t* GlobalMemory::access(const Warp& warp, const Instruction& in, uint64_t address, int bytes, Access kind,
                              int lane, Report& report) {
  const auto length = static_cast<uint64_t>(bytes);
  const auto where = [&] {
    return std::to_string(bytes) + " bytes by lane " + std::to_string(lane) + " of warp " + std::to_string(warp.id) +
           " of block " + std::to_string(block_) + ", " + in.where();
  };
  if (address % length) throw Fault("misaligned global access: " + where());
  const bool reads = kind == Access::Read || kind == Access::AtomicRead;
  const auto holds = [&](const Range& range) {
    return address >= range.begin && address + length <= range.end && (range.writable || reads);
  };
  if (!last_ || !holds(*last_)) {
    const auto found = std::find_if(ranges_.begin(), ranges_.end(), holds);
    if (found == ranges_.end()) {
      const bool read_only = std::any_of(ranges_.begin(), ranges_.end(), [&](const Range& range) {
        return address >= range.begin && address + length <= range.end;
      });
      throw Fault((read_only ? "write to a read-only tensor: " : "global memory out of bounds: ") + where());
    }
    last_ = &*found;
  }
  if (!last_->cells.empty()) {
    const uint64_t base = last_->begin >> shift_;
    const uint64_t final_cell = (address + length - 1) >> shift_;
    for (uint64_t cell = address >> shift_; cell <= final_cell; ++cell) {
      check(warp, in, last_->cells[cell - base], kind, report);
    }
  }
  return reinterpret_cast<uint8_t*>(address);
}

void GlobalMemory::check(const Warp& warp, const Instruction& in, Cell& cell, Access kind, Report& report) {
  const auto race = [&](const char* what, int block) {
    report.add(Finding::GlobalRace, [&] {
      return std::string(what) + " block " + std::to_string(block) + " by warp " + std::to_string(warp.id) +
             " of block " + std::to_string(block_) + ", " + in.where();
    });
  };
  const auto own = static_cast<size_t>(warp.id);
  const bool reads = kind == Access::Read || kind == Access::AtomicRead;
  const bool atomic = kind == Access::Atomic || kind == Access::AtomicRead;
  // Against the last write, unless both are atomic.
  if (cell.writer_block != kNobody && !(atomic && cell.atomic)) {
    const bool other_block =
        cell.writer_block != block_ && !knows(warp, cell.writer_block, cell.writer_warp, cell.writer_clock);
    const bool other_warp = cell.writer_block == block_ && cell.writer_warp != warp.id &&
                            cell.writer_clock > warp.clock[static_cast<size_t>(cell.writer_warp)];
    if (other_block || other_warp) {
      race(reads ? "global read after write of" : "global write after write of", cell.writer_block);
    }
  }
  if (reads) {
    cell.readers_atomic = atomic && (cell.reader_block == kNobody || cell.readers_atomic);
    if (cell.reader_block != block_) {
      const bool alone =
          cell.reader_block == kNobody || knows(warp, cell.reader_block, cell.reader_warp, cell.reader_clock);
      cell.reader_block = alone ? block_ : kSeveral;
      cell.reader_warp = static_cast<int16_t>(warp.id);
    } else if (cell.reader_warp != warp.id) {
      const bool before =
          cell.reader_warp >= 0 && cell.reader_clock <= warp.clock[static_cast<size_t>(cell.reader_warp)];
      cell.reader_warp = before ? static_cast<int16_t>(warp.id) : static_cast<int16_t>(kSeveral);
    }
    cell.reader_clock = warp.clock[own];
    return;
  }
  if (cell.reader_block != kNobody) {
    // Several readers in one block at unordered times are taken as ordered: only the last clock is kept.
    const bool other_block =
        cell.reader_block == kSeveral ||
        (cell.reader_block != block_ && !knows(warp, cell.reader_block, cell.reader_warp, cell.reader_clock));
    const bool other_warp = cell.reader_block == block_ && cell.reader_warp >= 0 && cell.reader_warp != warp.id &&
                            cell.reader_clock > warp.clock[static_cast<size_t>(cell.reader_warp)];
    const bool meet = atomic && cell.readers_atomic;
    if (!meet && (other_block || other_warp)) race("global write after read of", cell.reader_block);
    cell.reader_block = kNobody;
  }
  cell.writer_block = block_;
  cell.writer_warp = static_cast<int16_t>(warp.id);
  cell.writer_clock = warp.clock[own];
  cell.atomic = kind == Access::Atomic;
}

Knowledge GlobalMemory::all_of(const Warp& warp) const {
  Knowledge all = warp.seen;
  join(all.blocks[block_], warp.clock);
  return all;
}

void GlobalMemory::learn(Warp& warp, const Knowledge& knowledge) {
  warp.seen.join(knowledge);
  const auto own = warp.seen.blocks.find(block_);
  if (own == warp.seen.blocks.end()) return;
  const auto self = static_cast<size_t>(warp.id);
  for (size_t i = 0; i < own->second.size(); ++i) {
    if (i != self) warp.clock[i] = std::max(warp.clock[i], own->second[i]);
  }
  warp.seen.blocks.erase(own);
}

void GlobalMemory::release(Warp& warp, uint64_t address) {
  if (!checked_) return;
  publish(all_of(warp), address);
  ++warp.clock[static_cast<size_t>(warp.id)];  // what follows is not behind the release
}

void GlobalMemory::acquire(Warp& warp, uint64_t address) {
  if (!checked_) return;
  const auto found = released_.find(address);
  if (found != released_.end()) learn(warp, found->second);
}

void GlobalMemory::relaxed_write(Warp& warp, uint64_t address) {
  if (checked_ && !warp.fenced.blocks.empty()) publish(warp.fenced, address);
}

void GlobalMemory::relaxed_read(Warp& warp, uint64_t address) {
  if (!checked_) return;
  const auto found = released_.find(address);
  if (found != released_.end()) warp.observed.join(found->second);
}

void GlobalMemory::fence(Warp& warp) {
  if (!checked_) return;
  learn(warp, warp.observed);
  warp.observed.blocks.clear();
  warp.fenced = all_of(warp);
  ++warp.clock[static_cast<size_t>(warp.id)];
}

}  // namespace ptxsim
