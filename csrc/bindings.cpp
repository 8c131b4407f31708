// Every check of the native code in one place, and the table of what Python sees last. Tensors come as addresses, sizes,
// strides in elements and a dtype code: no torch header is read, so one binary serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/logits.h"

namespace py = pybind11;
using namespace ppo_fast;

namespace {

constexpr Isa kIsas[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};  // best first

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      return "portable";
  }
  return "unknown";
}

void require(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

Isa isa_named(const std::string& name) {
  for (Isa isa : kIsas) {
    if (name != name_of(isa)) continue;
    require(isa_supported(isa), "isa: this machine cannot run '" + name + "'");
    return isa;
  }
  throw py::value_error("isa is '" + name + "', expected one of avx512, avx2, portable");
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

RowGrid checked_grid(std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t inner_rows,
                     std::int64_t outer_stride, std::int64_t inner_stride, std::uintptr_t labels,
                     std::uintptr_t temperature, std::int64_t temperature_stride) {
  require(dtype >= 0 && dtype <= 3, "dtype is code " + std::to_string(dtype) + ", expected 0 to 3");
  require(rows >= 0, "rows is " + std::to_string(rows) + ", expected 0 or more");
  require(vocab >= 1, "vocab is " + std::to_string(vocab) + ", expected 1 or more");
  require(inner_rows >= 1, "inner_rows is " + std::to_string(inner_rows) + ", expected 1 or more");
  require(rows == 0 || (logits != 0 && labels != 0 && temperature != 0), "an input is a null address");
  require(temperature_stride == 0 || temperature_stride == 1,
          "temperature_stride is " + std::to_string(temperature_stride) + ", expected 0 or 1");
  RowGrid grid{pointer<const void>(logits),
               static_cast<DType>(dtype),
               rows,
               vocab,
               inner_rows,
               outer_stride,
               inner_stride,
               pointer<const std::int64_t>(labels),
               pointer<const double>(temperature),
               temperature_stride};
  const std::int64_t label = first_bad_label(grid);
  if (label >= 0) {
    throw py::value_error("labels holds " + std::to_string(grid.labels[label]) + " at flat position " +
                          std::to_string(label) + ", expected a token in [0, " + std::to_string(vocab) + ")");
  }
  const std::int64_t cold = first_bad_temperature(grid);
  if (cold >= 0) {
    throw py::value_error("temperature holds " + std::to_string(grid.temperature[cold * temperature_stride]) +
                          " at flat position " + std::to_string(cold) + ", expected a positive number");
  }
  return grid;
}

RunOn checked_run(int threads, const std::string& isa) {
  require(threads >= 1, "threads is " + std::to_string(threads) + ", expected 1 or more");
  return {threads, isa_named(isa)};
}

void forward(const RowGrid& grid, std::uintptr_t logprobs, std::uintptr_t entropy, std::uintptr_t stats, int threads,
             const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require(grid.rows == 0 || (logprobs != 0 && entropy != 0 && stats != 0), "an output is a null address");
  const ForwardOut out{pointer<void>(logprobs), pointer<void>(entropy), pointer<RowStats>(stats)};
  py::gil_scoped_release release;
  logprob_forward(grid, out, on);
}

void backward(const RowGrid& grid, std::uintptr_t stats, std::uintptr_t grad_logprobs, std::uintptr_t grad_entropy,
              std::uintptr_t grad_logits, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require(grid.rows == 0 || (stats != 0 && grad_logits != 0), "stats or grad_logits is a null address");
  const BackwardIn in{pointer<const RowStats>(stats), pointer<const void>(grad_logprobs),
                      pointer<const void>(grad_entropy), pointer<void>(grad_logits)};
  py::gil_scoped_release release;
  logprob_backward(grid, in, on);
}

void exp_probe(std::uintptr_t x, std::uintptr_t y, std::int64_t n, const std::string& isa) {
  require(n == 0 || (x != 0 && y != 0), "x or y is a null address");
  exp_float32(pointer<const float>(x), pointer<float>(y), n, isa_named(isa));
}

py::list compiled_isas() {
  py::list names;
#if defined(__x86_64__)
  names.append("avx512");
  names.append("avx2");
#endif
  names.append("portable");
  return names;
}

py::list supported_isas() {
  py::list names;
  for (Isa isa : kIsas) {
    if (isa_supported(isa)) names.append(name_of(isa));
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU row ops; ppo_fast.ops.fused_logprob holds the tensors and the autograd.";
#ifdef __clang__
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  py::class_<RowGrid>(m, "RowGrid", "Checked addresses, sizes and strides of [rows, vocab] logits with their labels.")
      .def(py::init(&checked_grid), py::kw_only(), py::arg("logits"), py::arg("dtype"), py::arg("rows"),
           py::arg("vocab"), py::arg("inner_rows"), py::arg("outer_stride"), py::arg("inner_stride"),
           py::arg("labels"), py::arg("temperature"),
           py::arg("temperature_stride"));
  m.def("logprob_forward", &forward, py::arg("grid"), py::kw_only(), py::arg("logprobs"), py::arg("entropy"),
        py::arg("stats"), py::arg("threads"), py::arg("isa"));
  m.def("logprob_backward", &backward, py::arg("grid"), py::kw_only(), py::arg("stats"), py::arg("grad_logprobs"),
        py::arg("grad_entropy"), py::arg("grad_logits"), py::arg("threads"), py::arg("isa"));
  m.def("exp_float32", &exp_probe, py::kw_only(), py::arg("x"), py::arg("y"), py::arg("n"), py::arg("isa"));
  m.def("compiled_isas", &compiled_isas, "Instruction sets in this binary, best first.");
  m.def("supported_isas", &supported_isas, "Those of them that this machine can run, best first.");
}
