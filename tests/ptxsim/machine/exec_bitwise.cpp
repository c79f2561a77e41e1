// and, or, xor, not, shl, shr, shf, lop3, prmt, bfe, bfi, popc, clz, brev, bfind, mov, cvta.
#include <algorithm>

#include "handlers.h"

namespace ptxsim {
namespace {

enum class Logic { And, Or, Xor };

template <Logic op, int bytes>
uint64_t logic(uint64_t a, uint64_t b) {
  return truncate(op == Logic::And ? a & b : op == Logic::Or ? a | b : a ^ b, bytes);
}
template <int bytes>
uint64_t bit_not(uint64_t a) {
  return truncate(~a, bytes);
}
uint64_t predicate_not(uint64_t a) {
  return ~a & 1;
}

// A predicate operand may be written !%p, so predicates go through a handler that looks.
template <Binary f>
void predicates(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t *a = operand(warp, in, 1), *b = operand(warp, in, 2);
  const uint64_t flip_a = in.operands[1].negated, flip_b = in.operands[2].negated;
  for_lanes(mask, [&](int lane) { d[lane] = f(a[lane] ^ flip_a, b[lane] ^ flip_b) & 1; });
}

template <Logic op>
Handler select_logic(Instruction& in) {
  require_operands(in, 3);
  if (in.type == Type::Pred) return predicates<logic<op, 8>>;
  switch (size_of(in.type)) {
    case 2:
      return binary<logic<op, 2>>;
    case 4:
      return binary<logic<op, 4>>;
    case 8:
      return binary<logic<op, 8>>;
    default:
      unsupported(in, "type is not modelled");
  }
}

Handler select_not(Instruction& in) {
  require_operands(in, 2);
  if (in.type == Type::Pred) return unary<predicate_not>;
  switch (size_of(in.type)) {
    case 2:
      return unary<bit_not<2>>;
    case 4:
      return unary<bit_not<4>>;
    case 8:
      return unary<bit_not<8>>;
    default:
      unsupported(in, "type is not modelled");
  }
}

// Shifts by the width or more give 0, or the sign.
template <class T>
struct ShiftLeft {
  static uint64_t value(uint64_t a, uint64_t b) {
    const auto n = static_cast<uint32_t>(b);
    return n >= 8 * sizeof(T) ? 0 : truncate(a << n, sizeof(T));
  }
  static Handler handler() { return binary<&value>; }
};
template <class T>
struct ShiftRight {
  static uint64_t value(uint64_t a, uint64_t b) {
    const auto n = std::min<uint32_t>(static_cast<uint32_t>(b), 8 * sizeof(T));
    const T x = as_int<T>(a);
    if (n == 8 * sizeof(T)) return int_bits<T>(static_cast<T>(x < 0 ? -1 : 0));
    return int_bits<T>(static_cast<T>(x >> n));
  }
  static Handler handler() { return binary<&value>; }
};

template <bool left, bool clamp>
uint64_t funnel(uint64_t low, uint64_t high, uint64_t amount) {
  const uint32_t n = clamp ? std::min<uint32_t>(static_cast<uint32_t>(amount), 32) : amount & 31;
  const uint64_t value = (low & 0xffffffffu) | high << 32;
  return static_cast<uint32_t>(left ? (value << n) >> 32 : value >> n);
}
Handler select_shf(Instruction& in) {
  require_operands(in, 4);
  const bool clamp = in.has("clamp");
  if (in.has("l")) return clamp ? ternary<funnel<true, true>> : ternary<funnel<true, false>>;
  return clamp ? ternary<funnel<false, true>> : ternary<funnel<false, false>>;
}

void lop3(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t *a = operand(warp, in, 1), *b = operand(warp, in, 2), *c = operand(warp, in, 3);
  const uint64_t table = operand(warp, in, 4)[0];
  for_lanes(mask, [&](int lane) {
    uint64_t result = 0;
    for (int row = 0; row < 8; ++row) {
      if (!(table >> row & 1)) continue;
      result |= (row & 4 ? a[lane] : ~a[lane]) & (row & 2 ? b[lane] : ~b[lane]) & (row & 1 ? c[lane] : ~c[lane]);
    }
    d[lane] = truncate(result, 4);
  });
}
Handler select_lop3(Instruction& in) {
  require_operands(in, 5);
  return lop3;
}

// Each nibble of the selector picks one of the eight bytes of {b, a}; its top bit asks for the byte's sign instead.
uint64_t permute(uint64_t a, uint64_t b, uint64_t selector) {
  const uint64_t bytes = (a & 0xffffffffu) | b << 32;
  uint64_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint64_t nibble = selector >> (4 * i) & 15;
    uint64_t byte = bytes >> (8 * (nibble & 7)) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
Handler select_prmt(Instruction& in) {
  require_operands(in, 4);
  return ternary<permute>;
}

template <class T>
struct ExtractField {
  static uint64_t value(uint64_t a, uint64_t b, uint64_t c) {
    constexpr uint32_t width = 8 * sizeof(T);
    const uint32_t position = b & 0xff, length = c & 0xff;
    const uint64_t bits = truncate(a, sizeof(T));
    // The sign is the field's top bit, or the value's where the field reaches past it.
    const bool sign = std::is_signed_v<T> && length && (bits >> std::min(position + length - 1, width - 1) & 1);
    const uint32_t held = position >= width ? 0 : std::min(length, width - position);
    uint64_t result = position >= width ? 0 : bits >> position;
    if (held < 64) result &= (uint64_t{1} << held) - 1;
    if (sign && held < width) result |= ~uint64_t{0} << held;
    return truncate(length ? result : 0, sizeof(T));
  }
  static Handler handler() { return ternary<&value>; }
};

void insert_field(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  const int bytes = size_of(in.type);
  uint64_t* d = operand(warp, in, 0);
  const uint64_t *a = operand(warp, in, 1), *b = operand(warp, in, 2);
  const uint64_t *position = operand(warp, in, 3), *length = operand(warp, in, 4);
  for_lanes(mask, [&](int lane) {
    const uint64_t at = position[lane] & 0xff, count = length[lane] & 0xff;
    const uint64_t ones = count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    const uint64_t field = at >= 64 ? 0 : ones << at;
    const uint64_t moved = at >= 64 ? 0 : a[lane] << at;
    d[lane] = truncate((b[lane] & ~field) | (moved & field), bytes);
  });
}
Handler select_bfi(Instruction& in) {
  require_operands(in, 5);
  return insert_field;
}

template <class T>
struct PopulationCount {
  static uint64_t value(uint64_t a) { return static_cast<uint64_t>(__builtin_popcountll(truncate(a, sizeof(T)))); }
  static Handler handler() { return unary<&value>; }
};
template <class T>
struct LeadingZeros {
  static uint64_t value(uint64_t a) {
    const uint64_t bits = truncate(a, sizeof(T));
    return bits ? static_cast<uint64_t>(__builtin_clzll(bits)) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
  }
  static Handler handler() { return unary<&value>; }
};
template <class T>
struct HighestBit {  // bfind: the position of the highest bit that differs from the sign, all ones if none
  static uint64_t value(uint64_t a) {
    const T x = as_int<T>(a);
    const uint64_t bits = truncate(x < 0 ? ~a : a, sizeof(T));
    return bits ? 63 - static_cast<uint64_t>(__builtin_clzll(bits)) : 0xffffffffu;
  }
  static Handler handler() { return unary<&value>; }
};
template <class T>
struct ReverseBits {
  static uint64_t value(uint64_t a) {
    uint64_t result = 0;
    constexpr int width = 8 * sizeof(T);
    for (int i = 0; i < width; ++i) result |= (a >> i & 1) << (width - 1 - i);
    return result;
  }
  static Handler handler() { return unary<&value>; }
};

template <template <class> class Choice, size_t operands>
Handler select_integer(Instruction& in) {
  require_operands(in, operands);
  if (Handler handler = for_integer<Choice>(in.type)) return handler;
  unsupported(in, "type is not modelled");
}

template <int bytes>
uint64_t copy(uint64_t a) {
  return truncate(a, bytes);
}
uint64_t copy_predicate(uint64_t a) {
  return a & 1;
}

// mov between a register and a vector of narrower ones.
void unpack(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  const std::vector<int>& parts = in.operands[0].elements;
  const int bytes = size_of(in.type) / static_cast<int>(parts.size());
  const uint64_t* a = operand(warp, in, 1);
  uint64_t value[kLanes];
  std::copy_n(a, kLanes, value);  // the source may be one of the parts
  for (size_t i = 0; i < parts.size(); ++i) {
    uint64_t* d = warp.lanes(parts[i]);
    for_lanes(mask, [&](int lane) { d[lane] = truncate(value[lane] >> (8 * bytes * static_cast<int>(i)), bytes); });
  }
}
void pack(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  const std::vector<int>& parts = in.operands[1].elements;
  const int bytes = size_of(in.type) / static_cast<int>(parts.size());
  uint64_t value[kLanes] = {};
  for (size_t i = 0; i < parts.size(); ++i) {
    const uint64_t* a = warp.lanes(parts[i]);
    for (int lane = 0; lane < kLanes; ++lane)
      value[lane] |= truncate(a[lane], bytes) << (8 * bytes * static_cast<int>(i));
  }
  uint64_t* d = operand(warp, in, 0);
  for_lanes(mask, [&](int lane) { d[lane] = value[lane]; });
}
Handler select_mov(Instruction& in) {
  require_operands(in, 2);
  if (in.type == Type::B128) unsupported(in, "128-bit registers are not modelled");
  if (in.operands[0].kind == Operand::Kind::Vector) return unpack;
  if (in.operands[1].kind == Operand::Kind::Vector) return pack;
  if (in.type == Type::Pred) return unary<copy_predicate>;
  switch (size_of(in.type)) {
    case 1:
      return unary<copy<1>>;
    case 2:
      return unary<copy<2>>;
    case 4:
      return unary<copy<4>>;
    default:
      return unary<copy<8>>;
  }
}

template <int64_t shift>
uint64_t move_window(uint64_t a) {
  return a + static_cast<uint64_t>(shift);
}
Handler select_cvta(Instruction& in) {
  require_operands(in, 2);
  constexpr auto window = static_cast<int64_t>(kSharedWindow);
  if (in.space != Space::Shared) return unary<copy<8>>;  // the other windows hold the same addresses either way
  return in.has("to") ? unary<move_window<-window>> : unary<move_window<window>>;
}

}  // namespace

const OpcodeRows& bitwise_opcodes() {
  static const OpcodeRows rows = {
      {"and", "", select_logic<Logic::And>},
      {"or", "", select_logic<Logic::Or>},
      {"xor", "", select_logic<Logic::Xor>},
      {"not", "", select_not},
      {"shl", "", select_integer<ShiftLeft, 3>},
      {"shr", "", select_integer<ShiftRight, 3>},
      {"shf", "l r wrap clamp", select_shf},
      {"lop3", "", select_lop3},
      {"prmt", "", select_prmt},
      {"bfe", "", select_integer<ExtractField, 4>},
      {"bfi", "", select_bfi},
      {"popc", "", select_integer<PopulationCount, 2>},
      {"clz", "", select_integer<LeadingZeros, 2>},
      {"bfind", "", select_integer<HighestBit, 2>},
      {"brev", "", select_integer<ReverseBits, 2>},
      {"mov", "", select_mov},
      {"cvta", "to global shared shared::cta local param const", select_cvta},
  };
  return rows;
}

}  // namespace ptxsim
