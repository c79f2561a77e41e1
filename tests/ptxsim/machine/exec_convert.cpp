// cvt. Compiled with -frounding-math: directed rounding to f32 uses the host's rounding mode.
#include <algorithm>
#include <cfenv>
#include <limits>

#include "handlers.h"

namespace ptxsim {
namespace {

enum class ToIntegral : uint8_t { None, Zero, Nearest, Down, Up };  // .rzi .rni .rmi .rpi

double integral(double value, ToIntegral how) {
  switch (how) {
    case ToIntegral::Zero:
      return std::trunc(value);
    case ToIntegral::Nearest:
      return std::nearbyint(value);
    case ToIntegral::Down:
      return std::floor(value);
    case ToIntegral::Up:
      return std::ceil(value);
    default:
      return value;
  }
}

template <class Format>
uint16_t narrow(double value, Rounding rounding) {
  uint16_t bits = Format::from_float(to_odd_float(value));
  if (rounding == Rounding::Nearest || value != value) return bits;
  const auto rounded = static_cast<double>(Format::to_float(bits));
  const bool too_high = rounded > value, too_low = rounded < value;
  const bool lower = too_high && (rounding == Rounding::Down || (rounding == Rounding::Zero && value > 0));
  const bool raise = too_low && (rounding == Rounding::Up || (rounding == Rounding::Zero && value < 0));
  if (!lower && !raise) return bits;
  if (rounded == 0) return lower ? 0x8001 : 0x0001;
  // The next value away from zero has the next bits; this also steps from infinity to the largest number.
  return static_cast<uint16_t>(lower == (rounded > 0) ? bits - 1 : bits + 1);
}

float to_f32(double value, Rounding rounding) {
  if (rounding == Rounding::Nearest) return static_cast<float>(value);
  const int before = std::fegetround();
  std::fesetround(rounding == Rounding::Zero ? FE_TOWARDZERO : rounding == Rounding::Down ? FE_DOWNWARD : FE_UPWARD);
  volatile float result = static_cast<float>(value);
  std::fesetround(before);
  return result;
}

uint64_t float_bits(double value, const Instruction& in) {
  if (in.saturate) value = value > 0 ? std::min(value, 1.0) : 0.0;
  if (in.has("relu") && value < 0) value = 0;
  switch (in.first_type) {
    case Type::F64:
      return bits_of(value);
    case Type::F16:
      return narrow<Half>(value, in.rounding);
    case Type::BF16:
      return narrow<Bfloat>(value, in.rounding);
    default: {
      const float result = to_f32(value, in.rounding);
      return bits_of(in.flush ? flushed(result) : result);
    }
  }
}

double float_source(uint64_t bits, const Instruction& in) {
  if (in.type == Type::F64) return as_double(bits);
  const float value = to_float(bits, in.type);
  return in.flush && in.type == Type::F32 ? flushed(value) : value;
}

void float_to_float(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t* a = operand(warp, in, 1);
  const auto how = static_cast<ToIntegral>(in.mode);
  for_lanes(mask, [&](int lane) { d[lane] = float_bits(integral(float_source(a[lane], in), how), in); });
}

template <class Format>
uint64_t widen(uint64_t a) {
  return bits_of(Format::to_float(a));
}
template <class Format>
uint64_t narrow_nearest(uint64_t a) {
  return Format::from_float(as_float(a));
}
template <class Format>
uint64_t narrow_pair(uint64_t high, uint64_t low) {
  return static_cast<uint64_t>(Format::from_float(as_float(high))) << 16 | Format::from_float(as_float(low));
}

// Out-of-range values clamp. NaN gives 0, or the lowest integer where 64 bits are involved.
void float_to_integer(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t* a = operand(warp, in, 1);
  const int bytes = size_of(in.first_type), bits = 8 * bytes;
  const bool wide = in.type == Type::F64 || bytes == 8;
  const double low = is_signed(in.first_type) ? -std::ldexp(1.0, bits - 1) : 0.0;
  const double end = std::ldexp(1.0, is_signed(in.first_type) ? bits - 1 : bits);
  const uint64_t greatest = truncate(~uint64_t{0}, bytes) >> (is_signed(in.first_type) ? 1 : 0);
  const auto how = static_cast<ToIntegral>(in.mode);
  for_lanes(mask, [&](int lane) {
    const double value = integral(float_source(a[lane], in), how);
    uint64_t result;
    if (value != value) {
      result = wide ? uint64_t{1} << (bits - 1) : 0;
    } else if (value >= end) {
      result = greatest;
    } else if (value < low) {
      result = static_cast<uint64_t>(static_cast<int64_t>(low));
    } else {
      result =
          is_signed(in.first_type) ? static_cast<uint64_t>(static_cast<int64_t>(value)) : static_cast<uint64_t>(value);
    }
    d[lane] = truncate(result, bytes);
  });
}

// An integer as a double that rounds to anything narrower as the integer itself would.
double sticky_double(uint64_t bits, const Instruction& in) {
  const int bytes = size_of(in.type);
  const bool negative = is_signed(in.type) && sign_extend(bits, bytes) < 0;
  uint64_t magnitude = negative ? 0 - static_cast<uint64_t>(sign_extend(bits, bytes)) : truncate(bits, bytes);
  if (in.first_type != Type::F64 && magnitude >> 53)
    magnitude = (magnitude & ~uint64_t{0x7ff}) | ((magnitude & 0x7ff) ? 0x800 : 0);
  const auto value = static_cast<double>(magnitude);
  return negative ? -value : value;
}

void integer_to_float(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t* a = operand(warp, in, 1);
  for_lanes(mask, [&](int lane) { d[lane] = float_bits(sticky_double(a[lane], in), in); });
}

void integer_to_integer(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t* a = operand(warp, in, 1);
  const int from = size_of(in.type), to = size_of(in.first_type);
  const bool to_signed = is_signed(in.first_type);
  const auto greatest = static_cast<__int128>(truncate(~uint64_t{0}, to) >> (to_signed ? 1 : 0));
  const __int128 lowest = to_signed ? -greatest - 1 : 0;
  for_lanes(mask, [&](int lane) {
    __int128 value = is_signed(in.type) ? static_cast<__int128>(sign_extend(a[lane], from))
                                        : static_cast<__int128>(truncate(a[lane], from));
    if (in.saturate) value = std::clamp(value, lowest, greatest);
    const auto bits = static_cast<uint64_t>(value);
    // A register wider than the type holds the extended value.
    d[lane] = to_signed && to < 4 ? truncate(static_cast<uint64_t>(sign_extend(bits, to)), 4) : truncate(bits, to);
  });
}

// .rna: to 10 mantissa bits, ties away from zero.
uint64_t to_tf32(uint64_t a) {
  return (a + 0x1000u) & 0xffffe000u;
}

Handler select_pair(Instruction& in) {
  require_operands(in, 3);
  if (in.type != Type::F32 || in.rounding != Rounding::Nearest || in.saturate)
    unsupported(in, "form of cvt is not modelled");
  if (in.has("relu")) unsupported(in, ".relu of a pair is not modelled");
  return in.first_type == Type::F16x2 ? binary<narrow_pair<Half>> : binary<narrow_pair<Bfloat>>;
}

Handler select_cvt(Instruction& in) {
  require_operands(in, 2);
  if (in.types.size() != 2) unsupported(in, "cvt takes two types");
  if (is_packed(in.first_type)) return select_pair(in);
  const ToIntegral how = in.has("rzi")   ? ToIntegral::Zero
                         : in.has("rni") ? ToIntegral::Nearest
                         : in.has("rmi") ? ToIntegral::Down
                         : in.has("rpi") ? ToIntegral::Up
                                         : ToIntegral::None;
  in.mode = static_cast<uint8_t>(how);
  const bool from_float = is_float(in.type), to_float = is_float(in.first_type);
  if (in.first_type == Type::TF32) {
    if (in.type != Type::F32 || !in.has("rna")) unsupported(in, "form of cvt is not modelled");
    return unary<to_tf32>;
  }
  if (is_packed(in.type) || in.has("rna")) unsupported(in, "form of cvt is not modelled");
  const bool plain =
      how == ToIntegral::None && in.rounding == Rounding::Nearest && !in.saturate && !in.flush && !in.has("relu");
  if (plain && in.first_type == Type::F32 && in.type == Type::F16) return unary<widen<Half>>;
  if (plain && in.first_type == Type::F32 && in.type == Type::BF16) return unary<widen<Bfloat>>;
  if (plain && in.first_type == Type::F16 && in.type == Type::F32) return unary<narrow_nearest<Half>>;
  if (plain && in.first_type == Type::BF16 && in.type == Type::F32) return unary<narrow_nearest<Bfloat>>;
  if (!from_float && in.first_type == Type::F64 && in.rounding != Rounding::Nearest && size_of(in.type) == 8) {
    unsupported(in, "directed rounding of 64-bit integers to f64 is not modelled");
  }
  if (from_float) return to_float ? float_to_float : float_to_integer;
  return to_float ? integer_to_float : integer_to_integer;
}

}  // namespace

const OpcodeRows& convert_opcodes() {
  static const OpcodeRows rows = {
      {"cvt", "rn rz rm rp rna rni rzi rmi rpi ftz sat relu", select_cvt},
  };
  return rows;
}

}  // namespace ptxsim
