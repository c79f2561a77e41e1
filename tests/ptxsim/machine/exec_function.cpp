// ex2, lg2, rcp, sqrt, rsqrt, sin, cos, tanh: computed in float64 and rounded once, so better than any GPU; the option
// `perturb` makes them as bad as the worst.
#include "handlers.h"

namespace ptxsim {
namespace {

using Function = double (*)(double);
double ex2(double x) {
  return std::exp2(x);
}
double lg2(double x) {
  return std::log2(x);
}
double rcp(double x) {
  return 1 / x;
}
double root(double x) {
  return std::sqrt(x);
}
double rsqrt(double x) {
  return 1 / std::sqrt(x);
}
double sine(double x) {
  return std::sin(x);
}
double cosine(double x) {
  return std::cos(x);
}
double hyperbolic(double x) {
  return std::tanh(x);
}

template <Function f>
void f32_function(Block& block, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t* a = operand(warp, in, 1);
  const bool approximate = in.mode;
  for_lanes(mask, [&](int lane) {
    const float x = in.flush ? flushed(as_float(a[lane])) : as_float(a[lane]);
    auto result = static_cast<float>(f(x));
    if (approximate) result = block.approximate(result);
    d[lane] = bits_of(in.flush ? flushed(result) : result);
  });
}

template <Function f>
uint64_t f64_function(uint64_t a) {
  return bits_of(f(as_double(a)));
}

template <Function f, class Format>
uint64_t f16_function(uint64_t a) {
  return Format::from_float(to_odd_float(f(Format::to_float(a))));
}
template <Unary f>
uint64_t packed(uint64_t a) {
  return f(a & 0xffff) | f(a >> 16 & 0xffff) << 16;
}

template <Function f>
Handler select_function(Instruction& in) {
  require_operands(in, 2);
  if (in.rounding != Rounding::Nearest) unsupported(in, "directed rounding is not modelled");
  in.mode = in.has("approx");
  switch (in.type) {
    case Type::F32:
      return f32_function<f>;
    case Type::F64:
      return unary<f64_function<f>>;
    case Type::F16:
      return unary<f16_function<f, Half>>;
    case Type::BF16:
      return unary<f16_function<f, Bfloat>>;
    case Type::F16x2:
      return unary<packed<f16_function<f, Half>>>;
    case Type::BF16x2:
      return unary<packed<f16_function<f, Bfloat>>>;
    default:
      unsupported(in, "type is not modelled");
  }
}

}  // namespace

const OpcodeRows& function_opcodes() {
  static const char* const modifiers = "approx rn rz rm rp ftz";
  static const OpcodeRows rows = {
      {"ex2", modifiers, select_function<ex2>},     {"lg2", modifiers, select_function<lg2>},
      {"rcp", modifiers, select_function<rcp>},     {"sqrt", modifiers, select_function<root>},
      {"rsqrt", modifiers, select_function<rsqrt>}, {"sin", modifiers, select_function<sine>},
      {"cos", modifiers, select_function<cosine>},  {"tanh", modifiers, select_function<hyperbolic>},
  };
  return rows;
}

}  // namespace ptxsim
