// wgmma (sm_90): asynchronous products of a warpgroup, operands in shared memory by descriptor or A in registers.
//
// Each warp computes its own 16 rows of the 64, so the warpgroup needs no rendezvous here. With Options::late the
// operands are read at wgmma.wait_group, the latest moment allowed, else at the issue.
#include <algorithm>

#include "handlers.h"
#include "matrix_layout.h"
#include "tensor_core.h"

namespace ptxsim {
namespace {

constexpr int kDepth = 16;  // 16-bit elements along k
constexpr int kUnitElements = 8;
constexpr int kWarpRows = 16;  // of the warpgroup's 64
constexpr int kMaxColumns = 256;

// Bits 62-63 of a descriptor: 0 none, 1: 128 bytes, 2: 64, 3: 32.
MatrixLayout layout_of(uint64_t bits, bool transposed) {
  return MatrixLayout(bits, (bits >> 62) == 0 ? 0 : 4 - static_cast<int>(bits >> 62), 2, transposed);
}

struct Shape {
  bool a_in_registers;
  bool a_transposed, b_transposed;
  float scale_a, scale_b;
};

Shape shape_of(Warp& warp, const Instruction& in) {
  const auto immediate = [&](size_t i) { return static_cast<int32_t>(warp.lanes(in.operands[i].reg)[0]); };
  const bool registers = in.operands[1].kind == Operand::Kind::Vector;
  Shape shape{registers, false, false, static_cast<float>(immediate(4)), static_cast<float>(immediate(5))};
  if (!registers) shape.a_transposed = immediate(6) != 0;
  shape.b_transposed = immediate(registers ? 6 : 7) != 0;
  return shape;
}

// Calls put(mn, k, value) for every element of an operand in shared memory, times its sign.
template <class Put>
void load_shared(Block& block, Warp& warp, const Instruction& in, uint64_t bits, bool transposed, int first, int size,
                 float scale, Put put) {
  layout_of(bits, transposed).for_units(first, size, kDepth, [&](uint64_t address, int mn, int k) {
    block.shared.async_read(warp, in, address, kUnit, block.warps, block.report);
    for (int i = 0; i < kUnitElements; ++i) {
      uint16_t value;
      std::memcpy(&value, block.shared.data() + address + 2 * i, 2);
      put(transposed ? mn + i : mn, transposed ? k : k + i, scale * to_float(value, in.type));
    }
  });
}

// The register of D that holds (row, column) of the warp's 16 rows, and its lane.
struct Place {
  size_t reg;
  int lane;
};
Place place_of(int row, int column) {
  return {static_cast<size_t>(column / 8 * 4 + row / 8 * 2 + column % 2), row % 8 * 4 + column % 8 / 2};
}

void compute(Block& block, Warp& warp, const AsyncMatrix& op) {
  const Instruction& in = *op.in;
  const Shape shape = shape_of(warp, in);
  float a[kWarpRows][kDepth], b[kDepth][kMaxColumns];
  load_shared(block, warp, in, op.b_descriptor, shape.b_transposed, 0, in.n, shape.scale_b,
              [&](int n, int k, float value) { b[k][n] = value; });
  if (shape.a_in_registers) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const uint64_t bits = warp.lanes(in.operands[1].elements[static_cast<size_t>(i)])[lane];
        for (int half = 0; half < 2; ++half) {
          a[lane / 4 + 8 * (i & 1)][lane % 4 * 2 + half + 8 * (i >> 1)] =
              shape.scale_a * to_float(bits >> (16 * half) & 0xffff, in.type);
        }
      }
    }
  } else {
    load_shared(block, warp, in, op.a_descriptor, shape.a_transposed, warp.id % 4 * kWarpRows, kWarpRows, shape.scale_a,
                [&](int m, int k, float value) { a[m][k] = value; });
  }
  const TensorCore core = TensorCore::of(block.options.tensor_core, false, block.options.perturb);
  const std::vector<int>& registers = in.operands[0].elements;
  float sums[kMaxColumns];
  for (int row = 0; row < kWarpRows; ++row) {
    const auto element = [&](int column) -> uint64_t& {
      const Place place = place_of(row, column);
      return warp.lanes(registers[place.reg])[place.lane];
    };
    for (int column = 0; column < in.n; ++column) sums[column] = op.accumulate ? as_float(element(column)) : 0.0f;
    core.add_row(sums, in.n, a[row], b[0], kMaxColumns, kDepth);
    for (int column = 0; column < in.n; ++column) element(column) = bits_of(sums[column]);
  }
}

