// Runs every instruction set of this processor over every edge case, forward and backward, on one thread and on three.
// Built with AddressSanitizer and UndefinedBehaviorSanitizer, which end it at the first fault; beside them, nothing may
// be left unwritten or turn into NaN, the thread count may not change a bit, and the instruction sets must agree:
// emulated tiles to the bit with the processor's own, where it has them. Built for another processor it runs in an
// emulator: `posattn_cases STEP FILE` takes every STEP-th case and writes the results of the last instruction set, each
// as a line that names it and says how many float32 follow.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "../../csrc/cpu/supported.h"
#include "../../csrc/cpu/threads.h"
#include "cases.h"

namespace posattn::test {
namespace {

// How far two instruction sets may differ, of the largest value: their sums have different orders, and bfloat16's dot
// products round their inputs. A fault in a tail is far above it; accuracy is the Python suite's concern.
float tolerance(DType dtype) {
  return dtype == DType::f32 ? 1e-4F : dtype == DType::f16 ? 1e-2F : 6e-2F;
}

int failures = 0;

std::string name_of(const Case& c) {
  static const char* const dtypes[] = {"float32", "bfloat16", "float16"};
  const Shape& s = c.shape;
  std::string name = c.option + std::string(" ") + dtypes[static_cast<int>(c.dtype)];
  for (int64_t size : {s.batch, s.heads, s.kv_heads, s.q_len, s.k_len, s.head_dim, s.value_dim})
    name += " " + std::to_string(size);
  return name;
}

void fail(const Case& c, const Kernels& kernels, const std::string& what) {
  std::printf("FAILED %s %s: %s\n", kernels.name, name_of(c).c_str(), what.c_str());
  ++failures;
}

void write(std::FILE* file, const Case& c, const std::vector<Result>& results) {
  for (const Result& result : results) {
    std::fprintf(file, "%s %s %zu\n", name_of(c).c_str(), result.name.c_str(), result.values.size());
    std::fwrite(result.values.data(), sizeof(float), result.values.size(), file);
  }
}

std::vector<Result> run(const Case& c, const Kernels& kernels, int threads) {
  Bound bound(c, threads);
  kernels.forward(bound.problem);
  std::vector<Result> results = bound.forward_results();
  if (bound.problem.block_table) return results;  // pages take no gradient
  kernels.backward(bound.problem);
  for (Result& result : bound.backward_results()) results.push_back(std::move(result));
  return results;
}

// Told to end at the first look: nothing may leak, lie in wait for a task that never ran, or be touched out of bounds.
void interrupt(const Case& c, const Kernels& kernels) {
  for (auto pass : {kernels.forward, kernels.backward}) {
    Bound bound(c, 3);
    kernels.forward(bound.problem);
    if (bound.problem.block_table && pass == kernels.backward) return;
    Watch watch;
    watch.poll = [](void*) { return true; };
    const Watching watching(watch);
    watch.next_poll = 0;
    pass(bound.problem);
    if (!watch.stopped && bound.problem.q_len > 0) fail(c, kernels, "an interrupted call did not look");
  }
}

void compare(const Case& c, const Kernels& kernels, const Result& got, const Result& expected) {
  // Where one key has all the weight, these are the rounding of zero times the scale.
  if (std::strcmp(c.option, "far-products") == 0 && (got.name == "dq" || got.name == "dk")) return;
  float scale = 0.0F, worst = 0.0F;
  for (size_t i = 0; i < expected.values.size(); ++i) {
    const float a = got.values[i], b = expected.values[i];
    if (a == b) continue;  // -inf in the log-sum-exp of a row without keys
    scale = std::max(scale, std::abs(b));
    worst = std::max(worst, std::abs(a - b));
  }
  if (!(worst <= tolerance(c.dtype) * (scale + 1.0F)))
    fail(c, kernels, got.name + " differs from the first instruction set's by " + std::to_string(worst));
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The results of the last instruction set.
std::vector<Result> check(const Case& c, const std::vector<const Kernels*>& every) {
  std::vector<Result> first, last;
  bool emulated = false;  // whether `last` comes from emulated tiles
  for (const Kernels* kernels : every) {
    const std::vector<Result> one = run(c, *kernels, 1), three = run(c, *kernels, 3);
    for (size_t n = 0; n < one.size(); ++n) {
      for (float value : one[n].values)
        if (std::isnan(value)) {
          fail(c, *kernels, one[n].name + " holds NaN, or was not written");
          break;
        }
      if (!same_bits(one[n].values, three[n].values))
        fail(c, *kernels, one[n].name + " depends on the number of threads");
      if (!first.empty()) compare(c, *kernels, one[n], first[n]);
      if (emulated && std::strcmp(kernels->name, "amx") == 0 && !same_bits(one[n].values, last[n].values))
        fail(c, *kernels, one[n].name + " has other bits than emulated tiles give");
    }
    if (first.empty()) first = one;
    interrupt(c, *kernels);
    emulated = std::strcmp(kernels->name, "amx_emulated") == 0;
    last = one;
  }
  return last;
}

}  // namespace
}  // namespace posattn::test

int main(int argc, char** argv) {
  using namespace posattn;
  using namespace posattn::test;
  const std::vector<const Kernels*> every = supported();
  const int step = argc > 1 ? std::atoi(argv[1]) : 1;
  std::FILE* file = argc > 2 ? std::fopen(argv[2], "wb") : nullptr;
  if (step < 1 || (argc > 2 && !file)) {
    std::printf("usage: %s [STEP [FILE]]\n", argv[0]);
    return 2;
  }
  int count = 0, seen = 0;
  for (const Shape& shape : shapes())
    for (const char* option : options())
      for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        if (!applies(option, shape) || seen++ % step != 0) continue;
        const Case c{shape, dtype, option};
        const std::vector<Result> results = check(c, every);
        if (file) write(file, c, results);
        ++count;
      }
  if (file && std::fclose(file) != 0) ++failures;
  std::printf("%d cases on", count);
  for (const Kernels* kernels : every) std::printf(" %s", kernels->name);
  std::printf(": %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
