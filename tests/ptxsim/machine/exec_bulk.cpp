// cp.async.bulk, cp.async.bulk.tensor (TMA) and cp.reduce.async.bulk, between this block's shared memory and global.
//
// Copies to shared memory report to an mbarrier, see mbarrier.h. Copies from it belong to bulk groups of their thread:
// with Options::late they read at the wait for their group, else at once.
#include <algorithm>

#include "handlers.h"
#include "tensor_map.h"

namespace ptxsim {
namespace {

constexpr uint64_t kPiece = 16;
constexpr uint64_t kBoxAlignment = 128;

uint64_t address_of(Warp& warp, const Operand& where, int lane) {
  return warp.lanes(where.reg)[lane] + static_cast<uint64_t>(where.offset);
}
uint64_t shared_address_of(Warp& warp, const Operand& where, int lane) {
  return address_of(warp, where, lane) & 0xffffffffu;
}

void require_aligned(const Instruction& in, uint64_t address, uint64_t alignment, const char* what) {
  if (address % alignment == 0) return;
  throw Fault("bulk copy whose " + std::string(what) + " is no multiple of " + std::to_string(alignment) + ", " +
              in.where());
}

// Global memory is read and written by elements, so that what lies beside the tensor stays untouched.
void access_global(Block& block, Warp& warp, const Instruction& in, uint64_t address, int bytes, int step,
                   GlobalMemory::Access kind, int lane) {
  if (address % kPiece == 0 && bytes == static_cast<int>(kPiece)) step = bytes;
  for (int i = 0; i < bytes; i += step)
    block.global.access(warp, in, address + static_cast<uint64_t>(i), step, kind, lane, block.report);
}

TensorMap map_at(Block& block, Warp& warp, const Instruction& in, uint64_t address, int lane) {
  require_aligned(in, address, 64, "tensor map address");
  TensorMap map;
  const uint64_t offset = address - kParamWindow;
  if (offset < kWindowBytes) {
    if (offset + kMapBytes > block.params().size()) throw Fault("tensor map outside the parameters, " + in.where());
    std::memcpy(&map, block.params().data() + offset, kMapBytes);
  } else {
    access_global(block, warp, in, address, kMapBytes, kPiece, GlobalMemory::Access::Read, lane);
    std::memcpy(&map, reinterpret_cast<const void*>(address), kMapBytes);
  }
  if (map.magic != TensorMap::kMagic) throw Fault("no tensor map of tests/ptxsim/tensor_map.py, " + in.where());
  if (map.dimensions != static_cast<uint32_t>(in.mode)) {
    throw Fault("the tensor map has " + std::to_string(map.dimensions) + " dimensions, " + in.where());
  }
  return map;
}

std::array<int64_t, kMapDimensions> corner_of(Warp& warp, const Operand& tensor, int lane) {
  std::array<int64_t, kMapDimensions> corner{};
  for (size_t d = 0; d < tensor.elements.size(); ++d)
    corner[d] = static_cast<int32_t>(warp.lanes(tensor.elements[d])[lane]);
  return corner;
}

Mbarrier& object_of(Block& block, Warp& warp, const Instruction& in, const Operand& where, int lane) {
  const uint64_t address = shared_address_of(warp, where, lane);
  Mbarrier& object = block.mbarriers.find(warp, in, address, block.report);
  const Warp& maker = block.warps[static_cast<size_t>(object.initialiser)];
  if (maker.proxy_fences + maker.mbarrier_fences == object.fences) {
    block.report.add(Finding::ProxyFence, [&] {
      return "bulk copy that reports to an mbarrier initialised without a later fence.mbarrier_init or "
             "fence.proxy.async, " +
             in.where();
    });
  }
  return object;
}

// Sends the pieces that each_piece(put) offers as put(shared address, data) on their way.
template <class EachPiece>
void send(Block& block, Warp& warp, const Instruction& in, Mbarrier& object, EachPiece each_piece) {
  each_piece([&](uint64_t to, const std::array<uint8_t, kPiece>& data) {
    block.shared.bulk_issue(warp, in, to, block.warps, block.report);
    object.on_their_way.push_back({static_cast<uint32_t>(to), data});
  });
  if (!block.options.late) block.mbarriers.land(object, block.shared);
}

// [shared], [global], bytes, [mbarrier]
void load_bytes(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  for_lanes(mask, [&](int lane) {
    const uint64_t to = shared_address_of(warp, in.operands[0], lane), from = address_of(warp, in.operands[1], lane);
    const uint64_t bytes = truncate(operand(warp, in, 2)[lane], 4);
    require_aligned(in, to | from | bytes, kPiece, "address or size");
    send(block, warp, in, object_of(block, warp, in, in.operands[3], lane), [&](auto put) {
      for (uint64_t i = 0; i < bytes; i += kPiece) {
        access_global(block, warp, in, from + i, kPiece, kPiece, GlobalMemory::Access::Read, lane);
        std::array<uint8_t, kPiece> data;
        std::memcpy(data.data(), reinterpret_cast<const void*>(from + i), kPiece);
        put(to + i, data);
      }
    });
  });
}

// [shared], [map, {coordinates}], [mbarrier]
void load_tensor(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  for_lanes(mask, [&](int lane) {
    const uint64_t to = shared_address_of(warp, in.operands[0], lane);
    const TensorMap map = map_at(block, warp, in, address_of(warp, in.operands[1], lane), lane);
    require_aligned(in, to, kBoxAlignment, "shared address");
    const auto element = static_cast<int>(map.element_bytes);
    send(block, warp, in, object_of(block, warp, in, in.operands[2], lane), [&](auto put) {
      map.for_pieces(corner_of(warp, in.operands[1], lane), [&](uint32_t offset, uint64_t from, int first, int last) {
        std::array<uint8_t, kPiece> data{};
        if (map.nan_fill) data.fill(0xff);
        if (first < last) {
          const uint64_t at = from + static_cast<uint64_t>(first);
          access_global(block, warp, in, at, last - first, element, GlobalMemory::Access::Read, lane);
          std::memcpy(&data[static_cast<size_t>(first)], reinterpret_cast<const void*>(at),
                      static_cast<size_t>(last - first));
        }
        put(map.shared_address(to, offset), data);
      });
    });
  });
}

void add_to(const Instruction& in, uint8_t* to, const uint8_t* from) {
  uint64_t x = 0, y = 0;
  const auto bytes = static_cast<size_t>(size_of(in.type));
  std::memcpy(&x, to, bytes);
  std::memcpy(&y, from, bytes);
  const uint64_t sum =
      in.type == Type::F32
          ? bits_of(as_float(x) + as_float(y))
          : from_float(to_odd_float(static_cast<double>(to_float(x, in.type)) + to_float(y, in.type)), in.type);
  std::memcpy(to, &sum, bytes);
}

void read_source(Block& block, const BulkStore& store) {
  for (const BulkStore::Piece& piece : store.pieces) {
    const uint8_t* from = block.shared.data() + piece.source + piece.first;
    auto* to = reinterpret_cast<uint8_t*>(piece.destination + piece.first);
    const int bytes = piece.last - piece.first;
    if (store.in->name != "cp.reduce.async.bulk") {
      std::memcpy(to, from, static_cast<size_t>(bytes));
    } else {
      for (int i = 0; i < bytes; i += size_of(store.in->type)) add_to(*store.in, to + i, from + i);
    }
  }
}

// Notes a copy from shared memory, checks both of its sides, and holds its source until it has been read.
void send_out(Block& block, Warp& warp, BulkStore store, int element) {
  const bool reduces = store.in->name == "cp.reduce.async.bulk";
  for (const BulkStore::Piece& piece : store.pieces) {
    block.shared.async_read(warp, *store.in, piece.source, kPiece, block.warps, block.report);
    if (piece.first < piece.last) {
      access_global(block, warp, *store.in, piece.destination + piece.first, piece.last - piece.first, element,
                    reduces ? GlobalMemory::Access::Atomic : GlobalMemory::Access::Write, store.lane);
    }
    block.shared.hold(piece.source, kPiece, +1);
  }
  if (!block.options.late) read_source(block, store);
  warp.bulk_stores.push_back(std::move(store));
}

// [global], [shared], bytes
void store_bytes(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  for_lanes(mask, [&](int lane) {
    const uint64_t to = address_of(warp, in.operands[0], lane), from = shared_address_of(warp, in.operands[1], lane);
    const uint64_t bytes = truncate(operand(warp, in, 2)[lane], 4);
    require_aligned(in, to | from | bytes, kPiece, "address or size");
    BulkStore store{&in, {}, warp.bulk_commits[lane], static_cast<int8_t>(lane)};
    for (uint64_t i = 0; i < bytes; i += kPiece)
      store.pieces.push_back({static_cast<uint32_t>(from + i), to + i, 0, kPiece});
    send_out(block, warp, std::move(store), kPiece);
  });
}

// [map, {coordinates}], [shared]
void store_tensor(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  for_lanes(mask, [&](int lane) {
    const uint64_t from = shared_address_of(warp, in.operands[1], lane);
    const TensorMap map = map_at(block, warp, in, address_of(warp, in.operands[0], lane), lane);
    require_aligned(in, from, kBoxAlignment, "shared address");
    BulkStore store{&in, {}, warp.bulk_commits[lane], static_cast<int8_t>(lane)};
    map.for_pieces(corner_of(warp, in.operands[0], lane), [&](uint32_t offset, uint64_t to, int first, int last) {
      store.pieces.push_back({static_cast<uint32_t>(map.shared_address(from, offset)), to, static_cast<uint8_t>(first),
                              static_cast<uint8_t>(last)});
    });
    send_out(block, warp, std::move(store), static_cast<int>(map.element_bytes));
  });
}

void commit_group(Block&, Warp& warp, const Instruction&, LaneMask mask) {
  for_lanes(mask, [&](int lane) { ++warp.bulk_commits[lane]; });
}

// Waits until at most so many groups have not been read (.read), or not been written either.
void wait_group(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  const auto keep = static_cast<uint32_t>(operand(warp, in, 0)[0]);
  for (BulkStore& store : warp.bulk_stores) {
    if (store.read || !(mask >> store.lane & 1) || store.group + keep >= warp.bulk_commits[store.lane]) continue;
    if (block.options.late) read_source(block, store);
    for (const BulkStore::Piece& piece : store.pieces) block.shared.hold(piece.source, kPiece, -1);
    store.read = true;
  }
  const auto done = [](const BulkStore& store) { return store.read; };
  warp.bulk_stores.erase(std::remove_if(warp.bulk_stores.begin(), warp.bulk_stores.end(), done),
                         warp.bulk_stores.end());
}

bool loads(const Instruction& in) {
  return in.has("mbarrier::complete_tx::bytes");
}

Handler select_bulk(Instruction& in) {
  if (in.has("L2::cache_hint")) in.operands.pop_back();
  require_operands(in, loads(in) ? 4 : 3);
  if (!loads(in) && !in.has("bulk_group")) unsupported(in, "bulk copy form is not modelled");
  return loads(in) ? load_bytes : store_bytes;
}

Handler select_reduce(Instruction& in) {
  if (in.has("L2::cache_hint")) in.operands.pop_back();
  require_operands(in, 3);
  const bool type = in.type == Type::F32 || in.type == Type::F16 || in.type == Type::BF16;
  if (!type || !in.has("add") || !in.has("bulk_group")) unsupported(in, "bulk reduction is not modelled");
  return store_bytes;
}

Handler select_tensor(Instruction& in) {
  if (in.has("L2::cache_hint")) in.operands.pop_back();
  require_operands(in, loads(in) ? 3 : 2);
  if (!loads(in) && !in.has("bulk_group")) unsupported(in, "tensor copy form is not modelled");
  for (const char* const name : {"1d", "2d", "3d", "4d", "5d"}) {
    if (in.has(name)) in.mode = static_cast<uint8_t>(name[0] - '0');
  }
  if (in.operands[loads(in) ? 1 : 0].elements.size() != in.mode) unsupported(in, "expected a coordinate a dimension");
  return loads(in) ? load_tensor : store_tensor;
}

template <Handler handler>
Handler always(Instruction&) {
  return handler;
}

}  // namespace

const OpcodeRows& bulk_opcodes() {
  static const char* const copy =
      "shared::cta shared::cluster global mbarrier::complete_tx::bytes bulk_group cache tile 1d 2d 3d 4d 5d";
  static const OpcodeRows rows = {
      {"cp.async.bulk", copy, select_bulk, false},
      {"cp.async.bulk.tensor", copy, select_tensor, false},
      {"cp.reduce.async.bulk", "global shared::cta bulk_group cache add noftz", select_reduce, false},
      {"cp.async.bulk.commit_group", "", always<commit_group>, false},
      {"cp.async.bulk.wait_group", "read", always<wait_group>, false},
  };
  return rows;
}

}  // namespace ptxsim
