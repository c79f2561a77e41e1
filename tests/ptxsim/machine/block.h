// One thread block: its warps, shared memory and barriers, and the schedule that interleaves the warps.
#pragma once

#include <string>
#include <vector>

#include "barriers.h"
#include "global_memory.h"
#include "mbarrier.h"
#include "program.h"
#include "report.h"
#include "shared_memory.h"
#include "tensor_memory.h"
#include "warp.h"

namespace ptxsim {

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
  uint32_t count() const { return x * y * z; }
};

class Block {
public:
  Block(const Program& program, const Options& options, GlobalMemory& global, Report& report,
        std::vector<uint8_t>& params, Dim grid, Dim threads, int dynamic_shared);

  // Makes ready the block at `at` of the grid.
  void start(Dim at);
  // Runs one warp for a while; false once the block has ended.
  bool turn();

  // The bytes of one lane's access in any space, after its checks.
  uint8_t* memory(Warp& warp, const Instruction& in, uint64_t address, int bytes, bool write, int lane,
                  bool atomic = false);
  // The space and space-relative address that a generic address means.
  Space resolve(const Instruction& in, uint64_t& address) const;
  bool is_shared(const Instruction& in, uint64_t address) const { return resolve(in, address) == Space::Shared; }

  const std::vector<uint8_t>& params() const { return params_; }

  // Xorshift: a schedule is a function of the seed alone.
  uint64_t random();
  // An approximate function's result, moved by up to 2 ulp if the options ask for it.
  float approximate(float value);

  const Program& program;
  const Options& options;
  GlobalMemory& global;
  Report& report;
  SharedMemory shared;
  Mbarriers mbarriers;
  TensorMemory tensor;
  std::vector<Warp> warps;

private:
  void finish();
  void start_warp(Warp& warp, int id, Dim at);
  uint64_t special(Special name, int warp, int lane, Dim at) const;
  // Runs one instruction; false when the warp should give way.
  bool step(Warp& warp);
  bool take_branch(Warp& warp, const Instruction& in, LaneMask active, LaneMask taken);
  bool exit_lanes(Warp& warp, LaneMask active, LaneMask leaving);
  void set_pc(Warp& warp, LaneMask active, uint32_t pc);
  void check_wgmma_registers(Warp& warp, const Instruction& in);
  void check_tensor_registers(Warp& warp, const Instruction& in);

  std::vector<uint8_t>& params_;
  const Dim grid_, threads_;
  const int dynamic_shared_;
  int index_ = 0;
  uint64_t turns_ = 0;
  size_t idle_ = 0;  // turns in a row in which a warp only asked an mbarrier in vain
  std::vector<int> ready_;
  Barriers barriers_;
  uint64_t random_state_;
};

}  // namespace ptxsim
