// The characters of PTX: white space, comments, identifiers and numbers.
#include "lexer.h"

#include <cctype>
#include <cstdlib>

namespace ptxsim {

void Lexer::fail(const std::string& message) const {
  throw Unsupported("PTX line " + std::to_string(line_) + ": " + message);
}

void Lexer::advance() {
  if (text_[at_] == '\n') ++line_;
  ++at_;
}

bool Lexer::is_word(char c) const {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

void Lexer::skip_space() {
  while (at_ < text_.size()) {
    if (std::isspace(static_cast<unsigned char>(text_[at_]))) {
      advance();
    } else if (text_.compare(at_, 2, "//") == 0) {
      skip_line();
    } else if (text_.compare(at_, 2, "/*") == 0) {
      const size_t end = text_.find("*/", at_);
      if (end == std::string::npos) fail("comment without an end");
      while (at_ < end + 2) advance();
    } else {
      return;
    }
  }
}

bool Lexer::at_end() {
  skip_space();
  return at_ >= text_.size();
}

char Lexer::peek() {
  skip_space();
  return at(at_);
}

bool Lexer::eat(char wanted) {
  if (peek() != wanted) return false;
  ++at_;
  return true;
}

void Lexer::expect(char wanted) {
  if (!eat(wanted)) fail(std::string("expected '") + wanted + "' near '" + text_.substr(at_, 40) + "'");
}

std::string Lexer::identifier() {
  skip_space();
  const size_t start = at_;
  while (is_word(at(at_))) ++at_;
  return text_.substr(start, at_ - start);
}

std::string Lexer::opcode() {
  skip_space();
  const size_t start = at_;
  while (is_word(at(at_)) || (at(at_) == ':' && at(at_ + 1) == ':')) at_ += at(at_) == ':' ? 2 : 1;
  return text_.substr(start, at_ - start);
}

bool Lexer::sink() {
  if (peek() != '_' || is_word(at(at_ + 1))) return false;
  ++at_;
  return true;
}

uint64_t Lexer::number(Type type) {
  skip_space();
  const bool negative = at(at_) == '-';
  if (negative || at(at_) == '+') ++at_;
  const auto of_float = [&](float value) -> uint64_t {
    if (type == Type::F64) return bits_of(static_cast<double>(value));
    if (type == Type::F16) return Half::from_float(value);
    if (type == Type::BF16) return Bfloat::from_float(value);
    return raw_bits(value);
  };
  const char kind = static_cast<char>(std::tolower(at(at_ + 1)));
  if (at(at_) == '0' && kind == 'f' && std::isxdigit(at(at_ + 2))) {  // 0f3F800000
    const auto bits = static_cast<uint32_t>(std::strtoul(text_.substr(at_ + 2, 8).c_str(), nullptr, 16));
    at_ += 10;
    return of_float(bits_as<float>(negative ? bits ^ 0x80000000u : bits));
  }
  if (at(at_) == '0' && kind == 'd' && std::isxdigit(at(at_ + 2))) {  // 0d3FF0000000000000
    const uint64_t bits = std::strtoull(text_.substr(at_ + 2, 16).c_str(), nullptr, 16);
    at_ += 18;
    return negative ? bits ^ (uint64_t{1} << 63) : bits;
  }
  const size_t start = at_;
  bool real = false;
  if (at(at_) == '0' && kind == 'x') {
    at_ += 2;
    while (std::isxdigit(at(at_))) ++at_;
  } else {
    while (std::isdigit(at(at_)) || at(at_) == '.') real |= at(at_++) == '.';
    if (std::tolower(at(at_)) == 'e') {
      real = true;
      at_ += at(at_ + 1) == '-' || at(at_ + 1) == '+' ? 2 : 1;
      while (std::isdigit(at(at_))) ++at_;
    }
  }
  if (at_ == start) fail("expected a number near '" + text_.substr(at_, 40) + "'");
  const std::string digits = text_.substr(start, at_ - start);
  if (std::toupper(at(at_)) == 'U') ++at_;
  if (real) {
    const double value = std::strtod(digits.c_str(), nullptr) * (negative ? -1 : 1);
    return type == Type::F64 ? bits_of(value) : of_float(static_cast<float>(value));
  }
  const uint64_t value = std::strtoull(digits.c_str(), nullptr, 0);
  return negative ? ~value + 1 : value;
}

void Lexer::skip_past(char wanted) {
  while (at_ < text_.size() && text_[at_] != wanted) advance();
  if (at_ < text_.size()) advance();
}

void Lexer::skip_line() {
  while (at_ < text_.size() && text_[at_] != '\n') ++at_;
}

void Lexer::skip_braces() {
  skip_past('{');
  for (int depth = 1; depth && at_ < text_.size(); advance()) {
    if (text_[at_] == '{') ++depth;
    if (text_[at_] == '}') --depth;
  }
}

std::string Lexer::since(size_t start) const {
  std::string text = text_.substr(start, at_ - start);
  for (char& c : text) {
    if (c == '\n' || c == '\t') c = ' ';
  }
  return text;
}

}  // namespace ptxsim
