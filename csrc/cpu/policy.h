// Two rows of logits and what PPO makes of them: exact KL, and the clipped policy loss with its gradient.
#pragma once

#include <cstdint>

#include "cpu/logits.h"
#include "cpu/losses.h"

namespace ppo_fast {

// The reference's logits, row by row beside the policy's; a null address: none. Their arithmetic is the policy's: float64
// beside float64, any other dtype beside any other.
struct RefGrid {
  const void* logits;
  DType dtype;
  std::int64_t inner_rows;
  std::int64_t outer_stride;
  std::int64_t inner_stride;
};

// What a gradient needs of a row: its statistics, those of the reference's row, mean_gap = E_p[d - d_ref], and what comes
// down on its log-probability, entropy and KL. With all three 0 the row is not read.
struct PolicyState {
  RowStats stats;
  double ref_top;
  double ref_total;
  double mean_gap;
  double g_logprob;
  double g_entropy;
  double g_kl;
};

// Rows of numbers are double for float64 logits and float otherwise.
struct PolicyIn {
  RowGrid grid;  // masked rows have any label in range
  RefGrid ref;
  const void* old_logprobs;
  const void* advantages;
  const void* weights;  // d loss / d term of each row, -inf where it does not count
  PolicyCoefficients of;
};

struct PolicyOut {
  void* logprobs;      // [rows]
  void* entropy;       // [rows]
  void* kl;            // [rows], null without a reference
  PolicyState* state;  // [rows], or null: then the gradient of the loss takes the place of the logits
};

// Reads every row that counts once, and with no state once more, while it is in the cache.
void policy_forward(const PolicyIn& in, const PolicyOut& out, RunOn on);

// `grad_loss` times each row's gradient, into [rows, vocab] contiguous of the logits' dtype; null: in the logits' place.
void policy_backward(const RowGrid& grid, const RefGrid& ref, const PolicyState* state, double grad_loss, void* grad_logits,
                     RunOn on);

// Multiplies the rows of `grid` by `factor` in place; 0 stays 0.
void scale_rows(const RowGrid& grid, double factor, RunOn on);

// KL(pi || ref) of each row, and its state with no gradient coming down.
void kl_forward(const RowGrid& grid, const RefGrid& ref, void* kl, PolicyState* state, RunOn on);

// From grad_kl [rows], typed like kl: either gradient, contiguous, in its logits' dtype; null: not wanted.
void kl_backward(const RowGrid& grid, const RefGrid& ref, const PolicyState* state, const void* grad_kl, void* grad_logits,
                 void* grad_ref_logits, RunOn on);

}  // namespace ppo_fast
