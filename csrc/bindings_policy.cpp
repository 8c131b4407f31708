// Checks and bindings of the exact KL and of the policy loss from logits.
#include "checks.h"
#include "cpu/policy.h"

namespace ppo_fast {
namespace {

// A reference comes as (address, dtype code, inner_rows, outer_stride, inner_stride), or None.
RefGrid checked_ref(const py::object& ref, const RowGrid& grid) {
  if (ref.is_none()) return {nullptr, grid.dtype, 1, 0, 0};
  const auto parts = ref.cast<py::tuple>();
  require(parts.size() == 5, "ref has " + std::to_string(parts.size()) + " parts, expected 5");
  const RefGrid checked{pointer<const void>(parts[0].cast<std::uintptr_t>()), checked_dtype(parts[1].cast<int>()),
                        parts[2].cast<std::int64_t>(), parts[3].cast<std::int64_t>(), parts[4].cast<std::int64_t>()};
  require(grid.rows == 0 || checked.logits != nullptr, "ref is a null address");
  require(checked.inner_rows >= 1, "inner_rows of ref is " + std::to_string(checked.inner_rows) + ", expected 1 or more");
  require((checked.dtype == DType::kFloat64) == (grid.dtype == DType::kFloat64),
          "ref and logits must both be float64, or neither");
  return checked;
}

void forward(const RowGrid& grid, const py::object& ref, std::uintptr_t old_logprobs, std::uintptr_t advantages,
             std::uintptr_t weights, double low, double high, double dual_clip, double log_ratio_clamp,
             double entropy_coef, double kl_coef, std::uintptr_t logprobs, std::uintptr_t entropy, std::uintptr_t kl,
             std::uintptr_t state, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require_labels(grid);
  require(grid.least_label == 0, "a log-probability needs its label in this slice of the vocabulary");
  const PolicyIn in{grid,
                    checked_ref(ref, grid),
                    pointer<const void>(old_logprobs),
                    pointer<const void>(advantages),
                    pointer<const void>(weights),
                    {low, high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef}};
  require(grid.rows == 0 || (old_logprobs != 0 && advantages != 0 && weights != 0 && logprobs != 0 && entropy != 0),
          "an input or output is a null address");
  const PolicyOut out{pointer<void>(logprobs), pointer<void>(entropy), pointer<void>(kl), pointer<PolicyState>(state)};
  py::gil_scoped_release release;
  policy_forward(in, out, on);
}

void backward(const RowGrid& grid, const py::object& ref, std::uintptr_t state, double grad_loss,
              std::uintptr_t grad_logits, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  const RefGrid checked = checked_ref(ref, grid);
  require_labels(grid);
  require(grid.rows == 0 || state != 0, "state is a null address");
  py::gil_scoped_release release;
  policy_backward(grid, checked, pointer<const PolicyState>(state), grad_loss, pointer<void>(grad_logits), on);
}

void scale(const RowGrid& grid, double factor, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  py::gil_scoped_release release;
  scale_rows(grid, factor, on);
}

void exact_kl(const RowGrid& grid, const py::object& ref, std::uintptr_t kl, std::uintptr_t state, int threads,
              const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require(!ref.is_none(), "ref is None, expected the reference's logits");
  const RefGrid checked = checked_ref(ref, grid);
  require(grid.rows == 0 || (kl != 0 && state != 0), "kl or state is a null address");
  py::gil_scoped_release release;
  kl_forward(grid, checked, pointer<void>(kl), pointer<PolicyState>(state), on);
}

void exact_kl_backward(const RowGrid& grid, const py::object& ref, std::uintptr_t state, std::uintptr_t grad_kl,
                       std::uintptr_t grad_logits, std::uintptr_t grad_ref_logits, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require(!ref.is_none(), "ref is None, expected the reference's logits");
  const RefGrid checked = checked_ref(ref, grid);
  require(grid.rows == 0 || (state != 0 && grad_kl != 0), "state or grad_kl is a null address");
  py::gil_scoped_release release;
  kl_backward(grid, checked, pointer<const PolicyState>(state), pointer<const void>(grad_kl), pointer<void>(grad_logits),
              pointer<void>(grad_ref_logits), on);
}

}  // namespace

void define_policy_ops(py::module_& m) {
  m.attr("POLICY_STATE") = sizeof(PolicyState) / sizeof(double);
  m.def("policy_forward", &forward, py::arg("grid"), py::kw_only(), py::arg("ref"), py::arg("old_logprobs"),
        py::arg("advantages"), py::arg("weights"), py::arg("low"), py::arg("high"), py::arg("dual_clip"),
        py::arg("log_ratio_clamp"), py::arg("entropy_coef"), py::arg("kl_coef"), py::arg("logprobs"), py::arg("entropy"),
        py::arg("kl"), py::arg("state"), py::arg("threads"), py::arg("isa"),
        "With state 0 the gradient takes the place of the logits.");
  m.def("policy_backward", &backward, py::arg("grid"), py::kw_only(), py::arg("ref"), py::arg("state"),
        py::arg("grad_loss"), py::arg("grad_logits"), py::arg("threads"), py::arg("isa"),
        "With grad_logits 0 the gradient takes the place of the logits.");
  m.def("scale_rows", &scale, py::arg("grid"), py::kw_only(), py::arg("factor"), py::arg("threads"), py::arg("isa"));
  m.def("kl_forward", &exact_kl, py::arg("grid"), py::kw_only(), py::arg("ref"), py::arg("kl"), py::arg("state"),
        py::arg("threads"), py::arg("isa"));
  m.def("kl_backward", &exact_kl_backward, py::arg("grid"), py::kw_only(), py::arg("ref"), py::arg("state"),
        py::arg("grad_kl"), py::arg("grad_logits"), py::arg("grad_ref_logits"), py::arg("threads"), py::arg("isa"));
}

}  // namespace ppo_fast
