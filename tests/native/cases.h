// The edge shapes and the options that the sanitizers see, and the problem that each combination makes.
#pragma once

#include <string>
#include <vector>

#include "memory.h"

namespace posattn::test {

// Lengths on both sides of every tile size, head dimensions that fill no vector, and shared key heads.
struct Shape {
  int64_t batch, heads, kv_heads, q_len, k_len, head_dim, value_dim;
};

struct Case {
  Shape shape;
  DType dtype;
  const char* option;  // one of options()
};

// One array of results, to look for what was never written and to compare instruction sets.
struct Result {
  std::string name;
  std::vector<float> values;
};

std::vector<Shape> shapes();
std::vector<const char*> options();

// True if the option makes sense for the shape.
bool applies(const char* option, const Shape& shape);

// A problem with all gradients wanted, and the memory that it points at.
struct Bound {
  Bound(const Case& c, int threads);
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;

  std::vector<Result> forward_results() const;
  std::vector<Result> backward_results() const;

  Problem problem;

private:
  void add_option(const std::string& option);
  void add_bias(Bias& bias, const std::string& kind);
  void add_mix(MixForm form, bool inner);
  void add_rotary(int64_t half, bool interleaved);
  void add_positions();
  void add_results(const Shape& s, DType dtype);
  void want(const char* name, float** gradient, int64_t count);

  struct Wanted {
    const char* name;
    const float* data;
    int64_t count;
  };

  Memory memory_;
  std::vector<Sequence> sequences_;
  std::vector<Wanted> wanted_;
  bool covered_ = true;  // every key is in some sequence, so that every row of grad_k and grad_v is written
};

}  // namespace posattn::test
