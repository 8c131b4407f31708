// The checks of the token losses and the masked moments, and their part of the table of what Python sees.
#include "checks.h"
#include "cpu/losses.h"
#include "cpu/moments.h"

namespace ppo_fast {
namespace {

bool empty(const TokenBatch& in) { return in.sequences * in.tokens == 0; }

// Token tensors come as (address, dtype code, row stride).
TokenBatch checked_batch(std::int64_t sequences, std::int64_t tokens, std::uintptr_t cu_seqlens, int compute,
                         const py::tuple& mask, const py::tuple& now, const py::tuple& old, const py::tuple& target,
                         int reduction) {
  require(sequences >= 0, "sequences is " + std::to_string(sequences) + ", expected 0 or more");
  require(tokens >= 0, "tokens is " + std::to_string(tokens) + ", expected 0 or more");
  require(reduction >= 0 && reduction <= 3, "reduction is code " + std::to_string(reduction) + ", expected 0 to 3");
  const TokenBatch in{sequences,
                      tokens,
                      pointer<const std::int64_t>(cu_seqlens),
                      checked_compute(compute),
                      checked_rows("mask", mask),
                      checked_rows("now", now),
                      checked_rows("old", old),
                      checked_rows("target", target),
                      static_cast<Reduction>(reduction)};
  require(empty(in) || in.mask.data != nullptr, "mask is a null address");
  check_starts(in.cu_seqlens, sequences, tokens);
  return in;
}

void check_inputs(const TokenBatch& in) {
  require(empty(in) || (in.now.data != nullptr && in.old.data != nullptr && in.target.data != nullptr),
          "now, old or target is a null address");
}

LossOut checked_out(const TokenBatch& in, std::uintptr_t kept, std::uintptr_t loss, std::uintptr_t stats,
                    std::uintptr_t lengths, std::uintptr_t divisor) {
  require(loss != 0 && stats != 0 && divisor != 0 && (in.sequences == 0 || lengths != 0), "an output is a null address");
  return {pointer<void>(kept), pointer<void>(loss), pointer<void>(stats), pointer<std::int64_t>(lengths),
          pointer<double>(divisor)};
}

LossGradient checked_gradient(const TokenBatch& in, std::uintptr_t grad_loss, std::uintptr_t lengths,
                              std::uintptr_t divisor, std::uintptr_t grad_now) {
  require(grad_loss != 0 && divisor != 0, "grad_loss or divisor is a null address");
  require(empty(in) || (lengths != 0 && grad_now != 0), "lengths or grad_now is a null address");
  return {*pointer<const double>(grad_loss), pointer<const std::int64_t>(lengths), *pointer<const double>(divisor),
          pointer<void>(grad_now)};
}

PolicyCoefficients checked_coefficients(std::uintptr_t coefficients) {
  require(coefficients != 0, "coefficients is a null address");
  const double* c = pointer<const double>(coefficients);
  return {c[0], c[1], c[2], c[3], c[4], c[5]};
}

void policy_loss(const TokenBatch& in, const py::tuple& entropy, const py::tuple& kl, std::uintptr_t coefficients,
                 std::uintptr_t normalizer, std::uintptr_t kept, std::uintptr_t loss, std::uintptr_t stats,
                 std::uintptr_t lengths, std::uintptr_t divisor, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  check_inputs(in);
  require(empty(in) || kept != 0, "kept is a null address");
  const PolicyTerms terms{checked_rows("entropy", entropy), checked_rows("kl", kl)};
  const PolicyCoefficients of = checked_coefficients(coefficients);
  const LossOut out = checked_out(in, kept, loss, stats, lengths, divisor);
  py::gil_scoped_release release;
  clipped_policy_forward(in, terms, of, pointer<const double>(normalizer), out, on);
}

void policy_gradient(const TokenBatch& in, std::uintptr_t coefficients, std::uintptr_t grad_loss, std::uintptr_t lengths,
                     std::uintptr_t divisor, std::uintptr_t grad_now, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  check_inputs(in);
  const PolicyCoefficients of = checked_coefficients(coefficients);
  const LossGradient gradient = checked_gradient(in, grad_loss, lengths, divisor, grad_now);
  py::gil_scoped_release release;
  clipped_policy_backward(in, of, gradient, on);
}

void value_loss(const TokenBatch& in, std::uintptr_t clip, std::uintptr_t normalizer, std::uintptr_t loss,
                std::uintptr_t stats, std::uintptr_t lengths, std::uintptr_t divisor, int threads,
                const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  check_inputs(in);
  require(clip != 0, "clip is a null address");
  const LossOut out = checked_out(in, 0, loss, stats, lengths, divisor);
  py::gil_scoped_release release;
  clipped_value_forward(in, *pointer<const double>(clip), pointer<const double>(normalizer), out, on);
}

void value_gradient(const TokenBatch& in, std::uintptr_t clip, std::uintptr_t grad_loss, std::uintptr_t lengths,
                    std::uintptr_t divisor, std::uintptr_t grad_now, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  check_inputs(in);
  require(clip != 0, "clip is a null address");
  const LossGradient gradient = checked_gradient(in, grad_loss, lengths, divisor, grad_now);
  py::gil_scoped_release release;
  clipped_value_backward(in, *pointer<const double>(clip), gradient, on);
}

void weights_of_tokens(const TokenBatch& in, std::uintptr_t normalizer, std::uintptr_t weights, int threads,
                       const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require(in.cu_seqlens == nullptr, "cu_seqlens is given, expected a padded batch");
  require(empty(in) || weights != 0, "weights is a null address");
  py::gil_scoped_release release;
  token_weights(in, pointer<const double>(normalizer), pointer<double>(weights), on);
}

bool empty(const MaskedColumns& in) { return in.outer * in.length * in.inner == 0; }

MaskedColumns checked_columns(std::uintptr_t x, int dtype, std::uintptr_t mask, std::int64_t outer, std::int64_t length,
                              std::int64_t inner, bool unbiased) {
  require(dtype >= 0 && dtype <= 3, "dtype is code " + std::to_string(dtype) + ", expected 0 to 3");
  require(outer >= 0 && length >= 0 && inner >= 0, "outer, length or inner is below 0");
  const MaskedColumns in{pointer<const void>(x), pointer<const std::uint8_t>(mask), static_cast<DType>(dtype), outer,
                         length, inner, unbiased};
  require(empty(in) || (x != 0 && mask != 0), "x or mask is a null address");
  return in;
}

Moment checked_moment(int order) {
  require(order == 1 || order == 2, "order is " + std::to_string(order) + ", expected 1 or 2");
  return static_cast<Moment>(order);
}

void check_one_column(const MaskedColumns& in) {
  require(in.outer == 1 && in.inner == 1,
          "outer is " + std::to_string(in.outer) + " and inner " + std::to_string(in.inner) + ", expected one column");
}

void moment(const MaskedColumns& in, int order, std::uintptr_t result, std::uintptr_t whole, int threads,
            const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  const Moment which = checked_moment(order);
  require(in.outer * in.inner == 0 || (result != 0 && whole != 0), "result or whole is a null address");
  py::gil_scoped_release release;
  masked_moment(in, which, pointer<void>(result), pointer<Moments>(whole), on);
}

void moment_gradient(const MaskedColumns& in, int order, std::uintptr_t whole, std::uintptr_t grad, std::uintptr_t grad_x,
                     int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  const Moment which = checked_moment(order);
  require(empty(in) || (whole != 0 && grad != 0 && grad_x != 0), "whole, grad or grad_x is a null address");
  py::gil_scoped_release release;
  masked_moment_backward(in, which, pointer<const Moments>(whole), pointer<const void>(grad), pointer<void>(grad_x), on);
}

void normalize(const MaskedColumns& in, bool keep_mean, std::uintptr_t out, std::uintptr_t whole, int threads,
               const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  check_one_column(in);
  require(whole != 0 && (empty(in) || out != 0), "out or whole is a null address");
  py::gil_scoped_release release;
  masked_normalize(in, keep_mean, pointer<void>(out), pointer<Moments>(whole), on);
}

void normalize_gradient(const MaskedColumns& in, bool keep_mean, std::uintptr_t whole, std::uintptr_t grad,
                        std::uintptr_t grad_x, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  check_one_column(in);
  require(whole != 0 && (empty(in) || (grad != 0 && grad_x != 0)), "whole, grad or grad_x is a null address");
  py::gil_scoped_release release;
  masked_normalize_backward(in, keep_mean, pointer<const Moments>(whole), pointer<const void>(grad),
                            pointer<void>(grad_x), on);
}

void define_losses(py::module_& m) {
  py::class_<TokenBatch>(m, "TokenBatch", "Checked addresses and sizes of what a loss over tokens is made of.")
      .def(py::init(&checked_batch), py::kw_only(), py::arg("sequences"), py::arg("tokens"), py::arg("cu_seqlens"),
           py::arg("compute"), py::arg("mask"), py::arg("now"), py::arg("old"), py::arg("target"), py::arg("reduction"));
  m.def("clipped_policy_forward", &policy_loss, py::arg("batch"), py::kw_only(), py::arg("entropy"), py::arg("kl"),
        py::arg("coefficients"), py::arg("normalizer"), py::arg("kept"), py::arg("loss"), py::arg("stats"),
        py::arg("lengths"), py::arg("divisor"), py::arg("threads"), py::arg("isa"));
  m.def("clipped_policy_backward", &policy_gradient, py::arg("batch"), py::kw_only(), py::arg("coefficients"),
        py::arg("grad_loss"), py::arg("lengths"), py::arg("divisor"), py::arg("grad_now"), py::arg("threads"),
        py::arg("isa"));
  m.def("clipped_value_forward", &value_loss, py::arg("batch"), py::kw_only(), py::arg("clip"), py::arg("normalizer"),
        py::arg("loss"), py::arg("stats"), py::arg("lengths"), py::arg("divisor"), py::arg("threads"), py::arg("isa"));
  m.def("clipped_value_backward", &value_gradient, py::arg("batch"), py::kw_only(), py::arg("clip"), py::arg("grad_loss"),
        py::arg("lengths"), py::arg("divisor"), py::arg("grad_now"), py::arg("threads"), py::arg("isa"));
  m.def("token_weights", &weights_of_tokens, py::arg("batch"), py::kw_only(), py::arg("normalizer"), py::arg("weights"),
        py::arg("threads"), py::arg("isa"));
}

void define_moments(py::module_& m) {
  py::class_<MaskedColumns>(m, "MaskedColumns", "Checked addresses and sizes of [outer, length, inner] under a mask.")
      .def(py::init(&checked_columns), py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("mask"), py::arg("outer"),
           py::arg("length"), py::arg("inner"), py::arg("unbiased"));
  m.def("masked_moment", &moment, py::arg("columns"), py::kw_only(), py::arg("order"), py::arg("result"),
        py::arg("whole"), py::arg("threads"), py::arg("isa"));
  m.def("masked_moment_backward", &moment_gradient, py::arg("columns"), py::kw_only(), py::arg("order"),
        py::arg("whole"), py::arg("grad"), py::arg("grad_x"), py::arg("threads"), py::arg("isa"));
  m.def("masked_normalize", &normalize, py::arg("columns"), py::kw_only(), py::arg("keep_mean"), py::arg("out"),
        py::arg("whole"), py::arg("threads"), py::arg("isa"));
  m.def("masked_normalize_backward", &normalize_gradient, py::arg("columns"), py::kw_only(), py::arg("keep_mean"),
        py::arg("whole"), py::arg("grad"), py::arg("grad_x"), py::arg("threads"), py::arg("isa"));
}

}  // namespace

void define_token_ops(py::module_& m) {
  define_losses(m);
  define_moments(m);
}

}  // namespace ppo_fast
