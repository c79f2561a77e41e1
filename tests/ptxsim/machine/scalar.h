// PTX scalar types and the conversions between register bits and C++ values.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace ptxsim {

enum class Type : uint8_t {
  None,
  Pred,
  B8,
  B16,
  B32,
  B64,
  B128,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  F16,
  BF16,
  F32,
  F64,
  F16x2,
  BF16x2,
  F32x2,
  TF32,
};

// Type::None when `name` (without its dot) is no type.
Type type_named(std::string_view name);

constexpr int size_of(Type type) {
  switch (type) {
    case Type::Pred:
    case Type::B8:
    case Type::U8:
    case Type::S8:
      return 1;
    case Type::B16:
    case Type::U16:
    case Type::S16:
    case Type::F16:
    case Type::BF16:
      return 2;
    case Type::B64:
    case Type::U64:
    case Type::S64:
    case Type::F64:
    case Type::F32x2:
      return 8;
    case Type::B128:
      return 16;
    default:
      return 4;
  }
}
constexpr bool is_signed(Type type) {
  return type >= Type::S8 && type <= Type::S64;
}
constexpr bool is_packed(Type type) {
  return type == Type::F16x2 || type == Type::BF16x2;
}
constexpr bool is_float(Type type) {
  return type >= Type::F16 && type <= Type::F64;
}

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float as_float(uint64_t bits) {
  return bits_as<float>(static_cast<uint32_t>(bits));
}
inline double as_double(uint64_t bits) {
  return bits_as<double>(bits);
}
inline uint64_t raw_bits(float value) {
  return bits_as<uint32_t>(value);
}
// Arithmetic gives the canonical NaN, as the ISA says of every f32 instruction.
inline uint64_t bits_of(float value) {
  return value != value ? 0x7fffffffu : bits_as<uint32_t>(value);
}
inline uint64_t bits_of(double value) {
  return bits_as<uint64_t>(value);
}

inline uint64_t truncate(uint64_t value, int bytes) {
  return bytes == 8 ? value : value & ((uint64_t{1} << (8 * bytes)) - 1);
}
inline int64_t sign_extend(uint64_t value, int bytes) {
  const int shift = 64 - 8 * bytes;
  return static_cast<int64_t>(value << shift) >> shift;
}

// Subnormals become zeros of the same sign (.ftz).
inline float flushed(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  return (bits & 0x7f800000u) ? value : bits_as<float>(bits & 0x80000000u);
}

// The two 16-bit formats: exact to float, round to nearest even from float, canonical NaN 0x7fff.
struct Half {
  static float to_float(uint64_t bits) { return static_cast<float>(bits_as<_Float16>(static_cast<uint16_t>(bits))); }
  static uint16_t from_float(float value) {
    return value != value ? 0x7fff : bits_as<uint16_t>(static_cast<_Float16>(value));
  }
};
struct Bfloat {
  static float to_float(uint64_t bits) { return bits_as<float>(static_cast<uint32_t>(bits & 0xffff) << 16); }
  static uint16_t from_float(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

// A double on its way to a 16-bit format: rounding to odd here makes the second rounding exact.
inline float to_odd_float(double value) {
  const auto nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || !std::isfinite(nearest) || value != value) return nearest;
  const uint32_t bits = bits_as<uint32_t>(nearest);
  if (bits & 1) return nearest;
  const bool beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return bits_as<float>(beyond ? bits - 1 : bits + 1);
}
// The value of a floating-point register of at most 32 bits, and back.
inline float to_float(uint64_t bits, Type type) {
  if (type == Type::F16) return Half::to_float(bits);
  if (type == Type::BF16) return Bfloat::to_float(bits);
  return as_float(bits);
}
inline uint64_t from_float(float value, Type type) {
  if (type == Type::F16) return Half::from_float(value);
  if (type == Type::BF16) return Bfloat::from_float(value);
  return bits_of(value);
}
constexpr Type packed_element(Type type) {
  return type == Type::F16x2 ? Type::F16 : Type::BF16;
}

// Tensor cores ignore the 13 low bits of a tf32 operand.
inline float tf32_operand(uint64_t bits) {
  return bits_as<float>(static_cast<uint32_t>(bits) & 0xffffe000u);
}

}  // namespace ptxsim
