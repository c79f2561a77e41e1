// Runs the blocks of a grid in order, or in reverse.
#include "launch.h"

namespace ptxsim {

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
  Block block(program, options, global, report, launch.params, launch.grid, launch.threads, launch.dynamic_shared);
  const uint32_t blocks = launch.grid.count();
  for (uint32_t i = 0; i < blocks; ++i) {
    const uint32_t at = options.reverse ? blocks - 1 - i : i;
    block.run({at % launch.grid.x, at / launch.grid.x % launch.grid.y, at / launch.grid.x / launch.grid.y});
  }
  return report;
}

}  // namespace ptxsim
