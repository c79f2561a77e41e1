// What names mean while a kernel is parsed: registers by scope, variables, special registers, constants.
//
// Everything becomes a register: a constant or an address is a register that holds it in every lane from the start.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace ptxsim {

struct Symbol {
  Space space;
  uint64_t address;
  bool after_statics;  // an extern shared array: starts where the static ones end
};

class Names {
public:
  explicit Names(Program& program) : program_(program), scopes_(1) {}

  void open_scope() { scopes_.emplace_back(); }
  void close_scope() { scopes_.pop_back(); }
  void declare(const std::string& name, bool predicate);
  void define(const std::string& name, Symbol symbol) { symbols_[name] = symbol; }

  // Registers; -1 where the name is unknown.
  int find(const std::string& name) const;
  int symbol(const std::string& name, int64_t offset);
  int special(const std::string& name);
  int constant(uint64_t value, bool after_statics = false);
  int sink();  // where results named '_' go

  bool is_predicate(int reg) const {
    return static_cast<size_t>(reg) < predicates_.size() && predicates_[static_cast<size_t>(reg)];
  }
  // Places dynamic shared memory, once the static variables are all known.
  void finish();

private:
  Program& program_;
  std::vector<std::unordered_map<std::string, int>> scopes_;
  std::unordered_map<std::string, Symbol> symbols_;
  std::unordered_map<uint64_t, int> constants_;
  std::vector<size_t> after_statics_;  // of Program::constants
  std::vector<bool> predicates_;
  int sink_ = -1;
};

}  // namespace ptxsim
