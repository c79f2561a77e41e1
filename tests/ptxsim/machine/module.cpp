// The Python module: Program(ptx, entry) and its launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "launch.h"
#include "loops.h"
#include "parser.h"

namespace py = pybind11;
using namespace ptxsim;

namespace {

Options options_from(const py::dict& given) {
  Options options;
  for (const auto& [key, value] : given) {
    const auto name = key.cast<std::string>();
    if (name == "race")
      options.race = value.cast<bool>();
    else if (name == "global_race")
      options.global_race = value.cast<bool>();
    else if (name == "late")
      options.late = value.cast<bool>();
    else if (name == "poison")
      options.poison = value.cast<bool>();
    else if (name == "stats")
      options.stats = value.cast<bool>();
    else if (name == "perturb")
      options.perturb = value.cast<bool>();
    else if (name == "reverse")
      options.reverse = value.cast<bool>();
    else if (name == "tensor_strict")
      options.tensor_strict = value.cast<bool>();
    else if (name == "tensor_core")
      options.tensor_core = value.cast<int>();
    else if (name == "limit")
      options.limit = value.cast<uint64_t>();
    else if (name == "seed")
      options.seed = value.cast<uint64_t>();
    else
      throw py::value_error("unknown option " + name);
  }
  return options;
}

py::dict to_dict(const Program& program, const Report& report, const Options& options) {
  py::dict findings, first, opcodes, counters;
  for (int i = 0; i < kFindings; ++i) {
    const Report::Seen& seen = report.findings[static_cast<size_t>(i)];
    if (!seen.count) continue;
    const char* name = name_of(static_cast<Finding>(i));
    findings[name] = seen.count;
    first[name] = seen.first;
  }
  for (size_t i = 0; i < report.opcodes.size(); ++i) {
    if (report.opcodes[i]) opcodes[program.statistic_names[i].c_str()] = report.opcodes[i];
  }
  py::list conflicts, lines;
  for (size_t i = 0; options.stats && i < report.executed.size(); ++i) {
    if (report.executed[i]) lines.append(program.code[i].line);
  }
  for (size_t i = 0; i < report.conflicts.size(); ++i) {
    const Report::Conflict& conflict = report.conflicts[i];
    const Instruction& in = program.code[i];
    if (conflict.wavefronts > conflict.ideal)
      conflicts.append(py::make_tuple(in.line, in.text, conflict.requests, conflict.wavefronts, conflict.ideal,
                                      in_main_loop(program, i)));
  }
  counters["warp_instructions"] = report.warp_instructions;
  counters["diverged_steps"] = report.diverged_steps;
  counters["shared_requests"] = report.shared_requests;
  counters["shared_wavefronts"] = report.shared_wavefronts;
  counters["shared_ideal_wavefronts"] = report.shared_ideal_wavefronts;
  counters["global_requests"] = report.global_requests;
  counters["global_sectors"] = report.global_sectors;
  counters["global_ideal_sectors"] = report.global_ideal_sectors;
  counters["unwaited_copies"] = report.unwaited_copies;
  py::dict all;
  all["findings"] = findings;
  all["first"] = first;
  all["counters"] = counters;
  all["opcodes"] = opcodes;
  all["conflicts"] = conflicts;
  all["lines"] = lines;
  return all;
}

using Size = std::array<uint32_t, 3>;
using Tensors = std::vector<std::tuple<uint64_t, uint64_t, bool>>;

py::dict launch(const Program& program, Size grid, Size threads, int shared, const py::bytes& params,
                const Tensors& tensors, const py::dict& given) {
  const Options options = options_from(given);
  const std::string image = params;
  Launch request{
      {grid[0], grid[1], grid[2]}, {threads[0], threads[1], threads[2]}, shared, {image.begin(), image.end()}, {}};
  for (const auto& [address, bytes, writable] : tensors) request.tensors.push_back({address, bytes, writable});
  Report report;
  {
    py::gil_scoped_release unlocked;
    report = run(program, std::move(request), options);
  }
  return to_dict(program, report, options);
}

}  // namespace

PYBIND11_MODULE(_ptxsim, module) {
  module.doc() = "Runs PTX on the CPU. Use it through tests.ptxsim.";
  py::register_exception<Unsupported>(module, "Unsupported", PyExc_NotImplementedError);
  py::register_exception<Fault>(module, "Fault", PyExc_RuntimeError);
  py::class_<Program>(module, "Program")
      .def(py::init([](const std::string& ptx, const std::string& entry) { return parse(ptx, entry); }))
      .def_readonly("name", &Program::name)
      .def_readonly("param_bytes", &Program::param_bytes)
      .def_property_readonly("params",
                             [](const Program& program) {
                               std::vector<std::tuple<std::string, int, int>> params;
                               for (const Parameter& param : program.params)
                                 params.emplace_back(param.name, param.offset, param.size);
                               return params;
                             })
      .def("launch", &launch);
}
