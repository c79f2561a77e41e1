// tcgen05 (sm_100): tensor memory, its loads and stores, and the asynchronous products and copies of one block.
//
// An operation of a thread is checked when it is issued and computed, with Options::late, when a commit after it
// arrives at its mbarrier, the latest moment allowed, else at once. What it reads and writes is in flight until then.
#include <algorithm>

#include "handlers.h"
#include "matrix_layout.h"
#include "tensor_core.h"

namespace ptxsim {
namespace {

using Use = TensorMemory::Use;

constexpr int kMaxRows = 128, kMaxColumns = 256, kMaxDepth = 16;
constexpr uint8_t kAllGroups = 0xff, kLowerHalves = 0x55, kUpperHalves = 0xaa;

void require_warp(const Instruction& in, LaneMask mask) {
  if (mask != kAllLanes) throw Fault("the warp is not converged at " + in.where());
}

// The one value that all lanes must hold.
uint64_t uniform(Warp& warp, const Instruction& in, const Operand& op, LaneMask mask) {
  const uint64_t* values = warp.lanes(op.reg);
  const uint64_t first = values[__builtin_ctz(mask)];
  for_lanes(mask, [&](int lane) {
    if (values[lane] != first) throw Fault("an operand that differs between lanes, " + in.where());
  });
  return first + static_cast<uint64_t>(op.offset);
}

// Allocation.

void allocate(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  require_warp(in, mask);
  const uint64_t at = uniform(warp, in, in.operands[0], mask) & 0xffffffffu;
  const uint32_t address = block.tensor.allocate(in, truncate(uniform(warp, in, in.operands[1], mask), 4));
  std::memcpy(block.shared.access(warp, in, at, 4, SharedMemory::Access::Write, kWarpWrites, block.report), &address,
              4);
}

void free_columns(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  require_warp(in, mask);
  const auto address = static_cast<uint32_t>(uniform(warp, in, in.operands[0], mask));
  block.tensor.free(warp, in, address, truncate(uniform(warp, in, in.operands[1], mask), 4), block.report);
}

void relinquish(Block& block, Warp&, const Instruction& in, LaneMask mask) {
  require_warp(in, mask);
  block.tensor.relinquish();
}

// Loads and stores: Instruction::mode is the shape, Instruction::n how often it is repeated along the columns.

enum Shape : uint8_t { k32x32b, k16x32bx2, k16x128b, k16x256b };

int registers_of(const Instruction& in) {
  return in.mode == k16x128b ? 2 * in.n : in.mode == k16x256b ? 4 * in.n : in.n;
}

struct Place {
  int lane, column;  // from the address on
};
Place place_of(uint8_t shape, int reg, int lane, int split) {
  switch (shape) {
    case k16x32bx2:
      return {lane % 16, reg + (lane < 16 ? 0 : split)};
    case k16x128b:
      return {lane / 4 + 8 * (reg % 2), 4 * (reg / 2) + lane % 4};
    case k16x256b:
      return {lane / 4 + 8 * (reg / 2 % 2), 8 * (reg / 4) + lane % 4 * 2 + reg % 2};
    default:
      return {lane, reg};
  }
}

// A load or store, checked: where it starts, and the two column ranges (of which all shapes but one have one) in it.
struct Movement {
  int lane, column, split = 0;
  std::vector<TensorRegion> regions;
};
Movement movement_of(Block& block, Warp& warp, const Instruction& in, size_t address_at, LaneMask mask, Use use) {
  require_warp(in, mask);
  const auto address = static_cast<uint32_t>(uniform(warp, in, in.operands[address_at], mask));
  Movement move{static_cast<int>(address >> 16), static_cast<int>(address & 0xffff), 0, {}};
  const int quarter = warp.id % 4 * 32;
  const bool whole = in.mode == k32x32b;
  if (move.lane != quarter && (whole || move.lane != quarter + 16)) {
    throw Fault("lanes of tensor memory from " + std::to_string(move.lane) + " on, of which warp " +
                std::to_string(warp.id) + " reaches those from " + std::to_string(quarter) + " on, " + in.where());
  }
  const auto groups = static_cast<uint8_t>((whole ? 3 : 1) << (move.lane / TensorMemory::kGroup));
  const int columns = in.mode == k16x128b ? 4 * in.n : in.mode == k16x256b ? 8 * in.n : in.n;
  move.regions.push_back({groups, move.column, columns});
  if (in.mode == k16x32bx2) {
    move.split = static_cast<int>(warp.lanes(in.operands[address_at + 1].reg)[0]);
    if (move.split) move.regions.push_back({groups, move.column + move.split, columns});
  }
  for (const TensorRegion& region : move.regions) block.tensor.touch(warp, in, region, use, 0, block.report);
  return move;
}

void load(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  const Movement move = movement_of(block, warp, in, 1, mask, Use::Load);
  const Operand& to = in.operands[0];
  for (int i = 0; i < registers_of(in); ++i) {
    uint64_t* d = warp.lanes(to.element(static_cast<size_t>(i)));
    for (int lane = 0; lane < kLanes; ++lane) {
      const Place place = place_of(in.mode, i, lane, move.split);
      d[lane] = block.tensor.word(move.lane + place.lane, move.column + place.column);
    }
    if (block.options.tensor_strict) warp.tensor_registers.push_back(to.element(static_cast<size_t>(i)));
  }
  warp.tensor_loads.insert(warp.tensor_loads.end(), move.regions.begin(), move.regions.end());
}

void store(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  const Movement move = movement_of(block, warp, in, 0, mask, Use::Store);
  const Operand& from = in.operands.back();
  for (int i = 0; i < registers_of(in); ++i) {
    const uint64_t* s = warp.lanes(from.element(static_cast<size_t>(i)));
    for (int lane = 0; lane < kLanes; ++lane) {
      const Place place = place_of(in.mode, i, lane, move.split);
      block.tensor.word(move.lane + place.lane, move.column + place.column) = static_cast<uint32_t>(s[lane]);
    }
  }
  warp.tensor_stores.insert(warp.tensor_stores.end(), move.regions.begin(), move.regions.end());
}

void wait_loads(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  require_warp(in, mask);
  for (const TensorRegion& region : warp.tensor_loads) block.tensor.loaded(warp, region);
  warp.tensor_loads.clear();
  warp.tensor_registers.clear();
}

void wait_stores(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  require_warp(in, mask);
  for (const TensorRegion& region : warp.tensor_stores) {
    block.tensor.stored(warp, region);
    if (block.options.tensor_strict) warp.tensor_unpublished.push_back(region);
  }
  warp.tensor_stores.clear();
}

void fence_before(Block& block, Warp& warp, const Instruction&, LaneMask) {
  for (const TensorRegion& region : warp.tensor_unpublished) block.tensor.publish(warp, region);
  warp.tensor_unpublished.clear();
}

void fence_after(Block&, Warp& warp, const Instruction&, LaneMask) {
  warp.tensor_fenced = warp.clock;
}

// Products.

// What the instruction descriptor says of kind f16 and tf32.
class Product {
public:
  explicit Product(const TensorOperation& op) : op_(op), tf32_(op.in->has("kind::tf32")) {
    const auto field = [&](int shift, uint32_t mask) { return op.shape >> shift & mask; };
    rows = static_cast<int>(field(24, 0x1f)) * 16;
    columns = static_cast<int>(field(17, 0x3f)) * 8;
    a_transposed = field(15, 1);
    b_transposed = field(16, 1);
    a_sign = field(13, 1) ? -1.0f : 1.0f;
    b_sign = field(14, 1) ? -1.0f : 1.0f;
    a_type = type_of(field(7, 7));
    b_type = type_of(field(10, 7));
    depth = tf32_ ? 8 : 16;
    element_bytes = tf32_ ? 4 : 2;
    a_in_tensor = op.in->operands[1].kind == Operand::Kind::Address;
    if (field(4, 3) != 1) refuse("a result that is not float32");
    if (op.shape & 0xe080004fu) refuse("sparsity, saturation, shifts or a reserved bit");
    const bool narrow = rows == 64 && columns >= 8 && columns <= 256;
    const bool wide = rows == 128 && columns >= 16 && columns <= 256 && columns % 16 == 0;
    if (!narrow && !wide) {
      throw Fault("no product of " + std::to_string(rows) + " x " + std::to_string(columns) + ", " + op.in->where());
    }
    if (a_in_tensor && a_transposed) throw Fault("a transposed A in tensor memory, " + op.in->where());
  }

