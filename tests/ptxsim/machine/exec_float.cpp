// add, sub, mul, min, max, fma and div of floats.
//
// This file is compiled with -frounding-math: directed_rounding runs its handlers under another rounding mode.
#include <cfenv>

#include "arithmetic.h"

namespace ptxsim {
namespace {

// A NaN gives way to a number, and -0 is below +0.
template <class T>
T minimum(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T maximum(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

template <Arithmetic op, class T>
T apply(T a, T b) {
  if constexpr (op == Arithmetic::Add) return a + b;
  if constexpr (op == Arithmetic::Sub) return a - b;
  if constexpr (op == Arithmetic::Mul) return a * b;
  if constexpr (op == Arithmetic::Min) return minimum(a, b);
  if constexpr (op == Arithmetic::Max) return maximum(a, b);
}

inline float saturated(float value) {
  return value > 0 ? (value < 1 ? value : 1.0f) : 0.0f;
}  // NaN gives 0

template <Arithmetic op, bool ftz, bool sat>
uint64_t f32_binary(uint64_t a, uint64_t b) {
  float x = as_float(a), y = as_float(b);
  if constexpr (ftz) x = flushed(x), y = flushed(y);
  float r = apply<op>(x, y);
  if constexpr (ftz) r = flushed(r);
  if constexpr (sat) r = saturated(r);
  return bits_of(r);
}

template <Arithmetic op, bool ftz>
uint64_t f32_nan(uint64_t a, uint64_t b) {  // min.NaN, max.NaN
  return as_float(a) != as_float(a) || as_float(b) != as_float(b) ? 0x7fffffffu : f32_binary<op, ftz, false>(a, b);
}

template <Arithmetic op>
uint64_t f64_binary(uint64_t a, uint64_t b) {
  return bits_of(apply<op>(as_double(a), as_double(b)));
}

// A float32 holds the exact sum or product of two 16-bit floats closely enough that rounding twice is rounding once.
template <Arithmetic op, class Format, bool nan>
uint64_t f16_binary(uint64_t a, uint64_t b) {
  const float x = Format::to_float(a), y = Format::to_float(b);
  if (nan && (x != x || y != y)) return 0x7fff;
  return Format::from_float(apply<op>(x, y));
}

// add, sub, mul and fma of two float32 in one register (sm_100).
template <Binary f>
uint64_t pair(uint64_t a, uint64_t b) {
  return f(a & 0xffffffffu, b & 0xffffffffu) | f(a >> 32, b >> 32) << 32;
}
template <Ternary f>
uint64_t pair(uint64_t a, uint64_t b, uint64_t c) {
  return f(a & 0xffffffffu, b & 0xffffffffu, c & 0xffffffffu) | f(a >> 32, b >> 32, c >> 32) << 32;
}

// min and max of three (sm_100).
template <Binary f>
uint64_t of_three(uint64_t a, uint64_t b, uint64_t c) {
  return f(f(a, b), c);
}

template <Binary f>
uint64_t packed(uint64_t a, uint64_t b) {
  return f(a & 0xffff, b & 0xffff) | f(a >> 16 & 0xffff, b >> 16 & 0xffff) << 16;
}
template <Ternary f>
uint64_t packed(uint64_t a, uint64_t b, uint64_t c) {
  return f(a & 0xffff, b & 0xffff, c & 0xffff) | f(a >> 16 & 0xffff, b >> 16 & 0xffff, c >> 16 & 0xffff) << 16;
}

// Runs the instruction's inner handler under .rz, .rm or .rp.
void directed_rounding(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  const int before = std::fegetround();
  std::fesetround(in.rounding == Rounding::Zero   ? FE_TOWARDZERO
                  : in.rounding == Rounding::Down ? FE_DOWNWARD
                                                  : FE_UPWARD);
  in.inner(block, warp, in, mask);
  std::fesetround(before);
}

Handler rounded(Instruction& in, Handler handler) {
  if (in.rounding == Rounding::Nearest) return handler;
  if (in.type != Type::F32 && in.type != Type::F64 && in.type != Type::F32x2)
    unsupported(in, "directed rounding of this type is not modelled");
  in.inner = handler;
  return directed_rounding;
}

template <Arithmetic op>
Handler float_binary(Instruction& in) {
  const bool nan = in.has("NaN");
  switch (in.type) {
    case Type::F32:
      if (nan) return in.flush ? binary<f32_nan<op, true>> : binary<f32_nan<op, false>>;
      if (in.saturate) return in.flush ? binary<f32_binary<op, true, true>> : binary<f32_binary<op, false, true>>;
      return in.flush ? binary<f32_binary<op, true, false>> : binary<f32_binary<op, false, false>>;
    case Type::F32x2:
      if (nan || in.saturate || op == Arithmetic::Min || op == Arithmetic::Max) break;
      return in.flush ? binary<pair<f32_binary<op, true, false>>> : binary<pair<f32_binary<op, false, false>>>;
    case Type::F64:
      return binary<f64_binary<op>>;
    default:
      break;
  }
  if (in.flush || in.saturate) unsupported(in, ".ftz and .sat of 16-bit floats are not modelled");
  switch (in.type) {
    case Type::F16:
      return nan ? binary<f16_binary<op, Half, true>> : binary<f16_binary<op, Half, false>>;
    case Type::BF16:
      return nan ? binary<f16_binary<op, Bfloat, true>> : binary<f16_binary<op, Bfloat, false>>;
    case Type::F16x2:
      return nan ? binary<packed<f16_binary<op, Half, true>>> : binary<packed<f16_binary<op, Half, false>>>;
    case Type::BF16x2:
      return nan ? binary<packed<f16_binary<op, Bfloat, true>>> : binary<packed<f16_binary<op, Bfloat, false>>>;
    default:
      unsupported(in, "type is not modelled");
  }
}

template <bool ftz, bool sat>
uint64_t fma_f32(uint64_t a, uint64_t b, uint64_t c) {
  float x = as_float(a), y = as_float(b), z = as_float(c);
  if constexpr (ftz) x = flushed(x), y = flushed(y), z = flushed(z);
  float r = std::fma(x, y, z);
  if constexpr (ftz) r = flushed(r);
  if constexpr (sat) r = saturated(r);
  return bits_of(r);
}
uint64_t fma_f64(uint64_t a, uint64_t b, uint64_t c) {
  return bits_of(std::fma(as_double(a), as_double(b), as_double(c)));
}

// A bf16 product has 16 significant bits but its sum with c may need more than a double's 53; rounding that sum to odd
// first makes the second rounding exact.
double sum_to_odd(double a, double b) {
  const double sum = a + b;
  const double t = sum - a;
  const double error = (a - (sum - t)) + (b - t);  // Knuth's two-sum
  if (error == 0 || !std::isfinite(sum)) return sum;
  const uint64_t bits = bits_of(sum);
  if (bits & 1) return sum;
  const bool away = (error > 0) == (sum > 0);
  return as_double(away ? bits + 1 : bits - 1);
}
template <class Format, bool relu>
uint64_t fma_f16(uint64_t a, uint64_t b, uint64_t c) {
  const double product = static_cast<double>(Format::to_float(a)) * Format::to_float(b);
  float r = to_odd_float(sum_to_odd(product, Format::to_float(c)));
  if (relu && !(r > 0)) r = r != r ? r : 0.0f;
  return Format::from_float(r);
}

template <bool ftz>
uint64_t div_f32(uint64_t a, uint64_t b) {
  const float r = ftz ? flushed(flushed(as_float(a)) / flushed(as_float(b))) : as_float(a) / as_float(b);
  return bits_of(r);
}
uint64_t div_f64(uint64_t a, uint64_t b) {
  return bits_of(as_double(a) / as_double(b));
}

void div_approximate(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t *a = operand(warp, in, 1), *b = operand(warp, in, 2);
  const auto input = [&](uint64_t bits) { return in.flush ? flushed(as_float(bits)) : as_float(bits); };
  for_lanes(mask, [&](int lane) {
    const float r = block.approximate(input(a[lane]) / input(b[lane]));
    d[lane] = bits_of(in.flush ? flushed(r) : r);
  });
}

}  // namespace

Handler select_float_fma(Instruction& in) {
  require_operands(in, 4);
  const bool relu = in.has("relu");
  switch (in.type) {
    case Type::F32:
      if (in.saturate) return rounded(in, in.flush ? ternary<fma_f32<true, true>> : ternary<fma_f32<false, true>>);
      return rounded(in, in.flush ? ternary<fma_f32<true, false>> : ternary<fma_f32<false, false>>);
    case Type::F32x2:
      if (relu || in.saturate) break;
      return rounded(in, in.flush ? ternary<pair<fma_f32<true, false>>> : ternary<pair<fma_f32<false, false>>>);
    case Type::F64:
      return rounded(in, ternary<fma_f64>);
    default:
      break;
  }
  if (in.flush || in.saturate) unsupported(in, ".ftz and .sat of 16-bit floats are not modelled");
  switch (in.type) {
    case Type::F16:
      return relu ? ternary<fma_f16<Half, true>> : ternary<fma_f16<Half, false>>;
    case Type::BF16:
      return relu ? ternary<fma_f16<Bfloat, true>> : ternary<fma_f16<Bfloat, false>>;
    case Type::F16x2:
      return relu ? ternary<packed<fma_f16<Half, true>>> : ternary<packed<fma_f16<Half, false>>>;
    case Type::BF16x2:
      return relu ? ternary<packed<fma_f16<Bfloat, true>>> : ternary<packed<fma_f16<Bfloat, false>>>;
    default:
      unsupported(in, "type is not modelled");
  }
}

Handler select_float_division(Instruction& in) {
  require_operands(in, 3);
  if (in.type == Type::F32 && (in.has("full") || in.has("approx"))) return div_approximate;
  if (in.type == Type::F32) return rounded(in, in.flush ? binary<div_f32<true>> : binary<div_f32<false>>);
  if (in.type == Type::F64) return rounded(in, binary<div_f64>);
  unsupported(in, "type is not modelled");
}

template <Arithmetic op>
Handler extreme_of_three(Instruction& in) {
  if (in.has("NaN")) return in.flush ? ternary<of_three<f32_nan<op, true>>> : ternary<of_three<f32_nan<op, false>>>;
  return in.flush ? ternary<of_three<f32_binary<op, true, false>>> : ternary<of_three<f32_binary<op, false, false>>>;
}

Handler select_float_extreme(Instruction& in, Arithmetic op) {
  if (in.type != Type::F32 || in.has("relu")) unsupported(in, "three operands of this type are not modelled");
  return op == Arithmetic::Min ? extreme_of_three<Arithmetic::Min>(in) : extreme_of_three<Arithmetic::Max>(in);
}

Handler select_float_binary(Instruction& in, Arithmetic op) {
  require_operands(in, 3);
  switch (op) {
    case Arithmetic::Add:
      return rounded(in, float_binary<Arithmetic::Add>(in));
    case Arithmetic::Sub:
      return rounded(in, float_binary<Arithmetic::Sub>(in));
    case Arithmetic::Mul:
      return rounded(in, float_binary<Arithmetic::Mul>(in));
    case Arithmetic::Min:
      return rounded(in, float_binary<Arithmetic::Min>(in));
    default:
      return rounded(in, float_binary<Arithmetic::Max>(in));
  }
}

}  // namespace ptxsim
