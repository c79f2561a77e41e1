// The Python module posattn._cpu: takes a Problem as bytes, lists its sequences, picks the instruction set, and runs
// with the GIL released. PROBLEM_H is the text of problem.h that this build holds, from which Python knows the layout,
// and BLANK a Problem's bytes before anything is filled in. It knows no tensor type; posattn/backends/cpu.py does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__APPLE__)
#  include <pthread.h>
#elif defined(__linux__)
#  include <sys/syscall.h>
#  include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "memory.h"
#include "problem_text.h"
#include "supported.h"
#include "threads.h"

namespace py = pybind11;

namespace posattn {
namespace {

const Kernels* find(const std::string& name) {
  std::string known;
  for (const Kernels* k : supported()) {
    if (name == k->name) return k;
    known += (known.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument("instruction set: expected one of " + known + ", got " + name);
}

const Kernels*& chosen() {
  static const Kernels* kernels = [] {
    const char* wanted = std::getenv("POSATTN_ISA");
    return wanted && *wanted ? find(wanted) : supported().back();
  }();
  return kernels;
}

// The last line of defence against reads out of bounds: a traced call's values were not there to be checked.
void check_offsets(const char* name, const int32_t* offsets, int64_t documents, int64_t tokens) {
  bool valid = offsets[0] == 0 && offsets[documents] == tokens;
  for (int64_t n = 0; valid && n < documents; ++n) valid = offsets[n] <= offsets[n + 1];
  if (!valid)
    throw std::invalid_argument(std::string(name) + ": expected offsets rising from 0 to the " +
                                std::to_string(tokens) + " tokens");
}

void check_bound(const char* name, const char* of, int64_t n, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(least) + " to " +
                                std::to_string(most) + ", got " + std::to_string(value) + " for " + of + " " +
                                std::to_string(n));
}

// Sequence n's offset as it was given, and no keys that no query sees by it: a cache may have many slots to fill yet.
void place(const Problem& p, int64_t n, int64_t skipped, Sequence& s) {
  const Lengths& given = p.lengths;
  s.offset = s.k_len - s.q_len;
  if (!given.has_offset && !given.offsets) return;
  if (given.offsets) check_bound("offset", "sequence", n, given.offsets[n], -p.q_len, p.k_len);
  s.offset = (given.offsets ? given.offsets[n] : given.offset) - skipped;
  const bool limited = p.causal || p.right >= 0;
  if (limited) s.k_len = std::clamp(s.offset + s.q_len + (p.causal ? 0 : p.right), int64_t{0}, s.k_len);
}

struct Run {
  int64_t start, length;
};

// The runs of equal numbers in a row of `tokens`, by number.
std::unordered_map<int32_t, Run> runs(const char* name, const int32_t* row, int64_t tokens) {
  std::unordered_map<int32_t, Run> found;
  for (int64_t t = 0; t < tokens;) {
    int64_t end = t + 1;
    while (end < tokens && row[end] == row[t]) ++end;
    if (row[t] >= 0 && !found.insert({row[t], {t, end - t}}).second)
      throw std::invalid_argument(std::string(name) + ": expected each document in one run of a row, got two of " +
                                  std::to_string(row[t]));
    t = end;
  }
  return found;
}

// The documents of one row; queries that belong to none are one without keys.
void add_segments(const Problem& p, int64_t b, std::vector<Sequence>& list) {
  const int32_t *q = p.lengths.q_segments + b * p.q_len, *k = p.lengths.k_segments + b * p.k_len;
  runs("segments", q, p.q_len);
  const auto keys = runs("segments", k, p.k_len);
  for (int64_t i = 0; i < p.q_len;) {
    int64_t end = i + 1;
    while (end < p.q_len && q[end] == q[i]) ++end;
    const auto own = keys.find(q[i]);
    const Run of = q[i] < 0 || own == keys.end() ? Run{0, 0} : own->second;
    list.push_back({b, i, end - i, of.start, of.length, of.length - (end - i)});
    i = end;
  }
}

std::vector<Sequence> sequences(const Problem& p) {
  std::vector<Sequence> list;
  const auto& [ends, starts, q, k, documents, q_segments, k_segments, offsets, has_offset, offset] = p.lengths;
  if (q_segments) {
    for (int64_t b = 0; b < p.batch; ++b) add_segments(p, b, list);
    return list;
  }
  if (q) {
    check_offsets("cu_seqlens_q", q, documents, p.q_len);
    check_offsets("cu_seqlens_k", k, documents, p.k_len);
    for (int64_t n = 0; n < documents; ++n) {
      list.push_back({0, q[n], q[n + 1] - q[n], k[n], k[n + 1] - k[n], 0});
      place(p, n, 0, list.back());
    }
    return list;
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t end = ends ? ends[b] : p.k_len, start = starts ? starts[b] : 0;
    check_bound("k_lengths", "batch entry", b, end, 0, p.k_len);
    check_bound("k_starts", "batch entry", b, start, 0, end);
    list.push_back({b, 0, p.q_len, start, end - start, 0});
    place(p, b, start, list.back());
  }
  return list;
}

// The pages that sequences read are there, and there is one for every key.
void check_pages(const Problem& p, const std::vector<Sequence>& list) {
  if (!p.block_table) return;
  if (p.page < 1) throw std::invalid_argument("k: expected pages of at least one token");
  for (const Sequence& s : list) {
    if (s.k_len == 0) continue;
    check_bound("k_lengths", "batch entry", s.b, s.k0 + s.k_len, 0, p.block_entries * p.page);
    for (int64_t n = s.k0 / p.page; n <= (s.k0 + s.k_len - 1) / p.page; ++n)
      check_bound("block_table", "batch entry", s.b, p.block_table[s.b * p.block_entries + n], 0, p.pages - 1);
  }
}

// Python packs a Problem as bytes, so it is nothing more than its bytes.
static_assert(std::is_trivially_copyable_v<Problem> && std::is_standard_layout_v<Problem>);

// The one thread that runs Python's signal handlers. Others must not ask for the GIL inside a parallel region: at the
// interpreter's end they would not come back.
bool on_main_thread() {
#if defined(__APPLE__)
  return pthread_main_np() != 0;
#elif defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#else
  return false;
#endif
}

// Releases the GIL for a call, which ends early when the handler of a signal raises: KeyboardInterrupt on Ctrl-C.
class Interruptible {
public:
  Interruptible() : state_(PyEval_SaveThread()) {
    watch_.poll = [](void* context) {
      if (!on_main_thread()) return false;
      PyEval_RestoreThread(static_cast<PyThreadState*>(context));
      const bool raised = PyErr_CheckSignals() != 0;  // what it raised waits in the thread's state
      PyEval_SaveThread();
      return raised;
    };
    watch_.context = state_;
    watching_.emplace(watch_);
  }
  ~Interruptible() { take_back(); }
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

  void finish() {
    take_back();
    if (watch_.stopped) throw py::error_already_set();
  }

private:
  void take_back() {
    watching_.reset();
    if (state_) PyEval_RestoreThread(state_);
    state_ = nullptr;
  }

  PyThreadState* state_;
  Watch watch_;
  std::optional<Watching> watching_;
};

// The bytes of a struct of problem.h.
template <class T>
T unpacked(const char* name, const py::buffer& packed) {
  Py_buffer image;
  if (PyObject_GetBuffer(packed.ptr(), &image, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  const auto size = static_cast<size_t>(image.len);
  T value;
  if (size == sizeof(value)) std::memcpy(&value, image.buf, sizeof(value));
  PyBuffer_Release(&image);
  if (size != sizeof(value))
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(sizeof(value)) + " bytes, got " +
                                std::to_string(size));
  return value;
}

// Runs the forward or the backward pass of the Problem that these bytes hold.
template <void (*Kernels::*pass)(const Problem&)>
void run(const py::buffer& packed) {
  auto p = unpacked<Problem>("problem", packed);
  Interruptible call;
  const std::vector<Sequence> list = sequences(p);
  check_pages(p, list);
  p.sequences = list.data();
  p.n_sequences = static_cast<int64_t>(list.size());
  p.max_k_len = 0;
  for (const Sequence& s : list) p.max_k_len = s.k_len > p.max_k_len ? s.k_len : p.max_k_len;
  (chosen()->*pass)(p);
  call.finish();
}

void run_append(const py::buffer& packed) {
  const auto tokens = unpacked<Append>("tokens", packed);
  const py::gil_scoped_release released;
  chosen()->append(tokens);
}

py::bytes blank() {
  const Problem p;
  return {reinterpret_cast<const char*>(&p), sizeof(p)};
}

template <class Run>
double timed(Run run) {
  auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Billions of operations (kinds "fma", "bf16dot") or bytes ("read") per second on that many threads; 0 where the
// instruction set lacks the instruction.
double probe_peak(const std::string& kind, int threads) {
  const Kernels* k = chosen();
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
  if (kind == "read") {
    const int64_t each = (int64_t{256} << 20) / 4 / threads;
    std::vector<std::vector<float>> data(static_cast<size_t>(threads));
    struct Shared {
      const Kernels* k;
      std::vector<std::vector<float>>* data;
      int64_t each;
    } shared{k, &data, each};
    auto touch = [](void* c, int t) {
      auto& s = *static_cast<Shared*>(c);
      (*s.data)[static_cast<size_t>(t)].assign(static_cast<size_t>(s.each), 1.0F);
    };
    auto read = [](void* c, int t) {
      auto& s = *static_cast<Shared*>(c);
      s.k->probe_read((*s.data)[static_cast<size_t>(t)].data(), s.each);
    };
    parallel(threads, touch, &shared);
    double best = 0.0;
    for (int trial = 0; trial < 5; ++trial) {
      double seconds = timed([&] { parallel(threads, read, &shared); });
      double rate = static_cast<double>(each) * 4.0 * threads / seconds * 1e-9;
      best = rate > best ? rate : best;
    }
    return best;
  }
  if (kind != "fma" && kind != "bf16dot")
    throw std::invalid_argument("kind: expected 'fma', 'bf16dot' or 'read', got '" + kind + "'");
  struct Shared {
    const Kernels* k;
    const char* kind;
    int64_t iterations;
  } shared{k, kind.c_str(), 2000000};
  double operations = k->probe_flops(kind.c_str(), 1);
  if (operations == 0.0) return 0.0;
  auto body = [](void* c, int) {
    auto& s = *static_cast<Shared*>(c);
    s.k->probe_flops(s.kind, s.iterations);
  };
  double best = 0.0;
  for (int trial = 0; trial < 5; ++trial) {
    double seconds = timed([&] { parallel(threads, body, &shared); });
    double rate = operations * static_cast<double>(shared.iterations) * threads / seconds * 1e-9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace
}  // namespace posattn

PYBIND11_MODULE(_cpu, m) {
  using namespace posattn;
  m.doc() = "posattn's CPU kernels on raw addresses; posattn.backends.cpu is the way to call them.";

  m.attr("PROBLEM_H") = PROBLEM_H;
  m.attr("BLANK") = blank();
  m.def("forward", &run<&Kernels::forward>, py::arg("problem"), "Run the struct Problem that these bytes hold.");
  m.def("backward", &run<&Kernels::backward>, py::arg("problem"), "Its gradients, after the forward pass.");
  m.def("append", &run_append, py::arg("tokens"), "Run the struct Append that these bytes hold.");
  m.def("probe_peak", &probe_peak, py::arg("kind"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "GFLOP/s of a loop of 'fma' or 'bf16dot', or GB/s of 'read', on that many threads.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Kernels* k : supported()) names.emplace_back(k->name);
        return names;
      },
      "Instruction sets of this build that this processor runs, fastest last.");
  m.def("isa", [] { return std::string(chosen()->name); }, "The instruction set in use.");
  m.def("bf16_dot", [] { return chosen()->bf16_dot; });
  m.def("set_isa", [](const std::string& name) { chosen() = find(name); }, "Use this instruction set from now on.");
  m.def(
      "prefer_huge_pages",
      [](uintptr_t address, size_t bytes) { prefer_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"), "Advise the system to back this memory with 2 MB pages.");
  m.def("runtime", &parallel_runtime, "The threading runtime in use.");
}
