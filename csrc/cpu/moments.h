// The masked moments: what a caller passes, and the entry points. Results and their gradients are in the dtype of the
// arithmetic, double for float64 and else float; sums are in double, chunk by chunk and then in the order of the chunks.
#pragma once

#include <cstdint>

#include "cpu/experience.h"

namespace ppo_fast {

// x and its mask, contiguous, reduced over length to outer * inner columns.
struct MaskedColumns {
  const void* x;             // [outer, length, inner]
  const std::uint8_t* mask;  // nonzero = counts
  DType dtype;
  std::int64_t outer;
  std::int64_t length;
  std::int64_t inner;
  bool unbiased;  // variances are over one less than what counts
};

enum class Moment : int { kMean = 1, kVariance = 2 };

// result and grad: [columns]. whole: [columns], what the gradient needs. grad_x: as x.
void masked_moment(const MaskedColumns& in, Moment moment, void* result, Moments* whole, RunOn on);
void masked_moment_backward(const MaskedColumns& in, Moment moment, const Moments* whole, const void* grad, void* grad_x,
                            RunOn on);

// x, which is one column, to mean 0 and variance 1, or to variance 1 about its mean. out and grad: as x.
void masked_normalize(const MaskedColumns& in, bool keep_mean, void* out, Moments* whole, RunOn on);
void masked_normalize_backward(const MaskedColumns& in, bool keep_mean, const Moments* whole, const void* grad,
                               void* grad_x, RunOn on);

}  // namespace ppo_fast
