// The Python module posattn._cpu: fills a Problem from addresses and strides, picks the instruction set, and runs with
// the GIL released. It knows no tensor type; posattn/backends/cpu.py does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "problem.h"
#include "threads.h"

namespace py = pybind11;

#define POSATTN_DECLARE(isa)    \
  namespace posattn::isa {      \
  extern const Kernels kernels; \
  }
#if defined(POSATTN_HAVE_baseline)
POSATTN_DECLARE(baseline)
#endif
#if defined(POSATTN_HAVE_neon)
POSATTN_DECLARE(neon)
#endif
#if defined(POSATTN_HAVE_avx2)
POSATTN_DECLARE(avx2)
#endif
#if defined(POSATTN_HAVE_avx512)
POSATTN_DECLARE(avx512)
#endif
#if defined(POSATTN_HAVE_avx512bf16)
POSATTN_DECLARE(avx512bf16)
#endif

namespace posattn {
namespace {

// What this build holds and this processor runs, fastest last.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(POSATTN_HAVE_baseline)
  found.push_back(&baseline::kernels);
#endif
#if defined(POSATTN_HAVE_neon)
  found.push_back(&neon::kernels);
#endif
#if defined(POSATTN_HAVE_avx2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    found.push_back(&avx2::kernels);
#endif
#if defined(POSATTN_HAVE_avx512) || defined(POSATTN_HAVE_avx512bf16)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
#if defined(POSATTN_HAVE_avx512)
  if (avx512) found.push_back(&avx512::kernels);
#endif
#if defined(POSATTN_HAVE_avx512bf16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::kernels);
#endif
  return found;
}

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

// A Problem that owns its list of sequences.
struct OwnedProblem : Problem {
  std::vector<Sequence> list;

