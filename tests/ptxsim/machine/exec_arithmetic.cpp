// add, sub, mul, mad, div, rem, min, max, abs, neg: integers here, floats in exec_float.cpp.
#include <type_traits>

#include "arithmetic.h"

namespace ptxsim {
namespace {

template <Arithmetic op>
struct IntegerBinary {
  template <class T>
  struct Choice {
    static uint64_t value(uint64_t a, uint64_t b) {
      const T x = as_int<T>(a), y = as_int<T>(b);
      if constexpr (op == Arithmetic::Add) return int_bits<T>(static_cast<T>(a + b));
      if constexpr (op == Arithmetic::Sub) return int_bits<T>(static_cast<T>(a - b));
      if constexpr (op == Arithmetic::Mul) return int_bits<T>(static_cast<T>(a * b));
      if constexpr (op == Arithmetic::Min) return int_bits<T>(x < y ? x : y);
      if constexpr (op == Arithmetic::Max) return int_bits<T>(x > y ? x : y);
    }
    static Handler handler() { return binary<&value>; }
  };
};

// The result has twice the operands' width, at most 64 bits.
template <class T>
struct MulWide {
  static uint64_t value(uint64_t a, uint64_t b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    const auto product = static_cast<uint64_t>(static_cast<Wide>(as_int<T>(a)) * static_cast<Wide>(as_int<T>(b)));
    return truncate(product, std::min<int>(8, 2 * sizeof(T)));
  }
  static uint64_t add(uint64_t a, uint64_t b, uint64_t c) {
    return truncate(value(a, b) + c, std::min<int>(8, 2 * sizeof(T)));
  }
  static Handler handler() { return binary<&value>; }
};
template <class T>
struct MadWide {
  static Handler handler() { return ternary<&MulWide<T>::add>; }
};

template <class T>
struct MulHigh {
  static uint64_t value(uint64_t a, uint64_t b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return int_bits<T>(static_cast<T>((static_cast<Wide>(as_int<T>(a)) * as_int<T>(b)) >> (8 * sizeof(T))));
  }
  static uint64_t add(uint64_t a, uint64_t b, uint64_t c) { return int_bits<T>(static_cast<T>(value(a, b) + c)); }
  static Handler handler() { return binary<&value>; }
};
template <class T>
struct MadHigh {
  static Handler handler() { return ternary<&MulHigh<T>::add>; }
};
template <class T>
struct MadLow {
  static uint64_t value(uint64_t a, uint64_t b, uint64_t c) { return int_bits<T>(static_cast<T>(a * b + c)); }
  static Handler handler() { return ternary<&value>; }
};

// Division by zero leaves the result unspecified in PTX; all ones is what the hardware gives.
template <class T>
struct Divide {
  static uint64_t value(uint64_t a, uint64_t b) {
    const T x = as_int<T>(a), y = as_int<T>(b);
    if (y == 0) return int_bits<T>(static_cast<T>(~T{0}));
    if (std::is_signed_v<T> && y == static_cast<T>(-1)) return int_bits<T>(static_cast<T>(0 - a));
    return int_bits<T>(static_cast<T>(x / y));
  }
  static Handler handler() { return binary<&value>; }
};
template <class T>
struct Remainder {
  static uint64_t value(uint64_t a, uint64_t b) {
    const T x = as_int<T>(a), y = as_int<T>(b);
    if (y == 0) return int_bits<T>(x);
    if (std::is_signed_v<T> && y == static_cast<T>(-1)) return 0;
    return int_bits<T>(static_cast<T>(x % y));
  }
  static Handler handler() { return binary<&value>; }
};
template <class T>
struct Absolute {
  static uint64_t value(uint64_t a) { return int_bits<T>(static_cast<T>(as_int<T>(a) < 0 ? 0 - a : a)); }
  static Handler handler() { return unary<&value>; }
};
template <class T>
struct Negate {
  static uint64_t value(uint64_t a) { return int_bits<T>(static_cast<T>(0 - a)); }
  static Handler handler() { return unary<&value>; }
};

template <Arithmetic op>
Handler select_binary(Instruction& in) {
  require_operands(in, 3);
  if (is_float(in.type) || is_packed(in.type) || in.type == Type::F32x2) return select_float_binary(in, op);
  if (in.saturate) unsupported(in, ".sat of integers is not modelled");
  if (Handler handler = for_integer<IntegerBinary<op>::template Choice>(in.type)) return handler;
  unsupported(in, "type is not modelled");
}

// A negative result becomes 0.
template <Arithmetic op>
uint64_t at_least_zero(uint64_t a, uint64_t b) {
  const uint64_t bits = IntegerBinary<op>::template Choice<int32_t>::value(a, b);
  return as_int<int32_t>(bits) < 0 ? 0 : bits;
}
template <Arithmetic op>
Handler select_extreme(Instruction& in) {
  if (in.operands.size() == 4) return select_float_extreme(in, op);
  if (!in.has("relu")) return select_binary<op>(in);
  require_operands(in, 3);
  if (in.type != Type::S32) unsupported(in, ".relu of this type is not modelled");
  return binary<&at_least_zero<op>>;
}

Handler select_mul(Instruction& in) {
  if (in.has("wide")) return for_integer<MulWide>(in.type);
  if (in.has("hi")) return for_integer<MulHigh>(in.type);
  return select_binary<Arithmetic::Mul>(in);
}

Handler select_mad(Instruction& in) {
  require_operands(in, 4);
  if (is_float(in.type)) return select_float_fma(in);
  if (in.saturate) unsupported(in, ".sat of integers is not modelled");
  if (in.has("wide")) return for_integer<MadWide>(in.type);
  if (in.has("hi")) return for_integer<MadHigh>(in.type);
  return for_integer<MadLow>(in.type);
}

Handler select_div(Instruction& in) {
  require_operands(in, 3);
  if (is_float(in.type)) return select_float_division(in);
  if (Handler handler = for_integer<Divide>(in.type)) return handler;
  unsupported(in, "type is not modelled");
}

Handler select_rem(Instruction& in) {
  if (Handler handler = for_integer<Remainder>(in.type)) return handler;
  unsupported(in, "type is not modelled");
}

template <uint64_t bits>
uint64_t clear(uint64_t a) {
  return a & ~bits;
}
template <uint64_t bits>
uint64_t flip(uint64_t a) {
  return a ^ bits;
}
template <Unary f>
uint64_t on_flushed(uint64_t a) {
  return f(raw_bits(flushed(as_float(a))));
}

template <template <uint64_t> class F, template <class> class Integer>
Handler select_sign(Instruction& in) {
  require_operands(in, 2);
  switch (in.type) {
    case Type::F16:
    case Type::BF16:
      return F<0x8000>::handler();
    case Type::F16x2:
    case Type::BF16x2:
      return F<0x80008000>::handler();
    case Type::F32:
      return in.flush ? F<0x80000000>::flushed_handler() : F<0x80000000>::handler();
    case Type::F64:
      return F<0x8000000000000000ull>::handler();
    default:
      break;
  }
  if (Handler handler = for_integer<Integer>(in.type)) return handler;
  unsupported(in, "type is not modelled");
}
template <uint64_t sign>
struct ClearSign {
  static Handler handler() { return unary<&clear<sign>>; }
  static Handler flushed_handler() { return unary<&on_flushed<&clear<sign>>>; }
};
template <uint64_t sign>
struct FlipSign {
  static Handler handler() { return unary<&flip<sign>>; }
  static Handler flushed_handler() { return unary<&on_flushed<&flip<sign>>>; }
};

}  // namespace

const OpcodeRows& arithmetic_opcodes() {
  static const OpcodeRows rows = {
      {"add", "rn rz rm rp ftz sat", select_binary<Arithmetic::Add>},
      {"sub", "rn rz rm rp ftz sat", select_binary<Arithmetic::Sub>},
      {"mul", "rn rz rm rp ftz sat lo hi wide", select_mul},
      {"min", "ftz NaN relu", select_extreme<Arithmetic::Min>},
      {"max", "ftz NaN relu", select_extreme<Arithmetic::Max>},
      {"fma", "rn rz rm rp ftz sat relu", select_float_fma},
      {"mad", "rn rz rm rp ftz sat lo hi wide", select_mad},
      {"div", "rn rz rm rp ftz full approx", select_div},
      {"rem", "", select_rem},
      {"abs", "ftz", select_sign<ClearSign, Absolute>},
      {"neg", "ftz", select_sign<FlipSign, Negate>},
  };
  return rows;
}

}  // namespace ptxsim
