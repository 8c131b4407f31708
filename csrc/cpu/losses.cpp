// The losses over tokens on a CPU: one body (token_loss.h) for every instruction set, sequences over threads.
#include "cpu/losses.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/halves.h"
#include "cpu/threads.h"

namespace ppo_fast {

// Of one sequence.
struct PolicySums {
  double terms;
  double clipped;
  double k3;
  double ratios;
  double highest_ratio;
  double entropy;
  double kl;
  std::int64_t length;
};

struct ValueSums {
  double terms;
  double clipped;
  double values;
  double returns;
  Moments return_moments;
  Moments error_moments;
  std::int64_t length;
};

}  // namespace ppo_fast

#define PPO_FAST_BODY "token_loss.h"
#include "cpu/every_isa.h"

namespace ppo_fast {
namespace {

struct LossOps {
  void (*policy_sums[2])(const TokenBatch&, const PolicyTerms&, const PolicyCoefficients&, void*, PolicySums*,
                         std::int64_t, std::int64_t);  // float, double
  void (*policy_gradients[2])(const TokenBatch&, const PolicyCoefficients&, const LossGradient&, std::int64_t,
                              std::int64_t);
  void (*value_sums[2])(const TokenBatch&, double, ValueSums*, std::int64_t, std::int64_t);
  void (*value_gradients[2])(const TokenBatch&, double, const LossGradient&, std::int64_t, std::int64_t);
  void (*weights)(const TokenBatch&, const std::int64_t*, double, double*, std::int64_t, std::int64_t);
};

#define PPO_FAST_OPS(isa)                                                                           \
  LossOps {                                                                                         \
    {isa::losses::some_policy_sums<float>, isa::losses::some_policy_sums<double>},                  \
        {isa::losses::some_policy_gradients<float>, isa::losses::some_policy_gradients<double>},    \
        {isa::losses::some_value_sums<float>, isa::losses::some_value_sums<double>},                \
        {isa::losses::some_value_gradients<float>, isa::losses::some_value_gradients<double>},      \
        isa::losses::some_weights                                                                   \
  }

const LossOps& ops_of(Isa isa) { PPO_FAST_CHOOSE(LossOps, isa); }

#undef PPO_FAST_OPS

int of_compute(DType compute) { return compute == DType::kFloat64 ? 1 : 0; }

template <class Body>
void over_sequences(const TokenBatch& in, RunOn on, const Body& body) {
  const std::int64_t all = in.cu_seqlens != nullptr ? in.tokens : in.sequences * in.tokens;
  parallel_rows(in.sequences, all / std::max<std::int64_t>(1, in.sequences), on.threads, body);
}

struct Counts {
  std::int64_t tokens = 0;
  std::int64_t sequences = 0;  // with a token that counts

  void add(std::int64_t length) {
    tokens += length;
    sequences += length > 0;
  }