  void finish() {
    sequences = list.data();
    n_sequences = static_cast<int64_t>(list.size());
    max_k_len = 0;
    for (const Sequence& s : list) max_k_len = s.k_len > max_k_len ? s.k_len : max_k_len;
  }
  // The last line of defence against reads out of bounds: a traced call's values were not there to be checked.
  static void check_offsets(const char* name, const int32_t* offsets, int64_t documents, int64_t tokens) {
    bool valid = offsets[0] == 0 && offsets[documents] == tokens;
    for (int64_t n = 0; valid && n < documents; ++n) valid = offsets[n] <= offsets[n + 1];
    if (!valid)
      throw std::invalid_argument(std::string(name) + ": expected offsets rising from 0 to the " +
                                  std::to_string(tokens) + " tokens");
  }
  // One sequence a batch entry; with lengths ([B] int32), as many keys as they say.
  void set_batched(uintptr_t lengths) {
    const auto* n = reinterpret_cast<const int32_t*>(lengths);
    list.clear();
    for (int64_t b = 0; b < batch; ++b) {
      list.push_back({b, 0, q_len, 0, n ? n[b] : k_len});
      if (list.back().k_len < 0 || list.back().k_len > k_len)
        throw std::invalid_argument("k_lengths: expected 0 to " + std::to_string(k_len) + " keys, got " +
                                    std::to_string(list.back().k_len) + " for batch entry " + std::to_string(b));
    }
    finish();
  }
  // Documents packed along the tokens of batch entry 0.
  void set_packed(uintptr_t cu_q, uintptr_t cu_k, int64_t documents) {
    const auto *q = reinterpret_cast<const int32_t*>(cu_q), *k = reinterpret_cast<const int32_t*>(cu_k);
    list.clear();
    check_offsets("cu_seqlens_q", q, documents, q_len);
    check_offsets("cu_seqlens_k", k, documents, k_len);
    for (int64_t n = 0; n < documents; ++n) list.push_back({0, q[n], q[n + 1] - q[n], k[n], k[n + 1] - k[n]});
    finish();
  }
};

View view(uintptr_t data, int64_t batch, int64_t head, int64_t row, int dtype) {
  View v;
  v.data = reinterpret_cast<void*>(data);
  v.batch = batch, v.head = head, v.row = row, v.dtype = static_cast<DType>(dtype);
  return v;
}

// A pointer member, seen from Python as an address.
template <class Owner, class Base, class T>
void address(py::class_<Owner>& cls, const char* name, T* Base::* member) {
  cls.def_property(
      name, [member](const Owner& o) { return reinterpret_cast<uintptr_t>(o.*member); },
      [member](Owner& o, uintptr_t value) { o.*member = reinterpret_cast<T*>(value); });
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

  py::class_<View>(m, "View").def(py::init(&view), py::arg("data"), py::arg("batch"), py::arg("head"), py::arg("row"),
                                  py::arg("dtype"));

  py::class_<Rotary> rotary(m, "Rotary");
  address(rotary, "q_cos", &Rotary::q_cos);
  address(rotary, "q_sin", &Rotary::q_sin);
  address(rotary, "k_cos", &Rotary::k_cos);
  address(rotary, "k_sin", &Rotary::k_sin);
  rotary.def_readwrite("q_batch", &Rotary::q_batch)
      .def_readwrite("k_batch", &Rotary::k_batch)
      .def_readwrite("half", &Rotary::half)
      .def_readwrite("interleaved", &Rotary::interleaved);

  py::class_<Bias> bias(m, "Bias");
  address(bias, "slope", &Bias::slope);
  address(bias, "grad_slope", &Bias::grad_slope);
  address(bias, "table", &Bias::table);
  address(bias, "grad_table", &Bias::grad_table);
  address(bias, "psi", &Bias::psi);
  address(bias, "row_scale", &Bias::row_scale);
  address(bias, "knots", &Bias::knots);
  address(bias, "segment_slope", &Bias::segment_slope);
  address(bias, "segment_intercept", &Bias::segment_intercept);
  address(bias, "grad_psi", &Bias::grad_psi);
  address(bias, "grad_row_scale", &Bias::grad_row_scale);
  address(bias, "grad_segment_slope", &Bias::grad_segment_slope);
  address(bias, "grad_segment_intercept", &Bias::grad_segment_intercept);
  address(bias, "grad_dense", &Bias::grad_dense);
  bias.def_readwrite("slope_batch", &Bias::slope_batch)
      .def_readwrite("slope_head", &Bias::slope_head)
      .def_readwrite("slope_signed", &Bias::slope_signed)
      .def_readwrite("table_len", &Bias::table_len)
      .def_readwrite("table_first", &Bias::table_first)
      .def_readwrite("psi_len", &Bias::psi_len)
      .def_readwrite("psi_first", &Bias::psi_first)
      .def_readwrite("row_len", &Bias::row_len)
      .def_readwrite("row_first", &Bias::row_first)
      .def_readwrite("n_knots", &Bias::n_knots)
      .def_readwrite("dense", &Bias::dense)
      .def_readwrite("dense_key", &Bias::dense_key)
      .def_readwrite("grad_dense_batch", &Bias::grad_dense_batch)
      .def_readwrite("grad_dense_head", &Bias::grad_dense_head)
      .def_readwrite("grad_dense_row", &Bias::grad_dense_row)
      .def_readwrite("grad_dense_key", &Bias::grad_dense_key);

  py::class_<HeadMix> mix(m, "HeadMix");
  address(mix, "w1", &HeadMix::w1);
  address(mix, "b1", &HeadMix::b1);
  address(mix, "w2", &HeadMix::w2);
  address(mix, "b2", &HeadMix::b2);
  address(mix, "grad_w1", &HeadMix::grad_w1);
  address(mix, "grad_b1", &HeadMix::grad_b1);
  address(mix, "grad_w2", &HeadMix::grad_w2);
  address(mix, "grad_b2", &HeadMix::grad_b2);
  mix.def_readwrite("width", &HeadMix::width)
      .def_readwrite("inputs", &HeadMix::inputs)
      .def_readwrite("has_inner", &HeadMix::has_inner)
      .def_property_readonly(
          "inner", [](HeadMix& h) -> Bias& { return h.inner; }, py::return_value_policy::reference_internal)
      .def_property(
          "form", [](const HeadMix& h) { return static_cast<int>(h.form); },
          [](HeadMix& h, int form) { h.form = static_cast<MixForm>(form); });

  py::class_<OwnedProblem> problem(m, "Problem");
  problem.def(py::init<>())
      .def("set_batched", &OwnedProblem::set_batched, py::arg("lengths") = 0)
      .def("set_packed", &OwnedProblem::set_packed)
      .def_property_readonly(
          "rotary", [](OwnedProblem& p) -> Rotary& { return p.rotary; }, py::return_value_policy::reference_internal)
      .def_property_readonly(
          "bias", [](OwnedProblem& p) -> Bias& { return p.bias; }, py::return_value_policy::reference_internal)
      .def_property_readonly(
          "head_mix", [](OwnedProblem& p) -> HeadMix& { return p.head_mix; },
          py::return_value_policy::reference_internal);
  problem.def_readwrite("batch", &OwnedProblem::batch)
      .def_readwrite("heads", &OwnedProblem::heads)
      .def_readwrite("kv_heads", &OwnedProblem::kv_heads)
      .def_readwrite("q_len", &OwnedProblem::q_len)
      .def_readwrite("k_len", &OwnedProblem::k_len)
      .def_readwrite("head_dim", &OwnedProblem::head_dim)
      .def_readwrite("value_dim", &OwnedProblem::value_dim)
      .def_readwrite("scale", &OwnedProblem::scale)
      .def_readwrite("softcap", &OwnedProblem::softcap)
      .def_readwrite("q", &OwnedProblem::q)
      .def_readwrite("k", &OwnedProblem::k)
      .def_readwrite("v", &OwnedProblem::v)
      .def_readwrite("out", &OwnedProblem::out)
      .def_readwrite("causal", &OwnedProblem::causal)
      .def_readwrite("top_left", &OwnedProblem::top_left)
      .def_readwrite("left", &OwnedProblem::left)
      .def_readwrite("right", &OwnedProblem::right)
      .def_readwrite("boolean", &OwnedProblem::boolean)
      .def_readwrite("boolean_key", &OwnedProblem::boolean_key)
      .def_readwrite("q_positions_batch", &OwnedProblem::q_positions_batch)
      .def_readwrite("k_positions_batch", &OwnedProblem::k_positions_batch)
      .def_readwrite("mix", &OwnedProblem::mix)
      .def_readwrite("dropout_p", &OwnedProblem::dropout_p)
      .def_readwrite("seed", &OwnedProblem::seed)
      .def_readwrite("grad_out", &OwnedProblem::grad_out)
      .def_readwrite("grad_q", &OwnedProblem::grad_q)
      .def_readwrite("grad_k", &OwnedProblem::grad_k)
      .def_readwrite("grad_v", &OwnedProblem::grad_v)
      .def_readwrite("threads", &OwnedProblem::threads);
  address(problem, "lse", &Problem::lse);
  address(problem, "sinks", &Problem::sinks);
  address(problem, "q_positions", &Problem::q_positions);
  address(problem, "k_positions", &Problem::k_positions);
  address(problem, "grad_lse", &Problem::grad_lse);
  address(problem, "grad_q_sum", &Problem::grad_q_sum);
  address(problem, "delta", &Problem::delta);

  m.def("forward", [](const OwnedProblem& p) { chosen()->forward(p); }, py::call_guard<py::gil_scoped_release>());
  m.def("backward", [](const OwnedProblem& p) { chosen()->backward(p); }, py::call_guard<py::gil_scoped_release>());
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
