// The tensor memory of one block (sm_100): 128 lanes of 512 columns of 32 bits, and the shadow that finds its misuse.
//
// Asynchronous products and copies (tcgen05.mma, cp) write it in the name of the mbarrier that their tcgen05.commit
// arrives at, as bulk copies write shared memory: whoever has not seen its phase complete is not behind them. Loads and
// stores of warps end at tcgen05.wait. Instructions touch whole columns of 16 lanes, so that is the shadow's cell.
#pragma once

#include <cstdint>
#include <vector>

#include "mbarrier.h"
#include "program.h"
#include "report.h"
#include "warp.h"

namespace ptxsim {

class TensorMemory {
public:
  static constexpr int kRows = 128, kColumns = 512, kGroup = 16, kGroups = kRows / kGroup;
  enum class Use : uint8_t { Load, Store, Operand, Result, Accumulate, Copy, Free };

  void reset(size_t warps, const Options& options);

  uint32_t allocate(const Instruction& in, uint64_t columns);
  void free(Warp& warp, const Instruction& in, uint32_t address, uint64_t columns, Report& report);
  void relinquish() { relinquished_ = true; }
  size_t allocated() const { return blocks_.size(); }

  uint32_t& word(int lane, int column) { return words_[static_cast<size_t>(column * kRows + lane)]; }

  // What an instruction is about to touch, checked and noted. `key` tells one pipeline of asynchronous operations of
  // one thread from another: products of one shape into one accumulator run in order.
  void touch(Warp& warp, const Instruction& in, const TensorRegion& region, Use use, uint64_t key, Report& report);
  // The same once it is over: a load or store by its warp, an asynchronous write or read by its mbarrier.
  void loaded(const Warp& warp, const TensorRegion& region);
  void stored(const Warp& warp, const TensorRegion& region);
  // Who synchronises from here on is behind the store.
  void publish(const Warp& warp, const TensorRegion& region);
  void written(const TensorRegion& region, int writer, uint32_t clock);
  void read(const TensorRegion& region, int reader, uint32_t clock);

private:
  struct Cell {
    uint64_t key = 0;  // of the asynchronous operation that wrote it last
    uint32_t write_clock = 0;
    uint32_t async_read_clock = 0;
    int16_t writer = -1;  // a warp, or beyond them an mbarrier
    int16_t async_reader = -1;
    uint16_t writes = 0;  // asynchronous ones in flight
    uint16_t reads = 0;
    uint16_t loads = 0;  // not waited for
    uint16_t stores = 0;
    bool initialised = false;
  };
  struct Range {
    int first, count;
  };
  template <class F>
  void for_cells(const TensorRegion& region, F f) {
    for (int column = region.column; column < region.column + region.columns; ++column) {
      for (int group = 0; group < kGroups; ++group) {
        if (region.groups >> group & 1) f(static_cast<size_t>(column * kGroups + group));
      }
    }
  }
  void check(Warp& warp, const Instruction& in, size_t index, Use use, uint64_t key, Report& report);

  std::vector<uint32_t> words_;
  std::vector<Cell> cells_;
  std::vector<uint32_t> read_clocks_;  // [cell][warp]
  std::vector<Range> blocks_;
  size_t warps_ = 0;
  bool relinquished_ = false;
  bool checked_ = true;
  bool strict_ = false;
};

// The pipeline of a thread's products of one shape into one accumulator, and that of its copies.
inline uint64_t pipeline_of(const Warp& warp, int lane, uint32_t address, uint32_t shape) {
  const uint64_t thread = static_cast<uint64_t>(warp.id * kLanes + lane) | uint64_t{1} << 16;
  return thread << 44 | static_cast<uint64_t>(address >> 16 & 0x7f) << 9 << 22 |
         static_cast<uint64_t>(address & 0x1ff) << 22 | (shape >> 11 & 0x3fffff);
}
inline constexpr uint64_t kCopies = uint64_t{1} << 43;
inline uint64_t copies_of(uint64_t pipeline) {
  return pipeline >> 44 << 44 | kCopies;
}

class Block;
// Lets the products end whose commits arrive at `object`, once somebody has asked twice; whether any did.
bool land_commits(Block& block, Mbarrier& object);

}  // namespace ptxsim
