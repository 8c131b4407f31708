// The losses over sequences of tokens: what a caller passes, and the entry points.
//
// Sums are in double, those of a sequence and then of all sequences in their order: neither the number of threads nor what is
// padded behind a sequence changes a bit.
#pragma once

#include <cstdint>

#include "cpu/experience.h"

namespace ppo_fast {

enum class Reduction : int { kTokenMean = 0, kTokenSum = 1, kSeqMeanTokenSum = 2, kSeqMeanTokenMean = 3 };

// Both losses compare what a model says now with what it said when it sampled.
struct TokenBatch {
  std::int64_t sequences;
  std::int64_t tokens;             // columns of a padded tensor, or all tokens of a packed one
  const std::int64_t* cu_seqlens;  // [sequences + 1] where packed, else null
  DType compute;                   // kFloat32 or kFloat64
  TokenRows mask;                  // bytes, nonzero = the token counts; its dtype is not read
  TokenRows now;                   // log-probabilities or values
  TokenRows old;
  TokenRows target;  // advantages or returns
  Reduction reduction;
};

struct PolicyCoefficients {
  double low;  // of the ratio
  double high;
  double dual_clip;        // infinity for none
  double log_ratio_clamp;  // infinity for none
  double entropy_coef;
  double kl_coef;
};

// What stands in the loss beside the clipped term, token by token; a null address: not given.
struct PolicyTerms {
  TokenRows entropy;
  TokenRows kl;
};

// The first three in the dtype of the arithmetic; the last two are what the gradient needs.
struct LossOut {
  void* kept;  // log-probabilities, 0 where masked, shaped as the mask and contiguous; not of the value loss
  void* loss;
  void* stats;
  std::int64_t* lengths;  // [sequences], tokens that count
  double* divisor;        // the last denominator of the reduction
};

// From the gradient of the loss to that of `now`, in its dtype, shaped as the mask and contiguous.
struct LossGradient {
  double grad_loss;
  const std::int64_t* lengths;
  double divisor;
  void* grad_now;
};

// A null normalizer: the reduction's own denominator. stats: clip_fraction, approx_kl, ratio_mean, ratio_max, entropy, kl.
void clipped_policy_forward(const TokenBatch& in, const PolicyTerms& terms, const PolicyCoefficients& coefficients,
                            const double* normalizer, const LossOut& out, RunOn on);
void clipped_policy_backward(const TokenBatch& in, const PolicyCoefficients& coefficients, const LossGradient& gradient,
                             RunOn on);

// `clip` is infinity for none. stats: clip_fraction, explained_variance, value_mean, return_mean.
void clipped_value_forward(const TokenBatch& in, double clip, const double* normalizer, const LossOut& out, RunOn on);
void clipped_value_backward(const TokenBatch& in, double clip, const LossGradient& gradient, RunOn on);

// d loss / d term of each token of a padded batch, contiguous, -1 where the mask is 0; only the mask is read.
void token_weights(const TokenBatch& in, const double* normalizer, double* weights, RunOn on);

}  // namespace ppo_fast
