// The table of opcodes. Each execution file offers its own rows; adding an opcode is adding a row and a handler.
#pragma once

#include <string>
#include <vector>

#include "program.h"

namespace ptxsim {

struct Opcode {
  const char* name;  // may hold dots: "cp.async.wait_group"; the longest name that fits wins
  // The modifiers that the handler honours (or that change nothing here), separated by spaces; types and vector
  // widths are always parsed. "cache" stands for every L1:: and L2:: hint, "shape" for a matrix shape.
  const char* modifiers;
  // Checks the instruction and returns its handler; null where `control` says what happens, or for no effect.
  Handler (*select)(Instruction&);
  bool writes_first = true;  // the first operand is written
};

using OpcodeRows = std::vector<Opcode>;
const OpcodeRows& arithmetic_opcodes();
const OpcodeRows& bitwise_opcodes();
const OpcodeRows& compare_opcodes();
const OpcodeRows& convert_opcodes();
const OpcodeRows& function_opcodes();
const OpcodeRows& memory_opcodes();
const OpcodeRows& atomic_opcodes();
const OpcodeRows& async_opcodes();
const OpcodeRows& matrix_opcodes();
const OpcodeRows& wgmma_opcodes();
const OpcodeRows& tensor_memory_opcodes();
const OpcodeRows& warp_opcodes();
const OpcodeRows& control_opcodes();
const OpcodeRows& mbarrier_opcodes();
const OpcodeRows& bulk_opcodes();

// Fills what the dotted parts say; throws Unsupported for an opcode or a modifier that no row lists.
const Opcode& decode_opcode(Instruction& in, const std::string& full);
// Chooses the handler, once the operands are known, and notes what the whole program needs to know.
void finish_instruction(const Opcode& opcode, Instruction& in, Program& program);

// For select functions: no such form.
[[noreturn]] void unsupported(const Instruction& in, const std::string& what);

}  // namespace ptxsim
