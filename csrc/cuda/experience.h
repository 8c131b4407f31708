// The experience stage over sequences of tokens: what a caller passes, and the entry points.
#pragma once

#include <cstdint>

#include "cpu/experience.h"

namespace ppo_fast::cuda {

// Addresses of device memory; null: not given, or not wanted.
struct Experience {
  std::int64_t sequences;
  std::int64_t tokens;     // columns of a padded tensor
  const void* cu_seqlens;  // [sequences + 1] where packed
  bool cu_seqlens_64;      // int64, else int32
  TokenRows logprobs;
  TokenRows ref_logprobs;
  TokenRows token_rewards;
  TokenRows values;
  TokenRows mask;  // bytes, nonzero = the token counts; its dtype is not read
  const float* scores;
  const std::int64_t* score_index;  // null: the last counted slot is paid
  const float* bootstrap;           // [sequences], as gamma and lam; null: the one for all, a coefficient
  const float* gamma;
  const float* lam;
  const float* coefficients;  // kl_coef, clip of the score, gamma, lam, bootstrap
  float* rewards;             // shaped as the mask, contiguous, as kl, advantages and returns
  float* kl;
  float* advantages;
  float* returns;
  float* parts;  // [4, sequences]: count, pivot, mean less the pivot, sum of squares about the mean
  KlKind kind;
  bool carry;  // a masked slot between counted ones is cut out; else it is a step with reward 0 and value 0
};

void experience(const Experience& in, int device, std::uintptr_t stream);

// Each of `groups` parts of `merged` [4, groups] takes in `size` neighbouring ones of `parts` [4, count].
void merge_parts(const float* parts, std::int64_t count, float* merged, std::int64_t groups, std::int64_t size,
                 int device, std::uintptr_t stream);

// x <- (x - mean) / sqrt(var + 1e-8) where the mask counts, 0 elsewhere, by the moments of all parts.
void whiten_by_parts(float* x, const std::uint8_t* mask, std::int64_t size, const float* parts, std::int64_t count,
                     bool unbiased, int device, std::uintptr_t stream);

}  // namespace ppo_fast::cuda
