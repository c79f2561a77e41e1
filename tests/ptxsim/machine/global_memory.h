// Global memory: the tensors that a launch may touch, bounds, and races between blocks or inside one.
//
// Any two conflicting accesses of different blocks are unordered, however the blocks happen to run here, unless the
// warp of the later one knows (knowledge.h) of the earlier one: it was released and acquired.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "knowledge.h"
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
  // Whose accesses follow.
  void enter(int block) { block_ = block; }

  uint8_t* access(const Warp& warp, const Instruction& in, uint64_t address, int bytes, Access kind, int lane,
                  Report& report);
  // Accesses with these meanings, at an address that passed access(). A relaxed one counts with a fence before (a
  // write) or after it (a read).
  void release(Warp& warp, uint64_t address);
  void acquire(Warp& warp, uint64_t address);
  void relaxed_write(Warp& warp, uint64_t address);
  void relaxed_read(Warp& warp, uint64_t address);
  void fence(Warp& warp);

private:
  static constexpr int kNobody = -1;
  static constexpr int kSeveral = -2;
  struct Cell {
    int32_t writer_block = kNobody;
    int32_t reader_block = kNobody;  // kSeveral when more than one
    uint32_t writer_clock = 0;       // of its warp
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
  void check(const Warp& warp, const Instruction& in, Cell& cell, Access kind, Report& report);
  void publish(const Knowledge& knowledge, uint64_t address) { released_[address].join(knowledge); }
  Knowledge all_of(const Warp& warp) const;
  void learn(Warp& warp, const Knowledge& knowledge);

  std::vector<Range> ranges_;
  Range* last_ = nullptr;  // most accesses go where the one before went
  const Program* program_ = nullptr;
  bool checked_ = true;
  int shift_ = 2;
  int block_ = 0;
  std::unordered_map<uint64_t, Knowledge> released_;
};

}  // namespace ptxsim
