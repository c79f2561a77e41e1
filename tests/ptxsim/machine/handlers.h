// Handlers made from functions of register bits: f(a), f(a, b) or f(a, b, c) for every active lane.
#pragma once

#include "block.h"
#include "opcodes.h"

namespace ptxsim {

using Unary = uint64_t (*)(uint64_t);
using Binary = uint64_t (*)(uint64_t, uint64_t);
using Ternary = uint64_t (*)(uint64_t, uint64_t, uint64_t);

inline uint64_t* operand(Warp& warp, const Instruction& in, size_t i) {
  return warp.lanes(in.operands[i].reg);
}

template <Unary f>
void unary(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t* a = operand(warp, in, 1);
  for_lanes(mask, [&](int lane) { d[lane] = f(a[lane]); });
}

template <Binary f>
void binary(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t *a = operand(warp, in, 1), *b = operand(warp, in, 2);
  for_lanes(mask, [&](int lane) { d[lane] = f(a[lane], b[lane]); });
}

template <Ternary f>
void ternary(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t *a = operand(warp, in, 1), *b = operand(warp, in, 2), *c = operand(warp, in, 3);
  for_lanes(mask, [&](int lane) { d[lane] = f(a[lane], b[lane], c[lane]); });
}

// An integer register as the C++ type T, and back to bits with nothing above them.
template <class T>
inline T as_int(uint64_t bits) {
  return static_cast<T>(bits);
}
template <class T>
inline uint64_t int_bits(T value) {
  return static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>(value));
}

// Calls make<T>() for the C++ integer of an integer or bit type; null for any other type.
template <template <class> class Choice>
Handler for_integer(Type type) {
  switch (type) {
    case Type::U8:
    case Type::B8:
      return Choice<uint8_t>::handler();
    case Type::U16:
    case Type::B16:
      return Choice<uint16_t>::handler();
    case Type::U32:
    case Type::B32:
      return Choice<uint32_t>::handler();
    case Type::U64:
    case Type::B64:
      return Choice<uint64_t>::handler();
    case Type::S8:
      return Choice<int8_t>::handler();
    case Type::S16:
      return Choice<int16_t>::handler();
    case Type::S32:
      return Choice<int32_t>::handler();
    case Type::S64:
      return Choice<int64_t>::handler();
    default:
      return nullptr;
  }
}

inline void require_operands(const Instruction& in, size_t count) {
  if (in.operands.size() < count) unsupported(in, "expected " + std::to_string(count) + " operands");
}

}  // namespace ptxsim
