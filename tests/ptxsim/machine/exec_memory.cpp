// ld, st, ldmatrix, stmatrix.
#include "handlers.h"
#include "traffic.h"

namespace ptxsim {
namespace {

constexpr uint8_t kAcquire = 1, kRelease = 2, kVolatile = 4;  // Instruction::mode

// Shared addresses are 32 bits wide and wrap.
void gather_addresses(Warp& warp, const Instruction& in, const Operand& where, LaneMask mask, uint64_t* addresses) {
  const uint64_t* base = warp.lanes(where.reg);
  const auto offset = static_cast<uint64_t>(where.offset);
  const bool shared = in.space == Space::Shared;
  for_lanes(mask,
            [&](int lane) { addresses[lane] = shared ? (base[lane] + offset) & 0xffffffffu : base[lane] + offset; });
}

void count_traffic(Block& block, const Instruction& in, const uint64_t* addresses, LaneMask mask, int bytes) {
  if (!block.options.stats) return;
  uint64_t first = addresses[__builtin_ctz(mask)];
  const Space space = block.resolve(in, first);  // lanes that differ in their space are counted as the first one
  if (space == Space::Shared) count_bank_conflicts(block.report, in, addresses, mask, bytes);
  if (space == Space::Global) count_sectors(block.report, addresses, mask, bytes);
}

void load(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  const int size = size_of(in.type), bytes = size * in.vector;
  uint64_t addresses[kLanes] = {};
  gather_addresses(warp, in, in.operands[1], mask, addresses);
  count_traffic(block, in, addresses, mask, bytes);
  for_lanes(mask, [&](int lane) {
    const uint8_t* from = block.memory(warp, in, addresses[lane], bytes, false, lane, in.mode != 0);
    if (in.mode && !block.is_shared(in, addresses[lane])) {
      in.mode& kAcquire ? block.global.acquire(warp, addresses[lane])
                        : block.global.relaxed_read(warp, addresses[lane]);
    }
    for (int i = 0; i < in.vector; ++i) {
      uint64_t value = 0;
      std::memcpy(&value, from + i * size, static_cast<size_t>(size));
      // A register wider than the type holds the extended value.
      if (is_signed(in.type)) value = static_cast<uint64_t>(sign_extend(value, size));
      warp.lanes(in.operands[0].element(static_cast<size_t>(i)))[lane] = value;
    }
  });
}

void store(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  const int size = size_of(in.type), bytes = size * in.vector;
  uint64_t addresses[kLanes] = {};
  gather_addresses(warp, in, in.operands[0], mask, addresses);
  count_traffic(block, in, addresses, mask, bytes);
  for_lanes(mask, [&](int lane) {
    uint8_t data[32];
    for (int i = 0; i < in.vector; ++i) {
      std::memcpy(data + i * size, &warp.lanes(in.operands[1].element(static_cast<size_t>(i)))[lane],
                  static_cast<size_t>(size));
    }
    if (in.mode && !block.is_shared(in, addresses[lane])) {
      in.mode& kRelease ? block.global.release(warp, addresses[lane])
                        : block.global.relaxed_write(warp, addresses[lane]);
    }
    uint64_t address = addresses[lane];
    if (in.mode == 0 && block.resolve(in, address) == Space::Shared) {
      block.shared.store(warp, in, address, data, bytes, lane, block.report);
    } else {
      std::memcpy(block.memory(warp, in, addresses[lane], bytes, true, lane, in.mode != 0), data,
                  static_cast<size_t>(bytes));
    }
  });
}

template <bool is_load>
Handler select_access(Instruction& in) {
  require_operands(in, 2);
  if (in.type == Type::B128) unsupported(in, "128-bit registers are not modelled");
  if (in.has("L2::cache_hint")) in.operands.pop_back();
  in.mode = (in.has("acquire") ? kAcquire : 0) | (in.has("release") ? kRelease : 0) |
            (in.has("volatile") || in.has("relaxed") ? kVolatile : 0);
  return is_load ? load : store;
}

constexpr int kRowBytes = 16;  // of an 8x8 matrix of 16-bit values

// Where element (row, column) of an 8x8 matrix of 16-bit values lies: lane and half of its register.
struct MatrixElement {
  int row, column;
};
MatrixElement element_of(int lane, int half, bool transposed) {
  const int row = lane / 4, column = lane % 4 * 2 + half;
  return transposed ? MatrixElement{column, row} : MatrixElement{row, column};
}

// The addresses of the rows of all matrices, one to a lane; counts their bank conflicts.
void matrix_rows(Block& block, Warp& warp, const Instruction& in, const Operand& where, LaneMask mask,
                 uint64_t* addresses) {
  if (mask != kAllLanes) throw Fault("the warp is not converged at " + in.where());
  gather_addresses(warp, in, where, kAllLanes, addresses);
  if (!block.options.stats) return;
  for (int matrix = 0; matrix < in.vector; ++matrix)
    count_bank_conflicts(block.report, in, addresses, LaneMask{0xff} << 8 * matrix, kRowBytes);
}

void load_matrices(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  const bool transposed = in.has("trans");
  uint64_t addresses[kLanes];
  matrix_rows(block, warp, in, in.operands[1], mask, addresses);
  // Every row is read before any register is written: the address register may be a destination.
  const uint8_t* rows[kLanes];
  for (int row = 0; row < 8 * in.vector; ++row)
    rows[row] =
        block.shared.access(warp, in, addresses[row], kRowBytes, SharedMemory::Access::Read, kWarpReads, block.report);
  for (int matrix = 0; matrix < in.vector; ++matrix) {
    uint64_t* values = warp.lanes(in.operands[0].element(static_cast<size_t>(matrix)));
    for (int lane = 0; lane < kLanes; ++lane) {
      values[lane] = 0;
      for (int half = 0; half < 2; ++half) {
        const MatrixElement at = element_of(lane, half, transposed);
        uint16_t value;
        std::memcpy(&value, rows[8 * matrix + at.row] + 2 * at.column, 2);
        values[lane] |= static_cast<uint64_t>(value) << (16 * half);
      }
    }
  }
}

void store_matrices(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  const bool transposed = in.has("trans");
  uint64_t addresses[kLanes];
  matrix_rows(block, warp, in, in.operands[0], mask, addresses);
  for (int matrix = 0; matrix < in.vector; ++matrix) {
    uint8_t rows[8][kRowBytes];
    const uint64_t* values = warp.lanes(in.operands[1].element(static_cast<size_t>(matrix)));
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const MatrixElement at = element_of(lane, half, transposed);
        const auto value = static_cast<uint16_t>(values[lane] >> (16 * half));
        std::memcpy(&rows[at.row][2 * at.column], &value, 2);
      }
    }
    for (int row = 0; row < 8; ++row)
      block.shared.store(warp, in, addresses[8 * matrix + row], rows[row], kRowBytes, kWarpWrites, block.report);
  }
}

template <bool is_load>
Handler select_matrix_access(Instruction& in) {
  require_operands(in, 2);
  if (in.type != Type::B16 || !in.has("m8n8")) unsupported(in, "matrix shape is not modelled");
  in.vector = in.has("x4") ? 4 : in.has("x2") ? 2 : 1;
  in.space = Space::Shared;
  return is_load ? load_matrices : store_matrices;
}

}  // namespace

const OpcodeRows& memory_opcodes() {
  static const char* const access =
      "global shared shared::cta param param::entry local const weak relaxed acquire release volatile cta gpu sys nc "
      "ca cg cs lu cv wb wt v2 v4 v8 cache";
  static const char* const matrix = "sync aligned m8n8 x1 x2 x4 trans shared shared::cta";
  static const OpcodeRows rows = {
      {"ld", access, select_access<true>},
      {"st", access, select_access<false>, false},
      {"ldmatrix", matrix, select_matrix_access<true>},
      {"stmatrix", matrix, select_matrix_access<false>, false},
  };
  return rows;
}

}  // namespace ptxsim