  // The lane of a row from the address of the matrix on: 64 rows lie in the lower or upper halves of 32 lanes each.
  int lane_of(uint32_t address, int row) const {
    return static_cast<int>(address >> 16) + (rows == 128 ? row : row / 16 * 32 + row % 16);
  }
  TensorRegion region(uint32_t address, int width) const {
    const uint32_t lane = address >> 16;
    if (lane != 0 && (rows == 128 || lane != 16)) {
      throw Fault("a matrix in tensor memory from lane " + std::to_string(lane) + " on, " + op_.in->where());
    }
    const uint8_t groups = rows == 128 ? kAllGroups : lane ? kUpperHalves : kLowerHalves;
    return {groups, static_cast<int>(address & 0xffff), width};
  }
  TensorRegion result() const { return region(op_.d, columns); }
  TensorRegion operand() const { return region(static_cast<uint32_t>(op_.a), depth * element_bytes / 4); }

  MatrixLayout layout(uint64_t bits, bool transposed) const {
    static const int logs[8] = {0, -1, 3, -1, 2, -1, 1, -1};
    const int log = logs[bits >> 61];
    if (log < 0) refuse("a swizzle that is not modelled");
    if ((bits >> 46 & 7) != 1 || (bits >> 53 & 0xff) != 0) throw Fault("no matrix descriptor, " + op_.in->where());
    if (bits >> 49 & 7) refuse("a base offset");
    if (bits >> 52 & 1) refuse("an absolute leading address");
    return MatrixLayout(bits, log, element_bytes, transposed);
  }
  // visit(shared address, row, k) of every 16 bytes that it reads.
  template <class Visit>
  void for_a(Visit visit) const {
    if (!a_in_tensor) layout(op_.a, a_transposed).for_units(0, rows, depth, visit);
  }
  template <class Visit>
  void for_b(Visit visit) const {
    layout(op_.b, b_transposed).for_units(0, columns, depth, visit);
  }

