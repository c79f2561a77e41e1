// Runs the blocks of a grid in order, or in reverse; some at a time, if they may wait for one another.
#include "launch.h"

#include <memory>

namespace ptxsim {
namespace {

// Blocks that may wait for one another run so many at a time, in stretches of up to so many turns: enough that one
// catches up with another, and has to wait.
constexpr size_t kResident = 16;
constexpr uint64_t kStretch = 32;

}  // namespace

Report run(const Program& program, Launch launch, const Options& options) {
  if (program.max_threads && launch.threads.count() > static_cast<uint32_t>(program.max_threads)) {
    throw Fault("the block has " + std::to_string(launch.threads.count()) + " threads, the kernel declares at most " +
                std::to_string(program.max_threads));
  }
  launch.params.resize(static_cast<size_t>(program.param_bytes));
  Report report;
  report.opcodes.assign(program.statistic_names.size(), 0);
  report.executed.assign(program.code.size(), 0);
  report.conflicts.assign(program.code.size(), {});
  GlobalMemory global;
  for (const TensorRange& tensor : launch.tensors) global.allow(tensor.address, tensor.bytes, tensor.writable);
  global.start(program, options);
  const uint32_t blocks = launch.grid.count();
  uint32_t next = 0;
  std::vector<std::unique_ptr<Block>> resident;
  for (size_t i = 0; i < (program.polls ? kResident : 1) && i < blocks; ++i) {
    resident.push_back(std::make_unique<Block>(program, options, global, report, launch.params, launch.grid,
                                               launch.threads, launch.dynamic_shared));
  }
  const auto start = [&](Block& block) {
    const uint32_t at = options.reverse ? blocks - 1 - next : next;
    block.start({at % launch.grid.x, at / launch.grid.x % launch.grid.y, at / launch.grid.x / launch.grid.y});
    ++next;
  };
  for (const auto& block : resident) start(*block);
  while (!resident.empty()) {
    const size_t i = resident.size() == 1 ? 0 : resident.front()->random() % resident.size();
    bool alive = true;
    for (uint64_t left = 1 + resident[i]->random() % kStretch; left && alive; --left) alive = resident[i]->turn();
    if (alive) continue;
    if (next < blocks) {
      start(*resident[i]);
    } else {
      resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  return report;
}

}  // namespace ptxsim
