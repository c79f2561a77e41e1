// The structure of a PTX module: directives, variables, scopes of registers, labels, statements.
#include "parser.h"

#include <algorithm>
#include <unordered_map>

#include "lexer.h"
#include "names.h"
#include "opcodes.h"

namespace ptxsim {
namespace {

class Parser {
public:
  Parser(const std::string& ptx, Program& program) : lex_(ptx), program_(program), names_(program) {}

  bool module(const std::string& entry);

private:
  void entry_header();
  void body();
  void statement();
  void registers();
  void variable(Space space);
  void parameter();
  Operand operand(Type type);
  Operand address();
  int scalar(Type type);
  int checked(int reg, const std::string& name) const;
  int statistic(const std::string& full);
  void open_scope();
  void close_scope();

  Lexer lex_;
  Program& program_;
  Names names_;
  // Labels belong to their braces: inlined assembly brings the same ones again and again.
  struct Labels {
    std::unordered_map<std::string, int> places;
    std::vector<std::pair<size_t, std::string>> branches;  // instruction, label
  };
  std::vector<Labels> labels_;
  std::unordered_map<std::string, int> statistics_;
};

bool Parser::module(const std::string& entry) {
  bool found = false;
  while (!lex_.at_end()) {
    const std::string word = lex_.identifier();
    if (word == ".version" || word == ".target" || word == ".address_size" || word == ".file") {
      lex_.skip_line();
    } else if (word == ".visible" || word == ".extern" || word == ".weak" || word == ".common") {
      continue;
    } else if (word == ".section") {
      lex_.skip_braces();
    } else if (word == ".shared") {
      variable(Space::Shared);
    } else if (word == ".global" || word == ".const") {
      variable(Space::Global);
    } else if (word == ".func") {
      // A call is refused where it is met, so the body of a function is never needed.
      if (lex_.find(';') < lex_.find('{')) {
        lex_.skip_past(';');
      } else {
        lex_.skip_braces();
      }
    } else if (word == ".entry") {
      const std::string name = lex_.identifier();
      if (found || !(entry.empty() || entry == name)) {
        lex_.skip_braces();
        continue;
      }
      found = true;
      program_.name = name;
      entry_header();
      body();
    } else {
      lex_.fail("unknown directive '" + word + "'");
    }
  }
  if (found) names_.finish();
  return found;
}

void Parser::parameter() {
  Type type = Type::B8;
  int align = 1;
  uint64_t count = 1;
  Parameter param;
  for (;;) {
    const std::string word = lex_.identifier();
    if (word == ".align") {
      align = std::max(align, static_cast<int>(lex_.number(Type::B32)));
    } else if (word.empty() || word[0] != '.') {
      param.name = word;
      break;
    } else if (const Type named = type_named(word.substr(1)); named != Type::None) {
      type = named;
    }  // .param, .ptr and its state space say nothing that the machine needs
  }
  const bool array = lex_.eat('[');
  if (array) {
    count = lex_.number(Type::B32);
    lex_.expect(']');
  }
  // A scalar lies at its natural alignment; .align of a scalar speaks of the memory that a pointer points to.
  const int natural = array ? std::max(align, size_of(type)) : size_of(type);
  param.size = static_cast<int>(count) * size_of(type);
  param.offset = (program_.param_bytes + natural - 1) / natural * natural;
  program_.param_bytes = param.offset + param.size;
  names_.define(param.name, {Space::Param, kParamWindow + static_cast<uint64_t>(param.offset), false});
  program_.params.push_back(param);
}

void Parser::entry_header() {
  if (lex_.eat('(') && !lex_.eat(')')) {
    do parameter();
    while (lex_.eat(','));
    lex_.expect(')');
  }
  while (lex_.peek() != '{') {
    const std::string word = lex_.identifier();
    if (word == ".reqntid" || word == ".maxntid") {
      program_.max_threads = static_cast<int>(lex_.number(Type::B32));
      while (lex_.eat(',')) program_.max_threads *= static_cast<int>(lex_.number(Type::B32));
    } else if (word == ".minnctapersm" || word == ".maxnreg") {
      lex_.number(Type::B32);
    } else if (word == ".pragma") {
      lex_.skip_past(';');
    } else {
      lex_.fail("directive '" + word + "' of an entry is not modelled");
    }
  }
}

void Parser::open_scope() {
  names_.open_scope();
  labels_.emplace_back();
}

void Parser::close_scope() {
  names_.close_scope();
  const Labels closed = std::move(labels_.back());
  labels_.pop_back();
  for (const auto& [index, label] : closed.branches) {
    const auto found = closed.places.find(label);
    if (found != closed.places.end()) {
      program_.code[index].target = found->second;
    } else if (labels_.empty()) {
      lex_.fail("branch to unknown label " + label);
    } else {
      labels_.back().branches.emplace_back(index, label);
    }
  }
}

void Parser::body() {
  lex_.expect('{');
  open_scope();
  while (!labels_.empty()) {
    if (lex_.at_end()) lex_.fail("the body of " + program_.name + " has no end");
    if (lex_.eat('{')) {
      open_scope();
    } else if (lex_.eat('}')) {
      close_scope();
    } else if (!lex_.eat(';')) {
      statement();
    }
  }
}

void Parser::statement() {
  Instruction in;
  if (lex_.eat('@')) {
    in.guard_negated = lex_.eat('!');
    const std::string name = lex_.identifier();
    in.guard = names_.find(name);
    if (in.guard < 0) lex_.fail("unknown predicate " + name);
  }
  lex_.skip_space();
  in.line = lex_.line();
  const size_t start = lex_.position();
  const std::string full = lex_.opcode();
  if (full.empty()) lex_.fail("expected a statement");
  if (in.guard < 0 && full[0] != '.' && lex_.eat(':')) {
    labels_.back().places[full] = static_cast<int>(program_.code.size());
  } else if (full == ".reg") {
    registers();
  } else if (full == ".shared" || full == ".local" || full == ".global" || full == ".const") {
    variable(full == ".shared" ? Space::Shared : full == ".local" ? Space::Local : Space::Global);
  } else if (full == ".loc") {
    lex_.skip_line();
  } else if (full == ".pragma") {
    lex_.skip_past(';');
  } else {
    const Opcode& opcode = decode_opcode(in, full);
    in.statistic = statistic(full);
    if (in.control == Control::Branch) {
      labels_.back().branches.emplace_back(program_.code.size(), lex_.identifier());
      lex_.expect(';');
    } else if (!lex_.eat(';')) {
      do in.operands.push_back(operand(in.type));
      while (lex_.eat(','));
      lex_.expect(';');
    }
    in.text = lex_.since(start);
    in.index = static_cast<int>(program_.code.size());
    if (in.name == "cp.async" && in.operands.size() > 3) {
      // The fourth operand is a byte count or, if it is a predicate, the order to read nothing.
      in.mode = names_.is_predicate(in.operands[3].reg);
    }
    finish_instruction(opcode, in, program_);
    program_.code.push_back(std::move(in));
  }
}

void Parser::registers() {
  const bool predicate = lex_.identifier() == ".pred";
  do {
    const std::string name = lex_.identifier();
    if (lex_.eat('<')) {
      const uint64_t count = lex_.number(Type::B32);
      lex_.expect('>');
      for (uint64_t i = 0; i < count; ++i) names_.declare(name + std::to_string(i), predicate);
    } else {
      names_.declare(name, predicate);
    }
  } while (lex_.eat(','));
  lex_.expect(';');
}

void Parser::variable(Space space) {
  Type type = Type::B8;
  int align = 1;
  uint64_t count = 1;
  bool without_size = false;
  std::string name;
  for (;;) {
    name = lex_.identifier();
    if (name.empty() || name[0] != '.') break;
    if (name == ".align") {
      align = static_cast<int>(lex_.number(Type::B32));
    } else if (const Type named = type_named(name.substr(1)); named != Type::None) {
      type = named;
    }
  }
  while (lex_.eat('[')) {
    if (lex_.eat(']')) {
      without_size = true;
      continue;
    }
    count *= lex_.number(Type::B32);
    lex_.expect(']');
  }
  std::vector<uint64_t> initial;
  if (lex_.eat('=')) {
    const bool braces = lex_.eat('{');
    do initial.push_back(lex_.number(type));
    while (lex_.eat(','));
    if (braces) lex_.expect('}');
  }
  lex_.expect(';');
  align = std::max(align, size_of(type));
  const int bytes = static_cast<int>(count) * size_of(type);
  const auto aligned = [align](int offset) { return (offset + align - 1) / align * align; };
  if (space == Space::Shared && without_size) {
    names_.define(name, {space, 0, true});
  } else if (space == Space::Shared) {
    const int offset = aligned(program_.static_shared);
    names_.define(name, {space, static_cast<uint64_t>(offset), false});
    program_.static_shared = offset + bytes;
  } else if (space == Space::Local) {
    const int offset = aligned(program_.local_bytes);
    names_.define(name, {space, kLocalWindow + static_cast<uint64_t>(offset), false});
    program_.local_bytes = offset + bytes;
  } else {
    auto memory = std::make_unique<std::vector<uint8_t>>(std::max(bytes, 16));
    for (size_t i = 0; i < initial.size(); ++i) {
      std::memcpy(memory->data() + i * static_cast<size_t>(size_of(type)), &initial[i],
                  static_cast<size_t>(size_of(type)));
    }
    names_.define(name, {space, reinterpret_cast<uint64_t>(memory->data()), false});
    program_.module_memory.push_back(std::move(memory));
  }
}

int Parser::checked(int reg, const std::string& name) const {
  if (reg < 0) lex_.fail("unknown name '" + name + "'");
  return reg;
}

int Parser::scalar(Type type) {
  const char next = lex_.peek();
  if (std::isdigit(static_cast<unsigned char>(next)) || next == '-' || next == '+')
    return names_.constant(lex_.number(type));
  if (lex_.sink()) return names_.sink();
  const std::string name = lex_.identifier();
  if (name.empty()) lex_.fail("expected an operand");
  const int reg = names_.find(name);
  if (reg >= 0) return reg;
  if (name[0] == '%') return checked(names_.special(name.substr(1)), name);
  const int64_t offset = lex_.eat('+') ? static_cast<int64_t>(lex_.number(Type::B64)) : 0;
  return checked(names_.symbol(name, offset), name);
}

Operand Parser::address() {
  Operand op;
  op.kind = Operand::Kind::Address;
  if (std::isdigit(static_cast<unsigned char>(lex_.peek()))) {
    op.reg = names_.constant(lex_.number(Type::B64));
  } else {
    const std::string name = lex_.identifier();
    const int reg = names_.find(name);
    op.reg = reg >= 0 ? reg : checked(names_.symbol(name, 0), name);
  }
  while (lex_.peek() == '+' || lex_.peek() == '-') {
    lex_.eat('+');  // number() takes a minus itself, also after the plus
    op.offset += static_cast<int64_t>(lex_.number(Type::B64));
  }
  if (lex_.eat(',')) {
    lex_.expect('{');
    do op.elements.push_back(scalar(Type::S32));
    while (lex_.eat(','));
    lex_.expect('}');
  }
  lex_.expect(']');
  return op;
}

Operand Parser::operand(Type type) {
  Operand op;
  op.negated = lex_.eat('!');
  if (lex_.eat('[')) return address();
  if (lex_.eat('{')) {
    op.kind = Operand::Kind::Vector;
    do op.elements.push_back(scalar(type));
    while (lex_.eat(','));
    lex_.expect('}');
    return op;
  }
  op.kind = Operand::Kind::Register;
  op.reg = scalar(type);
  if (lex_.eat('|')) op.second = scalar(Type::Pred);
  return op;
}

int Parser::statistic(const std::string& full) {
  const auto [slot, added] = statistics_.try_emplace(full, static_cast<int>(program_.statistic_names.size()));
  if (added) program_.statistic_names.push_back(full);
  return slot->second;
}

}  // namespace

Program parse(const std::string& ptx, const std::string& entry) {
  Program program;
  if (!Parser(ptx, program).module(entry)) {
    throw Unsupported(entry.empty() ? "the PTX has no entry" : "the PTX has no entry named " + entry);
  }
  return program;
}

}  // namespace ptxsim