  float value(uint32_t bits, Type type) const { return tf32_ ? tf32_operand(bits) : to_float(bits & 0xffff, type); }
  bool tf32() const { return tf32_; }

  int rows, columns, depth, element_bytes;
  bool a_transposed, b_transposed, a_in_tensor;
  float a_sign, b_sign;
  Type a_type, b_type;

private:
  [[noreturn]] void refuse(const std::string& what) const { unsupported(*op_.in, what + " is not modelled"); }
  Type type_of(uint32_t code) const {
    if (tf32_ && code == 2) return Type::TF32;
    if (!tf32_ && code < 2) return code ? Type::BF16 : Type::F16;
    throw Fault("an operand's type that the kind does not have, " + op_.in->where());
  }
  const TensorOperation& op_;
  const bool tf32_;
};

// Calls put(row, k, value) for the elements of 16 bytes of shared memory.
template <class Put>
void elements(Block& block, const Product& product, uint64_t address, int mn, int k, bool transposed, Type type,
              Put put) {
  for (int i = 0; i < kUnit / product.element_bytes; ++i) {
    uint32_t bits = 0;
    const auto bytes = static_cast<size_t>(product.element_bytes);
    std::memcpy(&bits, block.shared.data() + address + static_cast<size_t>(i) * bytes, bytes);
    put(transposed ? mn + i : mn, transposed ? k : k + i, product.value(bits, type));
  }
}

void compute(Block& block, const TensorOperation& op) {
  const Product product(op);
  static thread_local float a[kMaxRows][kMaxDepth], b[kMaxDepth][kMaxColumns];
  product.for_b([&](uint64_t address, int n, int k) {
    elements(block, product, address, n, k, product.b_transposed, product.b_type,
             [&](int column, int row, float value) { b[row][column] = product.b_sign * value; });
  });
  product.for_a([&](uint64_t address, int m, int k) {
    elements(block, product, address, m, k, product.a_transposed, product.a_type,
             [&](int row, int column, float value) { a[row][column] = product.a_sign * value; });
  });
  for (int row = 0; product.a_in_tensor && row < product.rows; ++row) {
    const auto address = static_cast<uint32_t>(op.a);
    for (int k = 0; k < product.depth; ++k) {
      const int each = 4 / product.element_bytes;
      const uint32_t word = block.tensor.word(product.lane_of(address, row), product.operand().column + k / each);
      a[row][k] = product.a_sign * product.value(word >> (k % each * 16), product.a_type);
    }
  }
  const TensorCore core = TensorCore::of(block.options.tensor_core, product.tf32(), block.options.perturb);
  const int first = product.result().column;
  float sums[kMaxColumns];
  for (int row = 0; row < product.rows; ++row) {
    const int lane = product.lane_of(op.d, row);
    for (int n = 0; n < product.columns; ++n) {
      sums[n] = op.accumulate ? as_float(block.tensor.word(lane, first + n)) : 0.0f;
    }
    core.add_row(sums, product.columns, a[row], b[0], kMaxColumns, product.depth);
    for (int n = 0; n < product.columns; ++n) {
      block.tensor.word(lane, first + n) = static_cast<uint32_t>(bits_of(sums[n]));
    }
  }
}

void multiply(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  for_lanes(mask, [&](int lane) {
    TensorOperation op{&in, lane};
    const auto value = [&](size_t i) {
      return warp.lanes(in.operands[i].reg)[lane] + static_cast<uint64_t>(in.operands[i].offset);
    };
    op.d = static_cast<uint32_t>(value(0));
    op.a = value(1);
    op.b = value(2);
    op.shape = static_cast<uint32_t>(value(3));
    op.accumulate = ((value(4) & 1) != 0) != in.operands[4].negated;
    const Product product(op);
    const uint64_t key = pipeline_of(warp, lane, op.d, op.shape);
    const auto visit = [&](uint64_t address, int, int) {
      block.shared.async_read(warp, in, address, kUnit, block.warps, block.report);
      block.shared.hold(address, kUnit, +1);
    };
    product.for_a(visit);
    product.for_b(visit);
    if (product.a_in_tensor) block.tensor.touch(warp, in, product.operand(), Use::Operand, key, block.report);
    block.tensor.touch(warp, in, product.result(), op.accumulate ? Use::Accumulate : Use::Result, key, block.report);
    if (!block.options.late) compute(block, op);
    warp.tensor_operations.push_back(std::move(op));
  });
}

// Copies from shared memory: rows of 128 or 256 bits in the layout of a K-major operand of 16-bit elements.

struct Copy {
  int rows, units, copies;  // rows of so many units of 16 bytes, `copies` times one under another
};
Copy copy_of(const Instruction& in) {
  if (in.has("128x256b")) return {128, 2, 1};
  if (in.has("128x128b")) return {128, 1, 1};
  return {32, 1, 4};
}
MatrixLayout source_of(const TensorOperation& op) {
  static const int logs[8] = {0, -1, 3, -1, 2, -1, 1, -1};
  const int log = logs[op.a >> 61];
  if (log < 0 || (op.a >> 49 & 0xf)) unsupported(*op.in, "the descriptor's swizzle or base is not modelled");
  if ((op.a >> 46 & 7) != 1) throw Fault("no matrix descriptor, " + op.in->where());
  return MatrixLayout(op.a, log, 2, false);
}
TensorRegion copied(const TensorOperation& op) {
  if (op.d >> 16) throw Fault("a copy that does not start at lane 0, " + op.in->where());
  return {kAllGroups, static_cast<int>(op.d & 0xffff), copy_of(*op.in).units * 4};
}

void copy_now(Block& block, const TensorOperation& op) {
  const Copy shape = copy_of(*op.in);
  source_of(op).for_units(0, shape.rows, shape.units * 8, [&](uint64_t address, int row, int k) {
    for (int i = 0; i < 4; ++i) {
      uint32_t word;
      std::memcpy(&word, block.shared.data() + address + 4 * i, 4);
      for (int n = 0; n < shape.copies; ++n) {
        block.tensor.word(row + n * shape.rows, static_cast<int>(op.d & 0xffff) + k / 2 + i) = word;
      }
    }
  });
}

void copy(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  for_lanes(mask, [&](int lane) {
    TensorOperation op{&in, lane};
    op.d = static_cast<uint32_t>(warp.lanes(in.operands[0].reg)[lane] + static_cast<uint64_t>(in.operands[0].offset));
    op.a = warp.lanes(in.operands[1].reg)[lane];
    const Copy shape = copy_of(in);
    source_of(op).for_units(0, shape.rows, shape.units * 8, [&](uint64_t address, int, int) {
      block.shared.async_read(warp, in, address, kUnit, block.warps, block.report);
      block.shared.hold(address, kUnit, +1);
    });
    const uint64_t key = copies_of(pipeline_of(warp, lane, 0, 0));
    block.tensor.touch(warp, in, copied(op), Use::Copy, key, block.report);
    if (!block.options.late) copy_now(block, op);
    warp.tensor_operations.push_back(std::move(op));
  });
}

// Commits.

// Ends an operation in the name of the mbarrier whose clock is given.
void end(Block& block, const TensorOperation& op, int agent, uint32_t clock) {
  const auto release = [&](uint64_t address, int, int) { block.shared.hold(address, kUnit, -1); };
  if (op.in->name == "tcgen05.cp") {
    if (block.options.late) copy_now(block, op);
    const Copy shape = copy_of(*op.in);
    source_of(op).for_units(0, shape.rows, shape.units * 8, release);
    block.tensor.written(copied(op), agent, clock);
    return;
  }
  if (block.options.late) compute(block, op);
  const Product product(op);
  product.for_a(release);
  product.for_b(release);
  if (product.a_in_tensor) block.tensor.read(product.operand(), agent, clock);
  block.tensor.written(product.result(), agent, clock);
}

// Ends what one thread has issued up to its operation `last`, a commit.
void land(Block& block, Warp& warp, size_t last) {
  std::vector<TensorOperation> taken, rest;
  const int lane = warp.tensor_operations[last].lane;
  for (size_t i = 0; i < warp.tensor_operations.size(); ++i) {
    TensorOperation& op = warp.tensor_operations[i];
    (i <= last && op.lane == lane ? taken : rest).push_back(std::move(op));
  }
  warp.tensor_operations = std::move(rest);
  const auto is_commit = [](const TensorOperation& op) { return op.commit != nullptr; };
  for (auto at = taken.begin(); at != taken.end();) {
    const auto commit = std::find_if(at, taken.end(), is_commit);
    Mbarrier& object = *commit->commit;
    const int agent = static_cast<int>(block.warps.size()) + object.slot;
    ++object.landings;
    for (; at != commit; ++at) end(block, *at, agent, object.landings);
    block.mbarriers.arrive(*commit->in, object, commit->clock);
    ++at;
  }
}

void commit(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  for_lanes(mask, [&](int lane) {
    const uint64_t at = (warp.lanes(in.operands[0].reg)[lane] + static_cast<uint64_t>(in.operands[0].offset));
    block.shared.access(warp, in, at & 0xffffffffu, 8, SharedMemory::Access::Atomic, kWarpWrites, block.report);
    Mbarrier& object = block.mbarriers.find(warp, in, at & 0xffffffffu, block.report);
    ++object.commits;
    TensorOperation op{&in, lane};
    op.commit = &object;
    op.clock = warp.clock;
    warp.tensor_operations.push_back(std::move(op));
    if (!block.options.late) land(block, warp, warp.tensor_operations.size() - 1);
  });
  fence_before(block, warp, in, mask);  // a commit is one
  ++warp.clock[static_cast<size_t>(warp.id)];
}

// Choice of handlers.

Handler select_movement(Instruction& in) {
  const bool loads = in.name == "tcgen05.ld";
  if (in.has("32x32b")) {
    in.mode = k32x32b;
  } else if (in.has("16x32bx2")) {
    in.mode = k16x32bx2;
  } else if (in.has("16x128b")) {
    in.mode = k16x128b;
  } else if (in.has("16x256b")) {
    in.mode = k16x256b;
  } else {
    unsupported(in, "the shape is not modelled");
  }
  in.n = 0;
  for (const std::string& part : in.modifiers) {
    if (part.size() > 1 && part[0] == 'x') in.n = std::atoi(part.c_str() + 1);
  }
  require_operands(in, in.mode == k16x32bx2 ? 3 : 2);
  const Operand& registers = loads ? in.operands[0] : in.operands.back();
  const size_t given = registers.kind == Operand::Kind::Vector ? registers.elements.size() : 1;
  if (in.n == 0 || static_cast<size_t>(registers_of(in)) != given) unsupported(in, "another number of registers");
  return loads ? load : store;
}

Handler select_multiply(Instruction& in) {
  if (in.operands.size() != 5) unsupported(in, "lanes that are left out, or a scale, are not modelled");
  if (!in.has("cta_group::1") || !(in.has("kind::f16") || in.has("kind::tf32")))
    unsupported(in, "the kind is not modelled");
  return multiply;
}

Handler select_copy(Instruction& in) {
  require_operands(in, 2);
  if (in.has("32x128b") != in.has("warpx4") || !(in.has("32x128b") || in.has("128x128b") || in.has("128x256b")))
    unsupported(in, "the shape is not modelled");
  return copy;
}

template <Handler handler, size_t operands>
Handler plain(Instruction& in) {
  require_operands(in, operands);
  return handler;
}

}  // namespace

bool land_commits(Block& block, Mbarrier& object) {
  if (object.commits == 0 || object.commit_polls++ == 0) return false;
  for (Warp& warp : block.warps) {
    for (size_t i = 0; i < warp.tensor_operations.size(); ++i) {
      if (warp.tensor_operations[i].commit != &object) continue;
      land(block, warp, i);
      return true;
    }
  }
  return false;
}

const OpcodeRows& tensor_memory_opcodes() {
  static const char* const group = "cta_group::1 sync aligned shared::cta";
  static const char* const movement = "sync aligned 32x32b 16x32bx2 16x128b 16x256b x1 x2 x4 x8 x16 x32 x64 x128";
  static const OpcodeRows rows = {
      {"tcgen05.alloc", group, plain<allocate, 2>, false},
      {"tcgen05.dealloc", group, plain<free_columns, 2>, false},
      {"tcgen05.relinquish_alloc_permit", group, plain<relinquish, 0>, false},
      {"tcgen05.ld", movement, select_movement},
      {"tcgen05.st", movement, select_movement, false},
      {"tcgen05.wait::ld", "sync aligned", plain<wait_loads, 0>, false},
      {"tcgen05.wait::st", "sync aligned", plain<wait_stores, 0>, false},
      {"tcgen05.fence::before_thread_sync", "", plain<fence_before, 0>, false},
      {"tcgen05.fence::after_thread_sync", "", plain<fence_after, 0>, false},
      {"tcgen05.mma", "cta_group::1 kind::f16 kind::tf32", select_multiply, false},
      {"tcgen05.cp", "cta_group::1 128x256b 128x128b 32x128b warpx4", select_copy, false},
      {"tcgen05.commit", "cta_group::1 mbarrier::arrive::one shared::cluster shared::cta", plain<commit, 1>, false},
  };
  return rows;
}

}  // namespace ptxsim