// Marks or frees the shared bytes that an operation reads while it is in flight.
void hold(Block& block, Warp& warp, const AsyncMatrix& op, int change) {
  const Shape shape = shape_of(warp, *op.in);
  const auto mark = [&](uint64_t address, int, int) { block.shared.hold(address, kUnit, change); };
  layout_of(op.b_descriptor, shape.b_transposed).for_units(0, op.in->n, kDepth, mark);
  if (!shape.a_in_registers) {
    layout_of(op.a_descriptor, shape.a_transposed).for_units(warp.id % 4 * kWarpRows, kWarpRows, kDepth, mark);
  }
}

void set_pending(Warp& warp, const AsyncMatrix& op) {
  for (const int reg : op.in->operands[0].elements) {
    uint8_t& pending = warp.pending[static_cast<size_t>(reg)];
    warp.pending_count += !pending;
    pending = 1;
  }
}

void multiply_async(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  if (mask != kAllLanes) throw Fault("the warp is not converged at " + in.where());
  if (warp.fence_epoch == kBeforeAnyFence) {
    block.report.add(Finding::WgmmaFence, [&] { return "no wgmma.fence before the first wgmma, " + in.where(); });
  }
  const auto fenced = [&](const Operand& op) {
    for (const int reg : op.elements) {
      if (warp.written_epoch[static_cast<size_t>(reg)] != warp.fence_epoch) continue;
      block.report.add(Finding::WgmmaFence,
                       [&] { return "registers written since the last wgmma.fence, " + in.where(); });
      return;
    }
  };
  fenced(in.operands[0]);
  const bool registers = in.operands[1].kind == Operand::Kind::Vector;
  if (registers) fenced(in.operands[1]);
  const AsyncMatrix op{&in, registers ? 0 : operand(warp, in, 1)[0], operand(warp, in, 2)[0],
                       (operand(warp, in, 3)[0] & 1) != 0};
  set_pending(warp, op);
  hold(block, warp, op, +1);
  if (!block.options.late) compute(block, warp, op);
  warp.open_matrices.push_back(op);
}

void commit(Block&, Warp& warp, const Instruction&, LaneMask) {
  warp.matrix_groups.push_back(std::move(warp.open_matrices));
  warp.open_matrices.clear();
}

void wait(Block& block, Warp& warp, const Instruction& in, LaneMask) {
  const auto keep = static_cast<size_t>(operand(warp, in, 0)[0]);
  if (warp.matrix_groups.size() > keep) {
    const auto end = warp.matrix_groups.end() - static_cast<std::ptrdiff_t>(keep);
    for (auto group = warp.matrix_groups.begin(); group != end; ++group) {
      for (const AsyncMatrix& op : *group) {
        if (block.options.late) compute(block, warp, op);
        hold(block, warp, op, -1);
      }
    }
    warp.matrix_groups.erase(warp.matrix_groups.begin(), end);
  }
  std::fill(warp.pending.begin(), warp.pending.end(), 0);
  warp.pending_count = 0;
  for (const auto& group : warp.matrix_groups) {
    for (const AsyncMatrix& op : group) set_pending(warp, op);
  }
  for (const AsyncMatrix& op : warp.open_matrices) set_pending(warp, op);
}

void fence(Block&, Warp& warp, const Instruction&, LaneMask) {
  ++warp.fence_epoch;
}

Handler select_wgmma(Instruction& in) {
  const bool registers = in.operands.size() > 1 && in.operands[1].kind == Operand::Kind::Vector;
  require_operands(in, registers ? 7 : 8);
  if (in.first_type != Type::F32 || (in.type != Type::F16 && in.type != Type::BF16) || in.m != 64 || in.k != kDepth) {
    unsupported(in, "wgmma form is not modelled");
  }
  return multiply_async;
}
template <Handler handler>
Handler always(Instruction&) {
  return handler;
}

}  // namespace

const OpcodeRows& wgmma_opcodes() {
  static const OpcodeRows rows = {
      {"wgmma.mma_async", "sync aligned shape", select_wgmma},
      {"wgmma.commit_group", "sync aligned", always<commit>, false},
      {"wgmma.wait_group", "sync aligned", always<wait>, false},
      {"wgmma.fence", "sync aligned", always<fence>, false},
  };
  return rows;
}

}  // namespace ptxsim
