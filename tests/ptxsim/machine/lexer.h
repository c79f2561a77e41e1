// The characters of PTX: white space, comments, identifiers and numbers.
#pragma once

#include <string>

#include "program.h"

namespace ptxsim {

class Lexer {
public:
  explicit Lexer(std::string text) : text_(std::move(text)) {}

  [[noreturn]] void fail(const std::string& message) const;
  void skip_space();
  bool at_end();
  char peek();  // the next character that is not white space, 0 at the end
  bool eat(char wanted);
  void expect(char wanted);
  std::string identifier();  // empty if the next character starts none
  std::string opcode();      // like identifier, with '::' inside
  uint64_t number(Type type);
  void skip_past(char wanted);
  void skip_line();
  void skip_braces();  // from before '{' to after its '}'
  bool sink();         // eats '_' when it stands alone
  std::string since(size_t start) const;
  size_t position() const { return at_; }
  int line() const { return line_; }
  size_t find(char wanted) const { return text_.find(wanted, at_); }

private:
  char at(size_t i) const { return i < text_.size() ? text_[i] : '\0'; }
  void advance();
  bool is_word(char c) const;

  std::string text_;
  size_t at_ = 0;
  int line_ = 1;
};

}  // namespace ptxsim
