// Global memory: the tensors that a launch may touch, bounds, and races between blocks or inside one.
//
// Blocks run one after another, so a race between two of them is no matter of chance here: any two conflicting
// accesses of different blocks are unordered, unless an atomic of the later one acquired what the earlier one released.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "program.h"
#include "report.h"

namespace ptxsim {

class GlobalMemory {
public:
  enum class Access : uint8_t { Read, AtomicRead, Write, Atomic };

  void allow(uint64_t address, uint64_t bytes, bool writable) {
    ranges_.push_back({address, address + bytes, writable, {}});
  }
  void start(const Program& program, const Options& options);
  void start_block(int block);

  uint8_t* access(const Warp& warp, const Instruction& in, uint64_t address, int bytes, Access kind, int lane,
                  Report& report);
  // An atomic or a load or store with that meaning, or any atomic of a kernel that has fences.
  void release(uint64_t address);
  void acquire(uint64_t address);

private:
  static constexpr int kNobody = -1;
  static constexpr int kSeveral = -2;
  struct Cell {
    int32_t writer_block = kNobody;
    int32_t reader_block = kNobody;  // kSeveral when more than one
    uint32_t writer_time = 0;        // releases that the writer's block had done
    uint32_t reader_time = 0;
    uint32_t writer_clock = 0;  // of its warp, for accesses of the same block
    uint32_t reader_clock = 0;
    int16_t writer_warp = kNobody;
    int16_t reader_warp = kNobody;  // kSeveral
    bool atomic = false;            // the last write was one
    bool readers_atomic = false;    // all reads since it were
  };
  struct Range {
    uint64_t begin, end;
    bool writable;
    std::vector<Cell> cells;
  };
  using Times = std::unordered_map<int, uint32_t>;  // block -> its releases that are ordered before

  void check(const Warp& warp, const Instruction& in, Cell& cell, Access kind, Report& report);
  bool ordered(int block, uint32_t time) const;

  std::vector<Range> ranges_;
  Range* last_ = nullptr;  // most accesses go where the one before went
  const Program* program_ = nullptr;
  bool checked_ = true;
  int shift_ = 2;
  int block_ = 0;
  uint32_t time_ = 0;
  Times acquired_;
  std::unordered_map<uint64_t, Times> released_;
};

}  // namespace ptxsim
