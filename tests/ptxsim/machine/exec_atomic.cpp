// atom, red: also vectors (v2, v4, v8) and packed or 16-bit floats.
#include <algorithm>

#include "handlers.h"

namespace ptxsim {
namespace {

enum Operation : uint8_t { Add, Min, Max, And, Or, Xor, Exchange, CompareSwap, Increment, Decrement };
constexpr const char* kOperations[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};

double apply_float(uint8_t operation, double old, double value) {
  switch (operation) {
    case Add:
      return old + value;
    case Min:
      return std::fmin(old, value);
    case Max:
      return std::fmax(old, value);
    default:
      return value;
  }
}

uint64_t apply_integer(const Instruction& in, uint64_t old, uint64_t value, uint64_t swap) {
  const int bytes = size_of(in.type);
  value = truncate(value, bytes);
  const bool below = is_signed(in.type) ? sign_extend(value, bytes) < sign_extend(old, bytes) : value < old;
  switch (in.mode) {
    case Add:
      return old + value;
    case Min:
      return below ? value : old;
    case Max:
      return below ? old : value;
    case And:
      return old & value;
    case Or:
      return old | value;
    case Xor:
      return old ^ value;
    case Exchange:
      return value;
    case CompareSwap:
      return old == value ? swap : old;
    case Increment:
      return old >= value ? 0 : old + 1;
    default:
      return old == 0 || old > value ? value : old - 1;
  }
}

uint64_t apply(const Instruction& in, uint64_t old, uint64_t value, uint64_t swap) {
  if (is_packed(in.type)) {
    const Type element = packed_element(in.type);
    const auto half = [&](int shift) {
      const double x = to_float(old >> shift & 0xffff, element), y = to_float(value >> shift & 0xffff, element);
      return from_float(to_odd_float(apply_float(in.mode, x, y)), element) << shift;
    };
    return half(0) | half(16);
  }
  if (in.type == Type::F64) return bits_of(apply_float(in.mode, as_double(old), as_double(value)));
  if (in.type == Type::F32 && in.mode == Add) return bits_of(as_float(old) + as_float(value));
  if (is_float(in.type)) {
    return from_float(to_odd_float(apply_float(in.mode, to_float(old, in.type), to_float(value, in.type))), in.type);
  }
  return apply_integer(in, old, value, swap);
}

template <bool returns>
void atomic(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  constexpr size_t where = returns ? 1 : 0;
  const Operand& address = in.operands[where];
  const uint64_t* base = warp.lanes(address.reg);
  const int bytes = size_of(in.type);
  const uint64_t* swap = in.mode == CompareSwap ? operand(warp, in, where + 2) : nullptr;
  const bool acquires = in.has("acq_rel") || in.has("acquire"), releases = in.has("acq_rel") || in.has("release");
  for_lanes(mask, [&](int lane) {
    uint64_t at = base[lane] + static_cast<uint64_t>(address.offset);
    if (in.space == Space::Shared) at &= 0xffffffffu;
    if (at % static_cast<uint64_t>(bytes * in.vector)) throw Fault("misaligned atomic, " + in.where());
    const bool shared = block.is_shared(in, at);
    if (!shared) acquires ? block.global.acquire(warp, at) : block.global.relaxed_read(warp, at);
    for (int i = 0; i < in.vector; ++i) {
      uint8_t* memory = block.memory(warp, in, at + static_cast<uint64_t>(i * bytes), bytes, true, lane, true);
      uint64_t old = 0;
      std::memcpy(&old, memory, static_cast<size_t>(bytes));
      const uint64_t value = warp.lanes(in.operands[where + 1].element(static_cast<size_t>(i)))[lane];
      const uint64_t result = apply(in, old, value, swap ? swap[lane] : 0);
      std::memcpy(memory, &result, static_cast<size_t>(bytes));
      if (returns) warp.lanes(in.operands[0].element(static_cast<size_t>(i)))[lane] = old;
    }
    if (!shared) releases ? block.global.release(warp, at) : block.global.relaxed_write(warp, at);
  });
}

template <bool returns>
Handler select_atomic(Instruction& in) {
  require_operands(in, returns ? 3 : 2);
  const auto found =
      std::find_if(std::begin(kOperations), std::end(kOperations), [&](const char* name) { return in.has(name); });
  if (found == std::end(kOperations)) unsupported(in, "atomic operation is not modelled");
  in.mode = static_cast<uint8_t>(found - std::begin(kOperations));
  const bool real = is_float(in.type) || is_packed(in.type);
  if (real && in.mode > Max && in.mode != Exchange) unsupported(in, "atomic operation on floats is not modelled");
  if (in.type == Type::B128) unsupported(in, "128-bit registers are not modelled");
  if (in.has("L2::cache_hint")) in.operands.pop_back();
  if (in.mode == CompareSwap) require_operands(in, 4);
  return atomic<returns>;
}

}  // namespace

const OpcodeRows& atomic_opcodes() {
  static const char* const modifiers =
      "global shared shared::cta relaxed acquire release acq_rel cta gpu sys noftz ftz v2 v4 v8 cache "
      "add min max and or xor exch cas inc dec";
  static const OpcodeRows rows = {
      {"atom", modifiers, select_atomic<true>},
      {"red", modifiers, select_atomic<false>, false},
  };
  return rows;
}

}  // namespace ptxsim