  double divisor(Reduction reduction, const double* normalizer) const {
    if (normalizer != nullptr) return *normalizer;
    if (reduction == Reduction::kTokenSum) return 1.0;
    return static_cast<double>(std::max<std::int64_t>(1, reduction == Reduction::kTokenMean ? tokens : sequences));
  }
};

double of_sequence(Reduction reduction, double terms, std::int64_t length) {
  return reduction == Reduction::kSeqMeanTokenMean ? terms / static_cast<double>(std::max<std::int64_t>(1, length)) : terms;
}

void put(DType compute, void* out, std::int64_t at, double x) {
  if (compute == DType::kFloat64) {
    static_cast<double*>(out)[at] = x;
  } else {
    static_cast<float*>(out)[at] = static_cast<float>(x);
  }
}

// The loss, from the sum of its terms, and the means over the tokens that count.
void finish(const TokenBatch& in, const Counts& counts, double terms, std::initializer_list<double> sums,
            const double* normalizer, const LossOut& out) {
  *out.divisor = counts.divisor(in.reduction, normalizer);
  put(in.compute, out.loss, 0, terms / *out.divisor);
  const double tokens = static_cast<double>(std::max<std::int64_t>(1, counts.tokens));
  std::int64_t i = 0;
  for (double sum : sums) put(in.compute, out.stats, i++, sum / tokens);
}

}  // namespace

void clipped_policy_forward(const TokenBatch& in, const PolicyTerms& terms, const PolicyCoefficients& coefficients,
                            const double* normalizer, const LossOut& out, RunOn on) {
  std::vector<PolicySums> sums(in.sequences);
  const auto some = ops_of(on.isa).policy_sums[of_compute(in.compute)];
  over_sequences(in, on, [&](std::int64_t begin, std::int64_t end) {
    some(in, terms, coefficients, out.kept, sums.data(), begin, end);
  });
  Counts counts;
  PolicySums all{};
  for (std::int64_t s = 0; s < in.sequences; ++s) {
    const PolicySums& own = sums[s];
    counts.add(out.lengths[s] = own.length);
    all.terms += of_sequence(in.reduction, own.terms, own.length);
    all.clipped += own.clipped;
    all.k3 += own.k3;
    all.ratios += own.ratios;
    all.highest_ratio = std::max(all.highest_ratio, own.highest_ratio);
    all.entropy += own.entropy;
    all.kl += own.kl;
  }
  finish(in, counts, all.terms, {all.clipped, all.k3, all.ratios, 0.0, all.entropy, all.kl}, normalizer, out);
  // A maximum drops a NaN, a sum keeps it.
  put(in.compute, out.stats, 3, std::isnan(all.ratios) ? all.ratios : all.highest_ratio);
}

void clipped_policy_backward(const TokenBatch& in, const PolicyCoefficients& coefficients, const LossGradient& gradient,
                             RunOn on) {
  const auto some = ops_of(on.isa).policy_gradients[of_compute(in.compute)];
  over_sequences(in, on, [&](std::int64_t begin, std::int64_t end) { some(in, coefficients, gradient, begin, end); });
}

void clipped_value_forward(const TokenBatch& in, double clip, const double* normalizer, const LossOut& out, RunOn on) {
  std::vector<ValueSums> sums(in.sequences);
  const auto some = ops_of(on.isa).value_sums[of_compute(in.compute)];
  over_sequences(in, on, [&](std::int64_t begin, std::int64_t end) { some(in, clip, sums.data(), begin, end); });
  Counts counts;
  ValueSums all{};
  for (std::int64_t s = 0; s < in.sequences; ++s) {
    const ValueSums& own = sums[s];
    counts.add(out.lengths[s] = own.length);
    all.terms += of_sequence(in.reduction, own.terms, own.length);
    all.clipped += own.clipped;
    all.values += own.values;
    all.returns += own.returns;
    all.return_moments = merged(all.return_moments, own.return_moments);
    all.error_moments = merged(all.error_moments, own.error_moments);
  }
  finish(in, counts, 0.5 * all.terms, {all.clipped, 0.0, all.values, all.returns}, normalizer, out);
  const double spread = all.return_moments.squares;
  put(in.compute, out.stats, 1, spread > 0.0 ? 1.0 - all.error_moments.squares / spread : 0.0);
}

void clipped_value_backward(const TokenBatch& in, double clip, const LossGradient& gradient, RunOn on) {
  const auto some = ops_of(on.isa).value_gradients[of_compute(in.compute)];
  over_sequences(in, on, [&](std::int64_t begin, std::int64_t end) { some(in, clip, gradient, begin, end); });
}

void token_weights(const TokenBatch& in, const double* normalizer, double* weights, RunOn on) {
  std::vector<std::int64_t> lengths(in.sequences);
  Counts counts;
  const auto* mask = static_cast<const std::uint8_t*>(in.mask.data);
  for (std::int64_t s = 0; s < in.sequences; ++s) {
    const std::uint8_t* row = mask + s * in.mask.row_stride;
    lengths[s] = in.tokens - std::count(row, row + in.tokens, 0);
    counts.add(lengths[s]);
  }
  const double divisor = counts.divisor(in.reduction, normalizer);
  const auto some = ops_of(on.isa).weights;
  over_sequences(in, on, [&](std::int64_t begin, std::int64_t end) {
    some(in, lengths.data(), divisor, weights, begin, end);
  });
}

}  // namespace ppo_fast
