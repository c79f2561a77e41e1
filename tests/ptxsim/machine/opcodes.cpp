// Finds the row of an opcode and checks its modifiers against it, so that nothing is silently ignored.
#include "opcodes.h"

#include <algorithm>
#include <cstdio>
#include <sstream>
#include <unordered_map>
#include <unordered_set>

namespace ptxsim {
namespace {

struct Row {
  Opcode opcode;
  std::unordered_set<std::string> modifiers;
};

const std::unordered_map<std::string, Row>& table() {
  static const auto rows = [] {
    std::unordered_map<std::string, Row> all;
    for (const OpcodeRows* list :
         {&arithmetic_opcodes(), &bitwise_opcodes(), &compare_opcodes(), &convert_opcodes(), &function_opcodes(),
          &memory_opcodes(), &atomic_opcodes(), &async_opcodes(), &matrix_opcodes(), &wgmma_opcodes(), &warp_opcodes(),
          &control_opcodes(), &mbarrier_opcodes(), &bulk_opcodes(), &tensor_memory_opcodes()}) {
      for (const Opcode& opcode : *list) {
        Row row{opcode, {}};
        std::istringstream words(opcode.modifiers);
        for (std::string word; words >> word;) row.modifiers.insert(word);
        all.emplace(opcode.name, std::move(row));
      }
    }
    return all;
  }();
  return rows;
}

std::vector<std::string> split(const std::string& full) {
  std::vector<std::string> parts;
  std::istringstream stream(full);
  for (std::string part; std::getline(stream, part, '.');) parts.push_back(part);
  return parts;
}

bool parse_shape(const std::string& part, Instruction& in) {
  return part.size() > 3 && std::sscanf(part.c_str(), "m%dn%dk%d", &in.m, &in.n, &in.k) == 3;
}

void apply(const std::string& part, Instruction& in) {
  if (part == "ftz") in.flush = true;
  if (part == "sat") in.saturate = true;
  if (part == "rz") in.rounding = Rounding::Zero;
  if (part == "rm") in.rounding = Rounding::Down;
  if (part == "rp") in.rounding = Rounding::Up;
  if (part == "v2" || part == "v4" || part == "v8") in.vector = static_cast<uint8_t>(part[1] - '0');
  if (in.space == Space::Generic) {  // cp.async names two spaces; its destination comes first
    if (part == "global" || part == "const") in.space = Space::Global;
    if (part.rfind("shared", 0) == 0) in.space = Space::Shared;
    if (part.rfind("param", 0) == 0) in.space = Space::Param;
    if (part == "local") in.space = Space::Local;
  }
}

}  // namespace

bool Instruction::has(std::string_view modifier) const {
  return std::find(modifiers.begin(), modifiers.end(), modifier) != modifiers.end();
}

void unsupported(const Instruction& in, const std::string& what) {
  throw Unsupported("PTX line " + std::to_string(in.line) + ": " + what + ": " + in.text);
}

const Opcode& decode_opcode(Instruction& in, const std::string& full) {
  in.text = full;
  const std::vector<std::string> parts = split(full);
  const Row* row = nullptr;
  size_t used = 0;
  std::string name;
  for (size_t i = 0; i < std::min<size_t>(parts.size(), 4); ++i) {
    name += (i ? "." : "") + parts[i];
    const auto found = table().find(name);
    if (found == table().end()) continue;
    row = &found->second;
    in.name = name;
    used = i + 1;
  }
  if (!row) unsupported(in, "opcode is not modelled");
  for (size_t i = used; i < parts.size(); ++i) {
    const std::string& part = parts[i];
    in.modifiers.push_back(part);
    const bool hint = part.rfind("L1::", 0) == 0 || part.rfind("L2::", 0) == 0;
    if (const Type type = type_named(part); type != Type::None) {
      in.types.push_back(type);
    } else if (!(row->modifiers.count(part) || (hint && row->modifiers.count("cache")) ||
                 (row->modifiers.count("shape") && parse_shape(part, in)))) {
      unsupported(in, "modifier ." + part + " is not modelled");
    }
    apply(part, in);
  }
  if (!in.types.empty()) {
    in.type = in.types.back();
    in.first_type = in.types.front();
  }
  if (in.name == "bra") in.control = Control::Branch;  // its operand is a label, which the parser must know
  return row->opcode;
}

void finish_instruction(const Opcode& opcode, Instruction& in, Program& program) {
  in.handler = opcode.select(in);
  if (opcode.writes_first && !in.operands.empty()) {
    const Operand& first = in.operands[0];
    if (first.kind == Operand::Kind::Vector) in.writes = first.elements;
    if (first.kind == Operand::Kind::Register) in.writes = {first.reg};
    if (first.second >= 0) in.writes.push_back(first.second);
  }
  const bool touches_memory = std::any_of(in.operands.begin(), in.operands.end(),
                                          [](const Operand& op) { return op.kind == Operand::Kind::Address; });
  const bool tensor = in.name.rfind("tcgen05", 0) == 0;
  if (touches_memory && !tensor && in.name != "ldmatrix" && in.name != "stmatrix" && in.name != "cp.async") {
    // The granule is the smallest access, so that neighbours written by two warps are no false race.
    const int bytes = size_of(in.type) * in.vector;
    const bool generic = in.space == Space::Generic;
    if (generic || in.space == Space::Shared) program.shared_granule = std::min(program.shared_granule, bytes);
    if (generic || in.space == Space::Global) program.global_granule = std::min(program.global_granule, bytes);
  }
  // The box of a tensor copy may end at any element.
  if (in.name == "cp.async.bulk.tensor") program.global_granule = std::min(program.global_granule, 2);
  program.uses_mbarriers |= in.name == "mbarrier.init";
  in.is_wgmma = in.name == "wgmma.mma_async";
  in.is_copy = in.name == "mov";
  program.uses_wgmma |= in.is_wgmma;
  program.uses_tensor_memory |= tensor;
  const bool strong = in.has("acquire") || in.has("relaxed") || in.has("volatile");
  program.polls |= in.space != Space::Shared && ((in.name == "ld" && strong) || in.name == "atom");
}

}  // namespace ptxsim
