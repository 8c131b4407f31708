// The experience stage over sequences of tokens: what a caller passes, and the entry points.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/logits.h"

namespace ppo_fast {

enum class KlKind : int { kK1 = 0, kK2 = 1, kK3 = 2, kAbs = 3 };

// [sequences, tokens] with contiguous rows `row_stride` elements apart, or packed; a null address: not given.
struct TokenRows {
  const void* data;
  DType dtype;
  std::int64_t row_stride;
};

// Numbers of a sequence are in the dtype of the arithmetic, float or double; null: not given.
struct ExperienceIn {
  std::int64_t sequences;
  std::int64_t tokens;             // columns of a padded tensor, or all tokens of a packed one
  const std::int64_t* cu_seqlens;  // [sequences + 1] where packed, else null
  DType compute;                   // kFloat32 or kFloat64
  TokenRows logprobs;
  TokenRows ref_logprobs;
  TokenRows token_rewards;
  TokenRows values;
  TokenRows mask;                   // bytes, nonzero = the token counts; its dtype is not read
  const void* scores;               // [sequences]
  const std::int64_t* score_index;  // [sequences], null: the last counted slot
  const void* bootstrap;            // [sequences], null: 0
  const void* gamma;                // [sequences], null: the one below
  const void* lam;
  double kl_coef;
  double clip_score;  // infinity for none
  double all_gamma;
  double all_lam;
  KlKind kind;
  bool carry;  // a masked slot between counted ones is cut out; else it is a step with reward 0 and value 0
};

// Count, mean and sum of squares about the mean of one sequence's advantages.
struct Moments {
  double count;
  double mean;
  double squares;
};

constexpr double kWhitenEps = 1e-8;  // inside the square root, so that a batch of equal values whitens to 0

// Of two parts as of one, by Chan, Golub and LeVeque 1983.
inline Moments merged(const Moments& whole, const Moments& part) {
  if (part.count == 0.0) return whole;
  if (whole.count == 0.0) return part;
  const double all = whole.count + part.count;
  const double gap = part.mean - whole.mean;
  const double between = gap * gap * (whole.count * part.count / all);
  // An infinite mean stays so: its gap to the next part is infinite as well, and they would cancel into NaN.
  const double mean = std::isfinite(gap) ? whole.mean + gap * (part.count / all) : whole.mean + part.mean;
  return {all, mean, whole.squares + part.squares + between};
}

enum class Whiten : int { kNo = 0, kBiased = 1, kUnbiased = 2 };

// x -> (x - mean) * scale.
struct Affine {
  double mean;
  double scale;
};

// Shaped as the mask, contiguous, in the dtype of the arithmetic; null: not wanted.
struct ExperienceOut {
  void* rewards;
  void* kl;
  void* advantages;
  void* returns;
  Moments* moments;  // [sequences]
};

// Flat: the estimate of every element in the dtype of the arithmetic, or from `grad` (typed so) the gradient of the
// log-probabilities in their dtype.
struct KlIn {
  std::int64_t size;
  DType compute;
  TokenRows logprobs;
  TokenRows ref_logprobs;
  const void* grad;
  void* out;
  double input_clamp;  // infinity for none
  double output_clamp;
  KlKind kind;
};

// Gradients of the advantages and returns to those of rewards, values and bootstrap values; all contiguous, in the dtype
// of the arithmetic.
struct GaeGradient {
  std::int64_t sequences;
  std::int64_t tokens;
  const std::int64_t* cu_seqlens;  // null: padded
  DType compute;
  const std::uint8_t* mask;
  const void* grad_advantages;
  const void* grad_returns;
  void* grad_rewards;
  void* grad_values;
  void* grad_bootstrap;  // [sequences]
  const void* gamma;     // [sequences], null: the one below
  const void* lam;
  double all_gamma;
  double all_lam;
  bool carry;
};

void gae_backward(const GaeGradient& in, RunOn on);

void kl_estimate(const KlIn& in, RunOn on);

// With `whiten` the advantages are whitened by the moments of all of them, and out.moments is not written.
void experience_forward(const ExperienceIn& in, const ExperienceOut& out, Whiten whiten, RunOn on);

// x <- (x - mean) / sqrt(var + 1e-8) where the mask counts, by the moments of all parts; x float or double, 0 elsewhere.
void whiten_by_parts(void* x, const std::uint8_t* mask, std::int64_t size, DType compute, const Moments* parts,
                     std::int64_t count, bool unbiased, RunOn on);

// In the order of the parts.
Moments merge_parts(const Moments* parts, std::int64_t count);

}  // namespace ppo_fast
