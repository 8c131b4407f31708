// Logits to the terms of the clipped policy loss and their gradient: what a caller passes, and the entry point.
#pragma once

#include <cstdint>

#include "cpu/logits.h"

namespace ppo_fast::cuda {

// Addresses of device memory. Row r of the logits, and of their gradient, starts at
// (r / inner_rows) * outer_stride + (r % inner_rows) * inner_stride elements; a row itself is contiguous.
struct PolicyRows {
  const void* logits;
  void* grad_logits;  // the logits themselves, or as far from a multiple of 16 bytes as they are; null: not wanted
  std::int64_t rows;
  std::int64_t vocab;
  std::int64_t inner_rows;
  std::int64_t outer_stride;
  std::int64_t inner_stride;
  const std::int64_t* labels;
  const float* old_logprobs;
  const float* advantages;
  const float* weights;  // d loss / d term; -inf in masked rows, which are not read
  const float* temperature;
  std::int64_t temperature_stride;  // 0 or 1
  const float* coefficients;        // 1 - clip_low, 1 + clip_high, dual_clip, log_ratio_clamp, entropy_coef
  float* logprobs;
  float* entropy;
  float* state;  // [rows, 7]: max x, 1 / sum e^d, max of no reference, a, b, c, 0; null: not wanted
};

// float32, bfloat16 or float16. `cluster` blocks share a row where the device has clusters; 0 takes what is thought best for the row's size.
// std::invalid_argument where a row does not fit; std::runtime_error with CUDA's message where the launch fails.
void policy_rows(const PolicyRows& rows, DType dtype, int cluster, int device, std::uintptr_t stream);

}  // namespace ppo_fast::cuda
