// Every check of the native code in one place, and the table of what Python sees last. Tensors come as addresses, sizes,
// strides in elements and a dtype code: no torch header is read, so one binary serves every torch version.
#include <cstdint>
#include <new>
#include <string>

#include "checks.h"
#include "cpu/experience.h"
#include "cpu/logits.h"
#include "cpu/memory.h"
#include "dlpack.h"

using namespace ppo_fast;

namespace {

RowGrid checked_grid(std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t inner_rows,
                     std::int64_t outer_stride, std::int64_t inner_stride, std::uintptr_t labels,
                     std::uintptr_t temperature, std::int64_t temperature_stride, bool absent_labels) {
  require(rows >= 0, "rows is " + std::to_string(rows) + ", expected 0 or more");
  require(vocab >= 1, "vocab is " + std::to_string(vocab) + ", expected 1 or more");
  require(inner_rows >= 1, "inner_rows is " + std::to_string(inner_rows) + ", expected 1 or more");
  require(rows == 0 || (logits != 0 && temperature != 0), "logits or temperature is a null address");
  require(temperature_stride == 0 || temperature_stride == 1,
          "temperature_stride is " + std::to_string(temperature_stride) + ", expected 0 or 1");
  RowGrid grid{pointer<const void>(logits),
               checked_dtype(dtype),
               rows,
               vocab,
               inner_rows,
               outer_stride,
               inner_stride,
               pointer<const std::int64_t>(labels),
               pointer<const double>(temperature),
               temperature_stride,
               absent_labels ? -1 : 0};
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

void forward(const RowGrid& grid, std::uintptr_t logprobs, std::uintptr_t entropy, std::uintptr_t stats, int threads,
             const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require_labels(grid);
  require(grid.least_label == 0, "a log-probability needs its label in this slice of the vocabulary");
  require(grid.rows == 0 || (logprobs != 0 && stats != 0), "logprobs or stats is a null address");
  const ForwardOut out{pointer<void>(logprobs), pointer<void>(entropy), pointer<RowStats>(stats)};
  py::gil_scoped_release release;
  logprob_forward(grid, out, on);
}

void backward(const RowGrid& grid, std::uintptr_t stats, std::uintptr_t grad_logprobs, std::uintptr_t grad_entropy,
              std::uintptr_t grad_logits, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require_labels(grid);
  require(grid.rows == 0 || (stats != 0 && grad_logits != 0), "stats or grad_logits is a null address");
  const BackwardIn in{pointer<const RowStats>(stats), pointer<const void>(grad_logprobs),
                      pointer<const void>(grad_entropy), pointer<void>(grad_logits)};
  py::gil_scoped_release release;
  logprob_backward(grid, in, on);
}

void exp_probe(std::uintptr_t x, std::uintptr_t y, std::int64_t n, double temperature, bool halves,
               const std::string& isa) {
  require(n == 0 || (x != 0 && y != 0), "x or y is a null address");
  exp_float32(pointer<const float>(x), pointer<float>(y), n, temperature, halves, isa_named(isa));
}

// Token tensors come as (address, dtype code, row stride), 0 for an address that is not given.
ExperienceIn checked_experience(std::int64_t sequences, std::int64_t tokens, std::uintptr_t cu_seqlens, int compute,
                                const py::tuple& logprobs, const py::tuple& ref_logprobs, const py::tuple& token_rewards,
                                const py::tuple& values, const py::tuple& mask, std::uintptr_t scores,
                                std::uintptr_t score_index, std::uintptr_t bootstrap, std::uintptr_t gamma,
                                std::uintptr_t lam, double kl_coef, double clip_score, double all_gamma, double all_lam,
                                int kind, bool carry) {
  require(sequences >= 0, "sequences is " + std::to_string(sequences) + ", expected 0 or more");
  require(tokens >= 0, "tokens is " + std::to_string(tokens) + ", expected 0 or more");
  require(kind >= 0 && kind <= 3, "kind is code " + std::to_string(kind) + ", expected 0 to 3");
  ExperienceIn in{sequences,
                  tokens,
                  pointer<const std::int64_t>(cu_seqlens),
                  checked_compute(compute),
                  checked_rows("logprobs", logprobs),
                  checked_rows("ref_logprobs", ref_logprobs),
                  checked_rows("token_rewards", token_rewards),
                  checked_rows("values", values),
                  checked_rows("mask", mask),
                  pointer<const void>(scores),
                  pointer<const std::int64_t>(score_index),
                  pointer<const void>(bootstrap),
                  pointer<const void>(gamma),
                  pointer<const void>(lam),
                  kl_coef,
                  clip_score,
                  all_gamma,
                  all_lam,
                  static_cast<KlKind>(kind),
                  carry};
  require(sequences * tokens == 0 || in.mask.data != nullptr, "mask is a null address");
  require((in.logprobs.data == nullptr) == (in.ref_logprobs.data == nullptr),
          "logprobs and ref_logprobs must be given together");
  check_starts(in.cu_seqlens, sequences, tokens);
  return in;
}

void experience(const ExperienceIn& in, std::uintptr_t rewards, std::uintptr_t kl, std::uintptr_t advantages,
                std::uintptr_t returns, std::uintptr_t moments, int whiten, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require(whiten >= 0 && whiten <= 2, "whiten is code " + std::to_string(whiten) + ", expected 0 to 2");
  const bool empty = in.sequences * in.tokens == 0;
  require(whiten == 0 || empty || in.values.data != nullptr, "whiten needs values");
  require(in.values.data == nullptr || empty || (advantages != 0 && returns != 0),
          "advantages or returns is a null address");
  const ExperienceOut out{pointer<void>(rewards), pointer<void>(kl), pointer<void>(advantages), pointer<void>(returns),
                          pointer<Moments>(moments)};
  py::gil_scoped_release release;
  experience_forward(in, out, static_cast<Whiten>(whiten), on);
}

void gae_gradient(std::int64_t sequences, std::int64_t tokens, std::uintptr_t cu_seqlens, int compute,
                  std::uintptr_t mask, std::uintptr_t grad_advantages, std::uintptr_t grad_returns,
                  std::uintptr_t grad_rewards, std::uintptr_t grad_values, std::uintptr_t grad_bootstrap,
                  std::uintptr_t gamma, std::uintptr_t lam, double all_gamma, double all_lam, bool carry, int threads,
                  const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require(sequences >= 0 && tokens >= 0, "sequences or tokens is below 0");
  require(sequences * tokens == 0 || (mask != 0 && grad_advantages != 0 && grad_returns != 0 && grad_rewards != 0 &&
                                      grad_values != 0 && grad_bootstrap != 0),
          "an input or output is a null address");
  check_starts(pointer<const std::int64_t>(cu_seqlens), sequences, tokens);
  const GaeGradient in{sequences,
                       tokens,
                       pointer<const std::int64_t>(cu_seqlens),
                       checked_compute(compute),
                       pointer<const std::uint8_t>(mask),
                       pointer<const void>(grad_advantages),
                       pointer<const void>(grad_returns),
                       pointer<void>(grad_rewards),
                       pointer<void>(grad_values),
                       pointer<void>(grad_bootstrap),
                       pointer<const void>(gamma),
                       pointer<const void>(lam),
                       all_gamma,
                       all_lam,
                       carry};
  py::gil_scoped_release release;
  gae_backward(in, on);
}

void estimate(std::int64_t size, int compute, const py::tuple& logprobs, const py::tuple& ref_logprobs,
              std::uintptr_t grad, std::uintptr_t out, double input_clamp, double output_clamp, int kind, int threads,
              const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require(size >= 0, "size is " + std::to_string(size) + ", expected 0 or more");
  require(kind >= 0 && kind <= 3, "kind is code " + std::to_string(kind) + ", expected 0 to 3");
  const KlIn in{size,
                checked_compute(compute),
                checked_rows("logprobs", logprobs),
                checked_rows("ref_logprobs", ref_logprobs),
                pointer<const void>(grad),
                pointer<void>(out),
                input_clamp,
                output_clamp,
                static_cast<KlKind>(kind)};
  require(size == 0 || (in.logprobs.data != nullptr && in.ref_logprobs.data != nullptr && out != 0),
          "logprobs, ref_logprobs or out is a null address");
  py::gil_scoped_release release;
  kl_estimate(in, on);
}

void whiten(std::uintptr_t x, std::uintptr_t mask, std::int64_t size, int compute, std::uintptr_t parts,
            std::int64_t count, bool unbiased, int threads, const std::string& isa) {
  const RunOn on = checked_run(threads, isa);
  require(size >= 0 && count >= 0, "size or count is below 0");
  require(size == 0 || (x != 0 && mask != 0), "x or mask is a null address");
  require(count == 0 || parts != 0, "parts is a null address");
  const DType dtype = checked_compute(compute);
  py::gil_scoped_release release;
  whiten_by_parts(pointer<void>(x), pointer<const std::uint8_t>(mask), size, dtype, pointer<const Moments>(parts), count,
                  unbiased, on);
}

void merge(std::uintptr_t parts, std::int64_t count, std::uintptr_t whole) {
  require(count >= 0 && whole != 0 && (count == 0 || parts != 0), "parts or whole is a null address");
  *pointer<Moments>(whole) = merge_parts(pointer<const Moments>(parts), count);
}

struct OwnedBlock {
  DLManagedTensor managed;
  std::int64_t bytes;
};

void drop_block(DLManagedTensor* managed) {
  auto* block = static_cast<OwnedBlock*>(managed->manager);
  return_block(managed->tensor.data, static_cast<std::size_t>(block->bytes));
  delete block;
}

// A consumer renames the capsule that it takes over; one that nobody took still owns its block.
void drop_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

py::capsule large_block(std::int64_t bytes) {
  require(bytes >= 1, "bytes is " + std::to_string(bytes) + ", expected 1 or more");
  void* data = take_block(static_cast<std::size_t>(bytes));
  if (data == nullptr) throw std::bad_alloc();
  auto* block = new OwnedBlock{{}, bytes};
  block->managed = {{data, {1, 0}, 1, {1, 8, 1}, &block->bytes, nullptr, 0}, block, &drop_block};
  return py::capsule(&block->managed, "dltensor", &drop_capsule);
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
           py::arg("temperature_stride"), py::arg("absent_labels") = false);
  m.def("logprob_forward", &forward, py::arg("grid"), py::kw_only(), py::arg("logprobs"), py::arg("entropy"),
        py::arg("stats"), py::arg("threads"), py::arg("isa"));
  m.def("logprob_backward", &backward, py::arg("grid"), py::kw_only(), py::arg("stats"), py::arg("grad_logprobs"),
        py::arg("grad_entropy"), py::arg("grad_logits"), py::arg("threads"), py::arg("isa"));
  py::class_<ExperienceIn>(m, "ExperienceIn", "Checked addresses, sizes and coefficients of sequences of tokens.")
      .def(py::init(&checked_experience), py::kw_only(), py::arg("sequences"), py::arg("tokens"), py::arg("cu_seqlens"),
           py::arg("compute"), py::arg("logprobs"), py::arg("ref_logprobs"), py::arg("token_rewards"),
           py::arg("values"), py::arg("mask"), py::arg("scores"), py::arg("score_index"), py::arg("bootstrap"),
           py::arg("gamma"), py::arg("lam"), py::arg("kl_coef"), py::arg("clip_score"), py::arg("all_gamma"),
           py::arg("all_lam"), py::arg("kind"), py::arg("carry"));
  m.def("experience_forward", &experience, py::arg("inputs"), py::kw_only(), py::arg("rewards"), py::arg("kl"),
        py::arg("advantages"), py::arg("returns"), py::arg("moments"), py::arg("whiten"), py::arg("threads"),
        py::arg("isa"));
  m.def("gae_backward", &gae_gradient, py::kw_only(), py::arg("sequences"), py::arg("tokens"), py::arg("cu_seqlens"),
        py::arg("compute"), py::arg("mask"), py::arg("grad_advantages"), py::arg("grad_returns"),
        py::arg("grad_rewards"), py::arg("grad_values"), py::arg("grad_bootstrap"), py::arg("gamma"), py::arg("lam"),
        py::arg("all_gamma"), py::arg("all_lam"), py::arg("carry"), py::arg("threads"), py::arg("isa"));
  m.def("kl_estimate", &estimate, py::kw_only(), py::arg("size"), py::arg("compute"), py::arg("logprobs"),
        py::arg("ref_logprobs"), py::arg("grad"), py::arg("out"), py::arg("input_clamp"), py::arg("output_clamp"),
        py::arg("kind"), py::arg("threads"), py::arg("isa"));
  m.def("whiten_by_parts", &whiten, py::kw_only(), py::arg("x"), py::arg("mask"), py::arg("size"), py::arg("compute"),
        py::arg("parts"), py::arg("count"), py::arg("unbiased"), py::arg("threads"), py::arg("isa"));
  m.def("merge_parts", &merge, py::kw_only(), py::arg("parts"), py::arg("count"), py::arg("whole"));
  define_token_ops(m);
  define_policy_ops(m);
  m.def("large_block", &large_block, py::arg("bytes"), "Uninitialised bytes as a DLPack capsule.");
  m.def("exp_float32", &exp_probe, py::kw_only(), py::arg("x"), py::arg("y"), py::arg("n"),
        py::arg("temperature"), py::arg("halves"), py::arg("isa"));
  m.def("compiled_isas", &compiled_isas, "Instruction sets in this binary, best first.");
  m.def("supported_isas", &supported_isas, "Those of them that this machine can run, best first.");
#ifdef PPO_FAST_CUDA
  define_cuda_ops(m);
#endif
}
