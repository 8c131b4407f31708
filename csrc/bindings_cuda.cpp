// Every check of the CUDA kernels' arguments in one place. Tensors come as addresses of device memory, sizes, strides
// in elements and dtype codes; the device by its number, the stream as an integer.
#include "checks.h"
#include "cuda/experience.h"
#include "cuda/policy_rows.h"

namespace ppo_fast {
namespace {

DType single_or_half(const char* name, DType dtype) {
  require(dtype != DType::kFloat64, std::string(name) + " is float64, which the CUDA kernels do not take");
  return dtype;
}

TokenRows device_rows(const char* name, const py::tuple& rows) {
  const TokenRows checked = checked_rows(name, rows);
  single_or_half(name, checked.dtype);
  return checked;
}

void policy_rows(std::uintptr_t logits, std::uintptr_t grad_logits, int dtype, std::int64_t rows, std::int64_t vocab,
                 std::int64_t inner_rows, std::int64_t outer_stride, std::int64_t inner_stride, std::uintptr_t labels,
                 std::uintptr_t old_logprobs, std::uintptr_t advantages, std::uintptr_t weights,
                 std::uintptr_t temperature, std::int64_t temperature_stride, std::uintptr_t coefficients,
                 std::uintptr_t logprobs, std::uintptr_t entropy, std::uintptr_t state, int cluster, int device,
                 std::uintptr_t stream) {
  require(rows >= 0, "rows is " + std::to_string(rows) + ", expected 0 or more");
  require(vocab >= 1 && vocab <= 0x3fffffff, "vocab is " + std::to_string(vocab) + ", expected 1 to 2^30 - 1");
  require(inner_rows >= 1, "inner_rows is " + std::to_string(inner_rows) + ", expected 1 or more");
  require(temperature_stride == 0 || temperature_stride == 1,
          "temperature_stride is " + std::to_string(temperature_stride) + ", expected 0 or 1");
  require(cluster == 0 || cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8,
          "cluster is " + std::to_string(cluster) + ", expected 0, 1, 2, 4 or 8");
  require(grad_logits == 0 || (grad_logits - logits) % 16 == 0,
          "grad_logits lies otherwise between multiples of 16 bytes than logits");
  require(rows == 0 || (logits != 0 && labels != 0 && old_logprobs != 0 && advantages != 0 && weights != 0 &&
                        temperature != 0 && coefficients != 0 && logprobs != 0 && entropy != 0),
          "an input or output is a null address");
  const cuda::PolicyRows in{pointer<const void>(logits),
                            pointer<void>(grad_logits),
                            rows,
                            vocab,
                            inner_rows,
                            outer_stride,
                            inner_stride,
                            pointer<const std::int64_t>(labels),
                            pointer<const float>(old_logprobs),
                            pointer<const float>(advantages),
                            pointer<const float>(weights),
                            pointer<const float>(temperature),
                            temperature_stride,
                            pointer<const float>(coefficients),
                            pointer<float>(logprobs),
                            pointer<float>(entropy),
                            pointer<float>(state)};
  const DType checked = single_or_half("logits", checked_dtype(dtype));
  py::gil_scoped_release release;
  cuda::policy_rows(in, checked, cluster, device, stream);
}

// Token tensors come as (address, dtype code, row stride), 0 for an address that is not given.
void experience(std::int64_t sequences, std::int64_t tokens, std::uintptr_t cu_seqlens, bool cu_seqlens_64,
                const py::tuple& logprobs, const py::tuple& ref_logprobs, const py::tuple& token_rewards,
                const py::tuple& values, const py::tuple& mask, std::uintptr_t scores, std::uintptr_t score_index,
                std::uintptr_t bootstrap, std::uintptr_t gamma, std::uintptr_t lam, std::uintptr_t coefficients,
                std::uintptr_t rewards, std::uintptr_t kl, std::uintptr_t advantages, std::uintptr_t returns,
                std::uintptr_t parts, int kind, bool carry, int device, std::uintptr_t stream) {
  require(sequences >= 0, "sequences is " + std::to_string(sequences) + ", expected 0 or more");
  require(tokens >= 0, "tokens is " + std::to_string(tokens) + ", expected 0 or more");
  require(kind >= 0 && kind <= 3, "kind is code " + std::to_string(kind) + ", expected 0 to 3");
  const cuda::Experience in{sequences,
                            tokens,
                            pointer<const void>(cu_seqlens),
                            cu_seqlens_64,
                            device_rows("logprobs", logprobs),
                            device_rows("ref_logprobs", ref_logprobs),
                            device_rows("token_rewards", token_rewards),
                            device_rows("values", values),
                            device_rows("mask", mask),
                            pointer<const float>(scores),
                            pointer<const std::int64_t>(score_index),
                            pointer<const float>(bootstrap),
                            pointer<const float>(gamma),
                            pointer<const float>(lam),
                            pointer<const float>(coefficients),
                            pointer<float>(rewards),
                            pointer<float>(kl),
                            pointer<float>(advantages),
                            pointer<float>(returns),
                            pointer<float>(parts),
                            static_cast<KlKind>(kind),
                            carry};
  require(sequences == 0 || (in.mask.data != nullptr && coefficients != 0), "mask or coefficients is a null address");
  require((in.logprobs.data == nullptr) == (in.ref_logprobs.data == nullptr),
          "logprobs and ref_logprobs must be given together");
  require(in.values.data == nullptr || (advantages != 0 && returns != 0), "advantages or returns is a null address");
  py::gil_scoped_release release;
  cuda::experience(in, device, stream);
}

void merge(std::uintptr_t parts, std::int64_t count, std::uintptr_t merged, std::int64_t groups, std::int64_t size,
           int device, std::uintptr_t stream) {
  require(count >= 0 && groups >= 0 && size >= 1, "count, groups or size is too small");
  require((groups - 1) * size < count || groups <= 1, "the last group is empty");
  require(groups == 0 || (parts != 0 && merged != 0), "parts or merged is a null address");
  py::gil_scoped_release release;
  cuda::merge_parts(pointer<const float>(parts), count, pointer<float>(merged), groups, size, device, stream);
}

void whiten(std::uintptr_t x, std::uintptr_t mask, std::int64_t size, std::uintptr_t parts, std::int64_t count,
            bool unbiased, int device, std::uintptr_t stream) {
  require(size >= 0 && count >= 0, "size or count is below 0");
  require(size == 0 || (x != 0 && mask != 0), "x or mask is a null address");
  require(count == 0 || parts != 0, "parts is a null address");
  py::gil_scoped_release release;
  cuda::whiten_by_parts(pointer<float>(x), pointer<const std::uint8_t>(mask), size, pointer<const float>(parts), count,
                        unbiased, device, stream);
}

}  // namespace

void define_cuda_ops(py::module_& m) {
  m.attr("cuda_targets") = PPO_FAST_CUDA_TARGETS;
  m.attr("cuda_compiler") = PPO_FAST_CUDA;
  m.def("cuda_policy_rows", &policy_rows, py::kw_only(), py::arg("logits"), py::arg("grad_logits"), py::arg("dtype"),
        py::arg("rows"), py::arg("vocab"), py::arg("inner_rows"), py::arg("outer_stride"), py::arg("inner_stride"),
        py::arg("labels"), py::arg("old_logprobs"), py::arg("advantages"), py::arg("weights"), py::arg("temperature"),
        py::arg("temperature_stride"), py::arg("coefficients"), py::arg("logprobs"), py::arg("entropy"),
        py::arg("state"), py::arg("cluster"), py::arg("device"), py::arg("stream"));
  m.def("cuda_experience", &experience, py::kw_only(), py::arg("sequences"), py::arg("tokens"), py::arg("cu_seqlens"),
        py::arg("cu_seqlens_64"), py::arg("logprobs"), py::arg("ref_logprobs"), py::arg("token_rewards"),
        py::arg("values"), py::arg("mask"), py::arg("scores"), py::arg("score_index"), py::arg("bootstrap"),
        py::arg("gamma"), py::arg("lam"), py::arg("coefficients"), py::arg("rewards"), py::arg("kl"),
        py::arg("advantages"), py::arg("returns"), py::arg("parts"), py::arg("kind"), py::arg("carry"),
        py::arg("device"), py::arg("stream"));
  m.def("cuda_merge_parts", &merge, py::kw_only(), py::arg("parts"), py::arg("count"), py::arg("merged"),
        py::arg("groups"), py::arg("size"), py::arg("device"), py::arg("stream"));
  m.def("cuda_whiten_by_parts", &whiten, py::kw_only(), py::arg("x"), py::arg("mask"), py::arg("size"),
        py::arg("parts"), py::arg("count"), py::arg("unbiased"), py::arg("device"), py::arg("stream"));
}

}  // namespace ppo_fast
