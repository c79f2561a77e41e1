// Tensor memory: allocation, races, operations in flight, columns that nothing wrote.
#include "tensor_memory.h"

#include <algorithm>

namespace ptxsim {
namespace {

constexpr uint32_t kNeverWritten = 0x7fff7fff;  // NaN in every format
constexpr uint32_t kUnpublished = ~0u;          // later than anything that a warp knows

}  // namespace

void TensorMemory::reset(size_t warps, const Options& options) {
  warps_ = warps;
  relinquished_ = false;
  checked_ = options.race;
  strict_ = options.tensor_strict;
  blocks_.clear();
  words_.assign(static_cast<size_t>(kRows) * kColumns, options.poison ? kNeverWritten : 0);
  cells_.assign(static_cast<size_t>(kGroups) * kColumns, Cell{});
  read_clocks_.assign(cells_.size() * warps, 0);
}

uint32_t TensorMemory::allocate(const Instruction& in, uint64_t columns) {
  if (columns < 32 || columns > kColumns || (columns & (columns - 1))) {
    throw Fault("tensor memory is allocated by powers of two from 32 to 512 columns, not " + std::to_string(columns) +
                ", " + in.where());
  }
  if (relinquished_) throw Fault("allocation after tcgen05.relinquish_alloc_permit, " + in.where());
  const auto count = static_cast<int>(columns);
  // From the end, so that code which takes its columns to be the first ones is found out.
  for (int first = kColumns - count; first >= 0; first -= count) {
    const auto meets = [&](const Range& b) { return first < b.first + b.count && b.first < first + count; };
    if (std::any_of(blocks_.begin(), blocks_.end(), meets)) continue;
    blocks_.push_back({first, count});
    for_cells({0xff, first, count}, [&](size_t index) { cells_[index] = Cell{}; });
    for (int column = first; column < first + count; ++column) std::fill_n(&word(0, column), kRows, kNeverWritten);
    return static_cast<uint32_t>(first);
  }
  throw Fault("no " + std::to_string(columns) + " columns of tensor memory are free: the block waits for ever, " +
              in.where());
}

void TensorMemory::free(Warp& warp, const Instruction& in, uint32_t address, uint64_t columns, Report& report) {
  const auto found = std::find_if(blocks_.begin(), blocks_.end(), [&](const Range& b) {
    return static_cast<uint32_t>(b.first) == address && static_cast<uint64_t>(b.count) == columns;
  });
  if (found == blocks_.end()) {
    throw Fault("tensor memory freed that is not allocated: " + std::to_string(columns) + " columns at " +
                std::to_string(address) + ", " + in.where());
  }
  touch(warp, in, {0xff, found->first, found->count}, Use::Free, 0, report);
  blocks_.erase(found);
}

void TensorMemory::touch(Warp& warp, const Instruction& in, const TensorRegion& region, Use use, uint64_t key,
                         Report& report) {
  const auto inside = [&](const Range& b) {
    return b.first <= region.column && region.column + region.columns <= b.first + b.count;
  };
  if (std::none_of(blocks_.begin(), blocks_.end(), inside)) {
    throw Fault("tensor memory that is not allocated: " + std::to_string(region.columns) + " columns at " +
                std::to_string(region.column) + ", " + in.where());
  }
  if (!checked_) return;
  for_cells(region, [&](size_t index) { check(warp, in, index, use, key, report); });
}

void TensorMemory::check(Warp& warp, const Instruction& in, size_t index, Use use, uint64_t key, Report& report) {
  Cell& cell = cells_[index];
  uint32_t* read_clocks = &read_clocks_[index * warps_];
  const auto me = static_cast<size_t>(warp.id);
  const auto place = [&](const std::string& what) {
    return what + " at tensor column " + std::to_string(index / kGroups) + ", lane " +
           std::to_string(index % kGroups * kGroup) + " by warp " + std::to_string(warp.id) + ", " + in.where();
  };
  const auto find = [&](Finding finding, const char* what) { report.add(finding, [&] { return place(what); }); };
  const bool writes = use != Use::Load && use != Use::Operand;
  const bool reads = use == Use::Load || use == Use::Operand || use == Use::Accumulate;
  // Products into one accumulator follow one another, and a product follows the copies of its thread.
  const bool result = use == Use::Result || use == Use::Accumulate;
  const bool piped =
      cell.key && ((result && cell.key == key) || ((result || use == Use::Operand) && cell.key == copies_of(key)));
  if (cell.writes && !piped) {
    find(Finding::TensorInFlight, "touched before the mbarrier of its tcgen05.commit has completed");
  }
  if (cell.reads && writes) {
    find(Finding::TensorInFlight, "the operand of an unfinished tcgen05.mma is overwritten");
  }
  if (cell.stores) find(Finding::TensorWait, "touched after tcgen05.st without a tcgen05.wait::st between");
  if (cell.loads && writes) find(Finding::TensorWait, "written after tcgen05.ld without a tcgen05.wait::ld between");
  if (cell.writer >= 0 && static_cast<size_t>(cell.writer) != me && !cell.writes && !cell.stores && !piped) {
    const auto writer = static_cast<size_t>(cell.writer);
    if (cell.write_clock > warp.clock[writer]) {
      if (writer >= warps_) {
        find(Finding::TensorInFlight, "touched without having waited for the mbarrier of its tcgen05.commit");
      } else if (strict_ && cell.write_clock == kUnpublished) {
        find(Finding::TensorFence, "stored by another warp with no tcgen05.fence::before_thread_sync since");
      } else {
        find(Finding::TensorRace, "touched after a store of another warp");
      }
    } else if (strict_ && cell.write_clock > warp.tensor_fenced[writer] && use != Use::Free) {
      find(Finding::TensorFence, "written by another with no tcgen05.fence::after_thread_sync since they met");
    }
  }
  if (writes) {
    for (size_t other = 0; other < warps_; ++other) {
      if (other != me && read_clocks[other] != kUnpublished && read_clocks[other] > warp.clock[other]) {
        find(Finding::TensorRace, "written after a load of another warp");
      }
    }
    if (cell.async_reader >= 0 && !cell.reads &&
        cell.async_read_clock > warp.clock[static_cast<size_t>(cell.async_reader)]) {
      find(Finding::TensorInFlight, "the operand of a tcgen05.mma is overwritten before its mbarrier was waited for");
    }
  }
  // Triton loads where a product was predicated away too, and uses nothing of it.
  if (reads && !cell.initialised && (strict_ || use != Use::Load)) {
    find(Finding::UninitialisedTensor,
         use == Use::Accumulate ? "added to what nothing wrote" : "read before any write");
  }
  switch (use) {
    case Use::Load:
      ++cell.loads;
      read_clocks[me] = kUnpublished;
      break;
    case Use::Store:
      ++cell.stores;
      cell.writer = static_cast<int16_t>(me);
      cell.write_clock = kUnpublished;
      cell.key = 0;
      cell.initialised = true;
      break;
    case Use::Operand:
      ++cell.reads;
      break;
    case Use::Result:
    case Use::Accumulate:
    case Use::Copy:
      ++cell.writes;
      cell.key = key;
      cell.initialised = true;
      break;
    case Use::Free:
      break;
  }
}

void TensorMemory::loaded(const Warp& warp, const TensorRegion& region) {
  if (!checked_) return;
  for_cells(region, [&](size_t index) {
    --cells_[index].loads;
    read_clocks_[index * warps_ + static_cast<size_t>(warp.id)] = warp.clock[static_cast<size_t>(warp.id)];
  });
}

void TensorMemory::stored(const Warp& warp, const TensorRegion& region) {
  if (!checked_) return;
  for_cells(region, [&](size_t index) { --cells_[index].stores; });
  if (!strict_) publish(warp, region);
}

void TensorMemory::publish(const Warp& warp, const TensorRegion& region) {
  if (!checked_) return;
  for_cells(region, [&](size_t index) {
    Cell& cell = cells_[index];
    if (cell.writer == warp.id && !cell.stores) cell.write_clock = warp.clock[static_cast<size_t>(warp.id)];
  });
}

void TensorMemory::written(const TensorRegion& region, int writer, uint32_t clock) {
  if (!checked_) return;
  for_cells(region, [&](size_t index) {
    Cell& cell = cells_[index];
    --cell.writes;
    cell.writer = static_cast<int16_t>(writer);
    cell.write_clock = clock;
  });
}

void TensorMemory::read(const TensorRegion& region, int reader, uint32_t clock) {
  if (!checked_) return;
  for_cells(region, [&](size_t index) {
    Cell& cell = cells_[index];
    --cell.reads;
    cell.async_reader = static_cast<int16_t>(reader);
    cell.async_read_clock = clock;
  });
}

}  // namespace ptxsim
