// mma.sync m16n8k8 and m16n8k16 with f16, bf16 and tf32 operands.
#include "handlers.h"
#include "tensor_core.h"

namespace ptxsim {
namespace {

constexpr int kRows = 16, kColumns = 8, kMaxDepth = 16;

// Fragment layouts of the PTX ISA. A lane is (group, thread) = (lane / 4, lane % 4).
struct Fragments {
  float a[kRows][kMaxDepth];
  float b[kMaxDepth][kColumns];
  float c[kRows][kColumns];
};

uint64_t value_of(Warp& warp, const Operand& op, int i, int lane) {
  return warp.lanes(op.element(static_cast<size_t>(i)))[lane];
}
float half_of(uint64_t bits, int half, Type type) {
  return to_float(bits >> (16 * half) & 0xffff, type);
}

void load_16_bit(Warp& warp, const Instruction& in, Type type, Fragments& f) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < in.k / 4; ++i) {  // registers of A: rows +0 and +8, then columns +8
      const uint64_t bits = value_of(warp, in.operands[1], i, lane);
      for (int half = 0; half < 2; ++half)
        f.a[group + 8 * (i & 1)][thread * 2 + half + 8 * (i >> 1)] = half_of(bits, half, type);
    }
    for (int i = 0; i < in.k / 8; ++i) {
      const uint64_t bits = value_of(warp, in.operands[2], i, lane);
      for (int half = 0; half < 2; ++half) f.b[thread * 2 + half + 8 * i][group] = half_of(bits, half, type);
    }
  }
}

void load_tf32(Warp& warp, const Instruction& in, Fragments& f) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < in.k / 2; ++i)
      f.a[group + 8 * (i & 1)][thread + 4 * (i >> 1)] = tf32_operand(value_of(warp, in.operands[1], i, lane));
    for (int i = 0; i < in.k / 4; ++i)
      f.b[thread + 4 * i][group] = tf32_operand(value_of(warp, in.operands[2], i, lane));
  }
}

void load_accumulator(Warp& warp, const Operand& op, Type type, Fragments& f) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + 8 * (i >> 1), column = thread * 2 + (i & 1);
      f.c[row][column] = type == Type::F32 ? as_float(value_of(warp, op, i, lane))
                                           : half_of(value_of(warp, op, i / 2, lane), i % 2, Type::F16);
    }
  }
}

void store_accumulator(Warp& warp, const Operand& op, Type type, const Fragments& f) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    if (type == Type::F32) {
      for (int i = 0; i < 4; ++i)
        warp.lanes(op.elements[static_cast<size_t>(i)])[lane] =
            bits_of(f.c[group + 8 * (i >> 1)][thread * 2 + (i & 1)]);
    } else {
      for (int i = 0; i < 2; ++i) {
        const uint64_t low = Half::from_float(f.c[group + 8 * i][thread * 2]);
        warp.lanes(op.elements[static_cast<size_t>(i)])[lane] =
            low | static_cast<uint64_t>(Half::from_float(f.c[group + 8 * i][thread * 2 + 1])) << 16;
      }
    }
  }
}

void multiply(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  if (mask != kAllLanes) throw Fault("the warp is not converged at " + in.where());
  const Type operand_type = in.types[1];
  Fragments f;
  if (operand_type == Type::TF32) {
    load_tf32(warp, in, f);
  } else {
    load_16_bit(warp, in, operand_type, f);
  }
  load_accumulator(warp, in.operands[3], in.types[3], f);
  const TensorCore core = TensorCore::of(block.options.tensor_core, operand_type == Type::TF32, block.options.perturb);
  for (int row = 0; row < kRows; ++row) core.add_row(f.c[row], kColumns, f.a[row], f.b[0], kColumns, in.k);
  store_accumulator(warp, in.operands[0], in.types[0], f);
}

Handler select_mma(Instruction& in) {
  require_operands(in, 4);
  if (in.types.size() != 4) unsupported(in, "mma takes four types");
  const Type a = in.types[1];
  const bool shape = in.m == kRows && in.n == kColumns &&
                     ((a == Type::TF32 && (in.k == 4 || in.k == 8)) ||
                      ((a == Type::F16 || a == Type::BF16) && (in.k == 8 || in.k == 16)));
  const auto accumulates = [](Type type) { return type == Type::F32 || type == Type::F16; };
  if (!shape || in.types[2] != a || !accumulates(in.types[0]) || !accumulates(in.types[3]))
    unsupported(in, "mma form is not modelled");
  if (in.operands[0].kind != Operand::Kind::Vector) unsupported(in, "expected the result in braces");
  return multiply;
}

}  // namespace

const OpcodeRows& matrix_opcodes() {
  static const OpcodeRows rows = {{"mma", "sync aligned shape row col", select_mma}};
  return rows;
}

}  // namespace ptxsim
