// A decoded kernel: what the parser makes and the execution reads.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "scalar.h"

namespace ptxsim {

using LaneMask = uint32_t;
inline constexpr LaneMask kAllLanes = 0xffffffffu;
inline constexpr int kLanes = 32;

// The machine does not model what the PTX asks for.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// The kernel did something that stops a GPU or leaves it undefined.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Space : uint8_t { Generic, Global, Shared, Param, Local };
enum class Rounding : uint8_t { Nearest, Zero, Down, Up };

// Windows of the generic address space. Global addresses are the host's own, which never reach 2^60.
inline constexpr uint64_t kSharedWindow = 0x1000000000000000ull;
inline constexpr uint64_t kParamWindow = 0x2000000000000000ull;
inline constexpr uint64_t kLocalWindow = 0x3000000000000000ull;
inline constexpr uint64_t kWindowBytes = uint64_t{1} << 28;

struct Operand {
  enum class Kind : uint8_t { None, Register, Vector, Address };
  Kind kind = Kind::None;
  bool negated = false;       // !%p
  int reg = -1;               // the register, or the base of an address
  int second = -1;            // the register after '|', as in setp's %p|%q
  int64_t offset = 0;         // of an address
  std::vector<int> elements;  // of a vector, or the coordinates in an address of a tensor

  // The register that holds element i, whether or not braces were written.
  int element(size_t i) const { return kind == Kind::Vector ? elements[i] : reg; }
};

class Block;
struct Warp;
struct Instruction;
using Handler = void (*)(Block&, Warp&, const Instruction&, LaneMask);

// Instructions that decide where a warp goes next or when; the block's scheduler runs them.
enum class Control : uint8_t { None, Branch, Exit, BarrierSync, BarrierArrive };

struct Instruction {
  Handler handler = nullptr;
  Handler inner = nullptr;  // what a wrapping handler (directed rounding) runs
  Control control = Control::None;
  Space space = Space::Generic;
  Type type = Type::None;        // the last type suffix
  Type first_type = Type::None;  // the first one: the destination's, where two are written
  Rounding rounding = Rounding::Nearest;
  bool flush = false;     // .ftz
  bool saturate = false;  // .sat
  bool is_wgmma = false;
  bool is_copy = false;  // mov
  uint8_t vector = 1;    // .v2, .v4, .v8; number of matrices of ldmatrix
  uint8_t mode = 0;      // an opcode's own selector, set by its select function
  uint8_t combine = 0;   // the boolean operator of setp
  int guard = -1;        // predicate register
  bool guard_negated = false;
  int target = -1;  // index of a branch's target
  int statistic = 0;
  int index = 0;            // in Program::code
  int m = 0, n = 0, k = 0;  // matrix shape
  std::vector<Operand> operands;
  std::vector<int> writes;  // registers written, for wgmma's fence rule

  int line = 0;
  std::string text;
  std::string name;
  std::vector<std::string> modifiers;  // every dotted part after the opcode
  std::vector<Type> types;

  bool has(std::string_view modifier) const;
  std::string where() const { return "line " + std::to_string(line) + ": " + text; }
};

enum class Special : uint8_t {
  TidX,
  TidY,
  TidZ,
  NtidX,
  NtidY,
  NtidZ,
  CtaidX,
  CtaidY,
  CtaidZ,
  NctaidX,
  NctaidY,
  NctaidZ,
  Lane,
  Warp,
  MaskEq,
  MaskLt,
  MaskLe,
  MaskGt,
  MaskGe,
  WarpCount,
  SharedBytes,
  Zero,
  One,
};

struct Parameter {
  std::string name;
  int offset;
  int size;
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Parameter> params;
  int param_bytes = 0;
  int registers = 0;
  int static_shared = 0;  // rounded up to 16, where dynamic shared memory starts
  int local_bytes = 0;
  int max_threads = 0;     // 0: not declared
  int shared_granule = 4;  // the smallest shared or global access, in bytes, 4 at most: what the
  int global_granule = 4;  // race checks may take as one cell
  bool uses_wgmma = false;
  bool uses_mbarriers = false;
  bool uses_tensor_memory = false;
  bool polls = false;                                                // some load may wait for another block
  std::vector<std::pair<int, uint64_t>> constants;                   // register, value in every lane
  std::map<Special, int> specials;                                   // special register -> register
  std::vector<std::unique_ptr<std::vector<uint8_t>>> module_memory;  // .global and .const variables
  std::vector<std::string> statistic_names;                          // full opcodes
};

}  // namespace ptxsim
