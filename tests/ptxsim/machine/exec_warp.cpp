// shfl, vote, match, redux, activemask, elect, bar.warp.sync: lanes of a warp talking to each other.
#include <algorithm>

#include "handlers.h"

namespace ptxsim {
namespace {

// The lanes that take part must be the ones that are here: a compiler that lets them come apart has broken the kernel.
void require_members(const Warp& warp, const Instruction& in, uint64_t members, LaneMask mask) {
  if ((static_cast<LaneMask>(members) & warp.live) != mask) {
    throw Fault("the active lanes differ from the member mask at " + in.where());
  }
}
uint64_t first_lane_value(Warp& warp, const Instruction& in, size_t i, LaneMask mask) {
  return operand(warp, in, i)[__builtin_ctz(mask)];
}

enum Shuffle : uint8_t { Up, Down, Butterfly, Index };

void shuffle(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  require_members(warp, in, first_lane_value(warp, in, 4, mask), mask);
  const Operand& destination = in.operands[0];
  uint64_t* d = warp.lanes(destination.reg);
  uint64_t* valid = destination.second >= 0 ? warp.lanes(destination.second) : nullptr;
  const uint64_t *b = operand(warp, in, 2), *c = operand(warp, in, 3);
  uint64_t source[kLanes];
  std::copy_n(operand(warp, in, 1), kLanes, source);
  for_lanes(mask, [&](int lane) {
    const int offset = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = lane;
    bool in_range = false;
    switch (in.mode) {
      case Up:
        from = lane - offset;
        in_range = from >= last;
        break;
      case Down:
        from = lane + offset;
        in_range = from <= last;
        break;
      case Butterfly:
        from = lane ^ offset;
        in_range = from <= last;
        break;
      default:
        from = first | (offset & ~segment);
        in_range = from <= last;
        break;
    }
    if (!in_range) from = lane;
    if (!(mask >> from & 1)) throw Fault("shuffle from a lane that takes no part, " + in.where());
    d[lane] = truncate(source[from], 4);
    if (valid) valid[lane] = in_range;
  });
}
Handler select_shuffle(Instruction& in) {
  require_operands(in, 5);
  in.mode = in.has("up") ? Up : in.has("down") ? Down : in.has("bfly") ? Butterfly : Index;
  return shuffle;
}

enum Vote : uint8_t { All, Any, Uniform, Ballot };

void vote(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  require_members(warp, in, first_lane_value(warp, in, 2, mask), mask);
  const uint64_t* a = operand(warp, in, 1);
  const uint64_t flip = in.operands[1].negated;
  LaneMask ballot = 0;
  for_lanes(mask, [&](int lane) { ballot |= static_cast<LaneMask>((a[lane] ^ flip) & 1) << lane; });
  const bool all = ballot == mask, none = ballot == 0;
  const uint64_t result = in.mode == All ? all : in.mode == Any ? !none : in.mode == Uniform ? all || none : ballot;
  uint64_t* d = operand(warp, in, 0);
  for_lanes(mask, [&](int lane) { d[lane] = result; });
}
Handler select_vote(Instruction& in) {
  require_operands(in, 3);
  in.mode = in.has("all") ? All : in.has("any") ? Any : in.has("uni") ? Uniform : Ballot;
  return vote;
}

void match(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  require_members(warp, in, first_lane_value(warp, in, 2, mask), mask);
  uint64_t value[kLanes];
  std::copy_n(operand(warp, in, 1), kLanes, value);
  uint64_t* d = operand(warp, in, 0);
  for_lanes(mask, [&](int lane) {
    LaneMask equal = 0;
    for_lanes(mask, [&](int other) { equal |= static_cast<LaneMask>(value[other] == value[lane]) << other; });
    d[lane] = equal;
  });
}
Handler select_match(Instruction& in) {
  require_operands(in, 3);
  if (!in.has("any")) unsupported(in, "match.all is not modelled");
  return match;
}

enum Reduction : uint8_t { Add, Min, Max, And, Or, Xor };
enum FloatReduction : uint8_t { kGreatest = 1, kAbsolute = 2 };  // as bits
constexpr const char* kReductions[] = {"add", "min", "max", "and", "or", "xor"};

void reduce(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  require_members(warp, in, first_lane_value(warp, in, 2, mask), mask);
  const uint64_t* a = operand(warp, in, 1);
  bool first = true;
  uint64_t result = 0;
  for_lanes(mask, [&](int lane) {
    const uint64_t value = truncate(a[lane], 4);
    const bool below = is_signed(in.type) ? static_cast<int32_t>(value) < static_cast<int32_t>(result) : value < result;
    if (first) {
      result = value;
      first = false;
      return;
    }
    switch (in.mode) {
      case Add:
        result = truncate(result + value, 4);
        break;
      case Min:
        result = below ? value : result;
        break;
      case Max:
        result = below ? result : value;
        break;
      case And:
        result &= value;
        break;
      case Or:
        result |= value;
        break;
      default:
        result ^= value;
        break;
    }
  });
  uint64_t* d = operand(warp, in, 0);
  for_lanes(mask, [&](int lane) { d[lane] = result; });
}

// min and max of float32 (sm_100). A NaN gives way to a number, unless .NaN is given.
void reduce_floats(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  require_members(warp, in, first_lane_value(warp, in, 2, mask), mask);
  const uint64_t* a = operand(warp, in, 1);
  float result = std::nanf("");
  bool nan = false;
  for_lanes(mask, [&](int lane) {
    const float value = in.mode & kAbsolute ? std::fabs(as_float(a[lane])) : as_float(a[lane]);
    nan |= value != value;
    const bool below = value < result || (value == result && std::signbit(value) && !std::signbit(result));
    const bool above = value > result || (value == result && !std::signbit(value) && std::signbit(result));
    if (result != result || (in.mode & kGreatest ? above : below)) result = value;
  });
  const uint64_t bits = result != result || (nan && in.has("NaN")) ? 0x7fffffffu : bits_of(result);
  uint64_t* d = operand(warp, in, 0);
  for_lanes(mask, [&](int lane) { d[lane] = bits; });
}

Handler select_redux(Instruction& in) {
  require_operands(in, 3);
  if (is_float(in.type)) {
    if (in.type != Type::F32 || !(in.has("min") || in.has("max"))) unsupported(in, "redux of this is not modelled");
    in.mode = static_cast<uint8_t>((in.has("max") ? kGreatest : 0) | (in.has("abs") ? kAbsolute : 0));
    return reduce_floats;
  }
  if (in.has("abs") || in.has("NaN")) unsupported(in, "modifier of an integer redux is not modelled");
  const auto found =
      std::find_if(std::begin(kReductions), std::end(kReductions), [&](const char* name) { return in.has(name); });
  if (found == std::end(kReductions)) unsupported(in, "reduction is not modelled");
  in.mode = static_cast<uint8_t>(found - std::begin(kReductions));
  return reduce;
}

// Lane 4 r + c holds elements 2 c and 2 c + 1 of row r of an 8 x 8 matrix; afterwards, of row r of its transpose.
void transpose_matrix(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  if (mask != kAllLanes) throw Fault("the warp is not converged at " + in.where());
  uint64_t source[kLanes];
  std::copy_n(operand(warp, in, 1), kLanes, source);
  uint64_t* d = operand(warp, in, 0);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    const auto element = [&](int from) { return source[4 * from + row / 2] >> (row % 2 * 16) & 0xffff; };
    d[lane] = element(column) | element(column + 1) << 16;
  }
}
Handler select_movmatrix(Instruction& in) {
  require_operands(in, 2);
  if (in.type != Type::B16 || !in.has("m8n8") || !in.has("trans")) unsupported(in, "matrix shape is not modelled");
  return transpose_matrix;
}

void active_mask(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  uint64_t* d = operand(warp, in, 0);
  for_lanes(mask, [&](int lane) { d[lane] = mask; });
}

void elect(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  require_members(warp, in, first_lane_value(warp, in, 1, mask), mask);
  const int leader = __builtin_ctz(mask);
  uint64_t* d = operand(warp, in, 0);
  uint64_t* elected = in.operands[0].second >= 0 ? warp.lanes(in.operands[0].second) : nullptr;
  for_lanes(mask, [&](int lane) {
    d[lane] = static_cast<uint64_t>(leader);
    if (elected) elected[lane] = lane == leader;
  });
}

void warp_sync(Block&, Warp& warp, const Instruction& in, LaneMask mask) {
  require_members(warp, in, first_lane_value(warp, in, 0, mask), mask);
  warp.synchronise_lanes();
}

template <Handler handler, size_t operands>
Handler plain(Instruction& in) {
  require_operands(in, operands);
  return handler;
}

}  // namespace

const OpcodeRows& warp_opcodes() {
  static const OpcodeRows rows = {
      {"shfl.sync", "up down bfly idx", select_shuffle},
      {"vote.sync", "all any uni ballot", select_vote},
      {"match", "any all sync", select_match},
      {"redux.sync", "add min max and or xor abs NaN", select_redux},
      {"activemask", "", plain<active_mask, 1>},
      {"elect.sync", "", plain<elect, 2>},
      {"movmatrix", "sync aligned m8n8 trans", select_movmatrix},
      {"bar.warp.sync", "", plain<warp_sync, 1>, false},
      {"barrier.warp.sync", "", plain<warp_sync, 1>, false},
  };
  return rows;
}

}  // namespace ptxsim
