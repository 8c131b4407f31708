// One row of logits in numbers: its online sums, what the clipped loss makes of them, its gradient. The twin of
// kernels/rows.py and kernels/surrogate.py, with exponents in base 2: y = (x - top) log2(e) / T in place of d.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/device.cuh"

namespace ppo_fast::cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kInfinity = HUGE_VALF;
constexpr float kLargestExponent = 87.72283905206835f;  // exp stays finite up to one below the log of the largest float

// top = max x, total = sum 2^y, weighted = sum 2^y y.
struct RowSums {
  float top;
  float total;
  float weighted;
};

PPO_FAST_DEVICE RowSums no_sums() { return {-kInfinity, 0.0f, 0.0f}; }

// y, held at -1000, where 2^y is 0 already, so that a logit of -inf gives 0 * y = 0; NaN stays.
PPO_FAST_DEVICE float depth(float x, float top, float scale) { return max_or_nan((x - top) * scale, -1000.0f); }

// While every logit so far is -inf, measure from 0: they then weigh nothing instead of being inf - inf.
PPO_FAST_DEVICE float origin_of(float top) { return top == -kInfinity ? 0.0f : top; }

// The same sums measured from another maximum: with s = y of the old one, weighted becomes 2^s (weighted + s total).
PPO_FAST_DEVICE RowSums moved(const RowSums& sums, float top, float scale) {
  const float step = depth(sums.top, origin_of(top), scale);
  const float factor = exp2_fast(step);
  return {top, factor * sums.total, factor * fmaf(step, sums.total, sums.weighted)};
}

template <int kCount>
PPO_FAST_DEVICE void take(RowSums& sums, const float (&x)[kCount], float scale) {
  float top = sums.top;
#pragma unroll
  for (int i = 0; i < kCount; ++i) top = fmaxf(top, x[i]);
  if (top > sums.top) sums = moved(sums, top, scale);
  const float origin = origin_of(top);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float y = depth(x[i], origin, scale);
    const float e = exp2_fast(y);
    sums.total += e;
    sums.weighted = fmaf(e, y, sums.weighted);
  }
}

// Of every lane's sums, in lane 0.
PPO_FAST_DEVICE RowSums sums_of_warp(RowSums sums, float scale) {
  float top = sums.top;
#pragma unroll
  for (int gap = 16; gap > 0; gap /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, gap));
  sums = moved(sums, top, scale);
#pragma unroll
  for (int gap = 16; gap > 0; gap /= 2) {
    sums.total += __shfl_down_sync(kAllLanes, sums.total, gap);
    sums.weighted += __shfl_down_sync(kAllLanes, sums.weighted, gap);
  }
  return sums;
}

struct Surrogate {
  float low;
  float high;
  float dual_clip;  // infinity for none, as the clamp
  float clamp;
};

PPO_FAST_DEVICE float exp_fast(float x) { return exp2_fast(x * kLog2E); }

PPO_FAST_DEVICE float held(float x, float bound) { return x > bound ? bound : x < -bound ? -bound : x; }

// d term / d logprob of a counted token; `surrogate` of kernels/surrogate.py says what term is.
PPO_FAST_DEVICE float surrogate_slope(float log_ratio, float advantage, const Surrogate& s) {
  const float bounded = held(log_ratio, s.clamp);
  // Where another branch bounds the term the ratio may overflow harmlessly: held finite, else inf * 0 follows.
  const float bounded_above = s.dual_clip < kInfinity ? -kInfinity : 0.0f;
  const bool overflows = advantage > bounded_above && bounded > kLargestExponent;
  const float ratio = exp_fast(advantage != 0.0f ? (overflows ? kLargestExponent : bounded) : 0.0f);
  const float plain = -advantage * ratio;
  const float clipped = -advantage * (ratio < s.low ? s.low : ratio > s.high ? s.high : ratio);
  const bool is_clipped = clipped > plain;
  const float term = is_clipped ? clipped : plain;

  const bool inside = ratio >= s.low && ratio <= s.high;
  const float of_plain = is_clipped ? 0.0f : plain == clipped ? 0.5f : 1.0f;
  float passes = of_plain + (inside ? 1.0f - of_plain : 0.0f);
  const float cap = advantage < 0.0f ? -s.dual_clip * advantage : kInfinity;
  passes = term > cap ? 0.0f : term == cap ? 0.5f * passes : passes;
  if (overflows || log_ratio > s.clamp || log_ratio < -s.clamp) passes = 0.0f;
  // A zero advantage has no slope, also where the term is 0 * inf; NaN must not hide behind a zero share.
  return passes == 0.0f && plain == plain ? 0.0f : plain * passes;
}

// What stands beside a row's logits; `weight` is d loss / d term.
struct RowInputs {
  float weight;
  float inverse_temperature;
  float old_logprob;
  float advantage;
  float entropy_coef;
  Surrogate surrogate;
};

// dx_j = (p_j (a + b d_j) + c [j = label]) / T with d = y ln 2.
struct RowResult {
  float logprob;
  float entropy;
  float top;
  float inverse_total;
  float a;
  float b;
  float c;
};

PPO_FAST_DEVICE RowResult row_result(const RowSums& sums, float target, bool label_in_range, const RowInputs& in) {
  const float log_total = logf(sums.total);
  const float mean_distance = sums.weighted * kLn2 / sums.total;
  RowResult row;
  row.logprob = label_in_range ? (target - sums.top) * in.inverse_temperature - log_total : NAN;
  row.entropy = log_total - mean_distance;
  row.top = sums.top;
  row.inverse_total = 1.0f / sums.total;
  row.c = in.weight * surrogate_slope(row.logprob - in.old_logprob, in.advantage, in.surrogate);
  row.b = in.weight * in.entropy_coef;
  row.a = -row.c - row.b * mean_distance;
  return row;
}

// The gradient with everything that is the same for all columns multiplied out.
struct RowGradient {
  bool active;  // else it is 0, and the logits are not read again
  float top;
  float scale;
  float constant;
  float slope;
  float at_label;
};

PPO_FAST_DEVICE RowGradient row_gradient(const RowResult& row, float target, float inverse_temperature) {
  const float scale = inverse_temperature * kLog2E;
  const float share = row.inverse_total * inverse_temperature;
  const float y = depth(target, row.top, scale);
  const float p = exp2_fast(y) * row.inverse_total;
  // The target's term in one go: p - 1 would cancel in a p that has been rounded to the logits' dtype.
  const float at_label = fmaf(p, fmaf(row.b, y * kLn2, row.a), row.c) * inverse_temperature;
  return {row.b != 0.0f || row.c != 0.0f, row.top, scale, row.a * share, row.b * kLn2 * share, at_label};
}

// Written as these very operations, so that a column has the same bits wherever its row lies.
PPO_FAST_DEVICE float gradient_of(float x, const RowGradient& row) {
  const float y = depth(x, row.top, row.scale);
  return exp2_fast(y) * fmaf(row.slope, y, row.constant);
}

}  // namespace ppo_fast::cuda
