// setp, set, selp, slct, testp, copysign.
#include "handlers.h"

namespace ptxsim {
namespace {

enum Relation : uint8_t { Eq, Ne, Lt, Le, Gt, Ge, Num, Nan };
constexpr uint8_t kUnordered = 16;  // equ, neu, ...: also true when an operand is NaN

enum Combine : uint8_t { NoCombine, And, Or, Xor };

struct Comparison {
  const char* name;
  uint8_t mode;
};
constexpr Comparison kComparisons[] = {
    {"eq", Eq},
    {"ne", Ne},
    {"lt", Lt},
    {"le", Le},
    {"gt", Gt},
    {"ge", Ge},
    {"lo", Lt},
    {"ls", Le},
    {"hi", Gt},
    {"hs", Ge},
    {"equ", Eq | kUnordered},
    {"neu", Ne | kUnordered},
    {"ltu", Lt | kUnordered},
    {"leu", Le | kUnordered},
    {"gtu", Gt | kUnordered},
    {"geu", Ge | kUnordered},
    {"num", Num},
    {"nan", Nan},
};

template <class T>
bool relate(T x, T y, uint8_t mode) {
  switch (mode) {
    case Eq:
      return x == y;
    case Ne:
      return x != y;
    case Lt:
      return x < y;
    case Le:
      return x <= y;
    case Gt:
      return x > y;
    default:
      return x >= y;
  }
}

bool relate_float(double x, double y, uint8_t mode) {
  const bool unordered = x != x || y != y;
  if (mode == Num) return !unordered;
  if (mode == Nan) return unordered;
  if (unordered) return mode & kUnordered;
  return relate(x, y, static_cast<uint8_t>(mode & ~kUnordered));
}

double float_operand(uint64_t bits, const Instruction& in) {
  if (in.type == Type::F64) return as_double(bits);
  const float value = to_float(bits, in.type);
  return in.flush ? flushed(value) : value;
}

bool combined(bool result, bool other, uint8_t combine) {
  if (combine == And) return result && other;
  if (combine == Or) return result || other;
  if (combine == Xor) return result != other;
  return result;
}

// Stores what `compare` says of each lane: as predicates for setp, as ones or 1.0 for set.
template <bool set, class Compare>
void store_comparison(Warp& warp, const Instruction& in, LaneMask mask, Compare compare) {
  const Operand& destination = in.operands[0];
  uint64_t* d = warp.lanes(destination.reg);
  uint64_t* complement = destination.second >= 0 ? warp.lanes(destination.second) : nullptr;
  const uint64_t *a = operand(warp, in, 1), *b = operand(warp, in, 2);
  const uint64_t* c = in.combine ? operand(warp, in, 3) : nullptr;
  const bool negated = in.combine && in.operands[3].negated;
  for_lanes(mask, [&](int lane) {
    const bool holds = compare(a[lane], b[lane]);
    const bool other = c && ((c[lane] & 1) != 0) != negated;
    const bool result = combined(holds, other, in.combine);
    if constexpr (set) {
      d[lane] = in.first_type == Type::F32 ? raw_bits(result ? 1.0f : 0.0f)
                : result                   ? truncate(~uint64_t{0}, size_of(in.first_type))
                                           : 0;
    } else {
      d[lane] = result;
      if (complement) complement[lane] = combined(!holds, other, in.combine);
    }
  });
}

template <bool set>
void compare_floats(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  store_comparison<set>(warp, in, mask, [&](uint64_t a, uint64_t b) {
    return relate_float(float_operand(a, in), float_operand(b, in), in.mode);
  });
}
template <bool set>
void compare_signed(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  const int bytes = size_of(in.type);
  store_comparison<set>(warp, in, mask, [&](uint64_t a, uint64_t b) {
    return relate(sign_extend(a, bytes), sign_extend(b, bytes), in.mode);
  });
}
template <bool set>
void compare_unsigned(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  const int bytes = size_of(in.type);
  store_comparison<set>(
      warp, in, mask, [&](uint64_t a, uint64_t b) { return relate(truncate(a, bytes), truncate(b, bytes), in.mode); });
}

template <bool set>
Handler select_setp(Instruction& in) {
  require_operands(in, 3);
  const Comparison* found = nullptr;
  for (const Comparison& comparison : kComparisons) {
    if (!in.modifiers.empty() && in.modifiers[0] == comparison.name) found = &comparison;
  }
  if (!found) unsupported(in, "comparison is not modelled");
  in.mode = found->mode;
  in.combine = in.has("and") ? And : in.has("or") ? Or : in.has("xor") ? Xor : NoCombine;
  if (in.combine) require_operands(in, 4);
  if (is_packed(in.type) || in.type == Type::Pred) unsupported(in, "type is not modelled");
  if (is_float(in.type)) return compare_floats<set>;
  return is_signed(in.type) ? compare_signed<set> : compare_unsigned<set>;
}

void select_by_predicate(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  const int bytes = size_of(in.type);
  const uint64_t flip = in.operands[3].negated;
  uint64_t* d = operand(warp, in, 0);
  const uint64_t *a = operand(warp, in, 1), *b = operand(warp, in, 2), *p = operand(warp, in, 3);
  for_lanes(mask, [&](int lane) { d[lane] = truncate((p[lane] ^ flip) & 1 ? a[lane] : b[lane], bytes); });
}
Handler select_selp(Instruction& in) {
  require_operands(in, 4);
  return select_by_predicate;
}

void test_property(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  const uint64_t* a = operand(warp, in, 1);
  const std::string& property = in.modifiers[0];
  for_lanes(mask, [&](int lane) {
    const bool wide = in.type == Type::F64;
    const int kind = wide ? std::fpclassify(as_double(a[lane])) : std::fpclassify(as_float(a[lane]));
    if (property == "finite") d[lane] = kind != FP_NAN && kind != FP_INFINITE;
    if (property == "infinite") d[lane] = kind == FP_INFINITE;
    if (property == "number") d[lane] = kind != FP_NAN;
    if (property == "notanumber") d[lane] = kind == FP_NAN;
    if (property == "normal") d[lane] = kind == FP_NORMAL;
    if (property == "subnormal") d[lane] = kind == FP_SUBNORMAL;
  });
}
Handler select_testp(Instruction& in) {
  require_operands(in, 2);
  return test_property;
}

uint64_t copysign_f32(uint64_t a, uint64_t b) {
  return (b & 0x7fffffffu) | (a & 0x80000000u);
}
uint64_t copysign_f64(uint64_t a, uint64_t b) {
  return (b & ~(uint64_t{1} << 63)) | (a & uint64_t{1} << 63);
}
Handler select_copysign(Instruction& in) {  // copysign d, a, b: the sign of a on b
  require_operands(in, 3);
  return in.type == Type::F64 ? binary<copysign_f64> : binary<copysign_f32>;
}

}  // namespace

const OpcodeRows& compare_opcodes() {
  static const char* const comparisons = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz";
  static const OpcodeRows rows = {
      {"setp", comparisons, select_setp<false>},
      {"set", comparisons, select_setp<true>},
      {"selp", "", select_selp},
      {"testp", "finite infinite number notanumber normal subnormal", select_testp},
      {"copysign", "", select_copysign},
  };
  return rows;
}

}  // namespace ptxsim
