// Every native entry point over small and odd shapes, on buffers of exactly the size it may touch: built with a sanitizer,
// a read or write beside them, an undefined operation or a race between threads ends the run. `make sanitize` builds it
// with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/experience.h"
#include "cpu/halves.h"
#include "cpu/logits.h"
#include "cpu/losses.h"
#include "cpu/memory.h"
#include "cpu/moments.h"
#include "cpu/policy.h"

using namespace ppo_fast;

namespace {

std::mt19937 generator(0);

double normal() { return std::normal_distribution<double>(0.0, 3.0)(generator); }

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
  using Number = float;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFloat64;
  using Number = double;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::kBFloat16;
  using Number = float;
};
template <>
struct DTypeOf<Float16> {
  static constexpr DType value = DType::kFloat16;
  using Number = float;
};

template <class T>
std::vector<T> normals(std::int64_t n) {
  std::vector<T> x(n);
  for (T& v : x) v = narrow<T>(normal());
  return x;
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}

// Rows of logits: [outer][inner + 1][vocab] without the last of each inner, as logits[:, :-1]; some columns at -inf.
template <class T>
void rows(std::int64_t outer, std::int64_t inner, std::int64_t vocab, RunOn on) {
  using C = typename DTypeOf<T>::Number;
  constexpr DType dtype = DTypeOf<T>::value;
  const std::int64_t count = outer * inner;
  const std::int64_t stored = count == 0 ? 0 : ((outer - 1) * (inner + 1) + inner) * vocab;
  std::vector<T> logits = normals<T>(stored), ref = normals<T>(count * vocab), out(count * vocab), of_ref(count * vocab);
  for (std::int64_t i = 0; i < stored && vocab > 2; i += 7) logits[i] = narrow<T>(-HUGE_VAL);
  std::vector<std::int64_t> labels(count);
  for (std::int64_t i = 0; i < count; ++i) labels[i] = i % 2 == 0 ? vocab - 1 : 0;
  std::vector<double> temperature(count, 0.7);
  const RowGrid grid{logits.data(),     dtype, count, vocab, std::max<std::int64_t>(1, inner), (inner + 1) * vocab, vocab,
                     labels.data(), temperature.data(), 1};
  const RefGrid beside{ref.data(), dtype, 1, vocab, 0};

  std::vector<C> logprobs(count), entropy(count), kl(count), down = normals<C>(count);
  std::vector<RowStats> stats(count);
  logprob_forward(grid, {logprobs.data(), entropy.data(), stats.data()}, on);
  logprob_backward(grid, {stats.data(), down.data(), nullptr, out.data()}, on);
  logprob_forward(grid, {logprobs.data(), nullptr, stats.data()}, on);
  logprob_backward(grid, {stats.data(), nullptr, down.data(), out.data()}, on);
  std::vector<PolicyState> state(count);
  kl_forward(grid, beside, kl.data(), state.data(), on);
  kl_backward(grid, beside, state.data(), down.data(), out.data(), of_ref.data(), on);

  std::vector<C> old = normals<C>(count), advantages = normals<C>(count), weights(count);
  for (std::int64_t i = 0; i < count; ++i) weights[i] = i % 3 == 2 ? -C(HUGE_VAL) : C(0.25);
  for (const RefGrid& reference : {beside, RefGrid{nullptr, dtype, 1, 0, 0}}) {
    const PolicyIn in{grid, reference, old.data(), advantages.data(), weights.data(), {0.8, 1.2, 3.0, 20.0, 0.01, 0.1}};
    C* of_kl = reference.logits == nullptr ? nullptr : kl.data();
    policy_forward(in, {logprobs.data(), entropy.data(), of_kl, state.data()}, on);
    policy_backward(grid, reference, state.data(), 2.0, out.data(), on);
    std::vector<T> kept = logits;
    policy_forward(in, {logprobs.data(), entropy.data(), of_kl, nullptr}, on);
    scale_rows(grid, 2.0, on);
    logits = kept;
    for (C x : logprobs) expect(!std::isnan(x), "a log-probability is NaN");
  }
}

// Sequences of tokens, padded and packed, with holes; every input of a length of its own.
template <class T>
void sequences(const std::vector<std::int64_t>& lengths, bool packed, bool carry, KlKind kind, Whiten whiten, RunOn on) {
  using C = typename DTypeOf<T>::Number;
  constexpr DType dtype = DTypeOf<T>::value;
  const std::int64_t count = static_cast<std::int64_t>(lengths.size());
  std::vector<std::int64_t> starts(1, 0);
  std::int64_t width = 0;
  for (std::int64_t n : lengths) {
    starts.push_back(starts.back() + n);
    width = std::max(width, n);
  }
  const std::int64_t total = packed ? starts.back() : count * width;
  std::vector<T> logprobs = normals<T>(total), ref = normals<T>(total), dense = normals<T>(total), values = normals<T>(total);
  std::vector<std::uint8_t> mask(total);
  for (std::int64_t s = 0; s < count; ++s) {
    for (std::int64_t t = 0; t < lengths[s]; ++t) mask[(packed ? starts[s] : s * width) + t] = t % 11 != 5;
  }
  std::vector<C> scores = normals<C>(count), bootstrap = normals<C>(count), gamma(count, C(0.99)), lam(count, C(0.95));
  std::vector<C> out[4];
  for (auto& x : out) x.resize(total);
  std::vector<Moments> moments(count);
  const auto tokens = [&](const std::vector<T>& x) { return TokenRows{x.data(), dtype, width}; };
  const DType compute = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const ExperienceIn in{count, packed ? total : width, packed ? starts.data() : nullptr, compute, tokens(logprobs),
                        tokens(ref), tokens(dense), tokens(values), {mask.data(), dtype, width}, scores.data(), nullptr,
                        bootstrap.data(), gamma.data(), lam.data(), 0.1, 5.0, 1.0, 1.0, kind, carry};
  experience_forward(in, {out[0].data(), out[1].data(), out[2].data(), out[3].data(), moments.data()}, whiten, on);
  for (C x : out[2]) expect(!std::isnan(x), "an advantage is NaN");
  if (whiten == Whiten::kNo) whiten_by_parts(out[2].data(), mask.data(), total, compute, moments.data(), count, true, on);
  std::vector<C> of_rewards(total), of_values(total), of_bootstrap(count);
  gae_backward({count, packed ? total : width, packed ? starts.data() : nullptr, compute, mask.data(), out[2].data(),
                out[3].data(), of_rewards.data(), of_values.data(), of_bootstrap.data(), gamma.data(), nullptr, 1.0, 0.9,
                carry},
               on);
  std::vector<C> estimate(total);
  kl_estimate({total, compute, tokens(logprobs), tokens(ref), nullptr, estimate.data(), 20.0, 10.0, kind}, on);
  std::vector<T> gradient(total);
  kl_estimate({total, compute, tokens(logprobs), tokens(ref), estimate.data(), gradient.data(), 20.0, 10.0, kind}, on);
}

// The clipped losses of sequences, padded and packed, under every reduction, with and without a normalizer of the caller's.
template <class T>
void losses(const std::vector<std::int64_t>& lengths, bool packed, RunOn on) {
  using C = typename DTypeOf<T>::Number;
  constexpr DType dtype = DTypeOf<T>::value;
  const std::int64_t count = static_cast<std::int64_t>(lengths.size());
  std::vector<std::int64_t> starts(1, 0);
  std::int64_t width = 0;
  for (std::int64_t n : lengths) {
    starts.push_back(starts.back() + n);
    width = std::max(width, n);
  }
  const std::int64_t total = packed ? starts.back() : count * width;
  const std::vector<T> now = normals<T>(total), old = normals<T>(total), target = normals<T>(total);
  const std::vector<T> entropy = normals<T>(total), kl = normals<T>(total);
  std::vector<std::uint8_t> mask(total);
  for (std::int64_t s = 0; s < count; ++s) {
    for (std::int64_t t = 0; t < lengths[s]; ++t) mask[(packed ? starts[s] : s * width) + t] = t % 11 != 5;
  }
  std::vector<C> kept(total), loss(1), policy_stats(6), value_stats(4);
  std::vector<T> gradient(total);
  std::vector<std::int64_t> counted(count);
  const double normalizer = 3.0;
  double divisor = 0.0;
  const auto tokens = [&](const std::vector<T>& x) { return TokenRows{x.data(), dtype, width}; };
  const DType compute = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const PolicyCoefficients of{0.8, 1.2, 3.0, 20.0, 0.01, 0.1};
  for (int code = 0; code < 4; ++code) {
    const TokenBatch in{count, packed ? total : width, packed ? starts.data() : nullptr, compute, {mask.data(), dtype, width},
                        tokens(now), tokens(old), tokens(target), static_cast<Reduction>(code)};
    const double* given = code % 2 == 0 ? nullptr : &normalizer;
    clipped_policy_forward(in, {tokens(entropy), tokens(kl)}, of, given,
                           {kept.data(), loss.data(), policy_stats.data(), counted.data(), &divisor}, on);
    expect(!std::isnan(loss[0]), "a policy loss is NaN");
    clipped_policy_backward(in, of, {2.0, counted.data(), divisor, gradient.data()}, on);
    clipped_value_forward(in, 0.2, given, {nullptr, loss.data(), value_stats.data(), counted.data(), &divisor}, on);
    expect(!std::isnan(loss[0]), "a value loss is NaN");
    clipped_value_backward(in, 0.2, {2.0, counted.data(), divisor, gradient.data()}, on);
    if (packed) continue;
    std::vector<double> weights(total);
    token_weights(in, given, weights.data(), on);
  }
}

// Masked moments along and across memory, and what is made of one column of them.
template <class T>
void moments(std::int64_t outer, std::int64_t length, std::int64_t inner, RunOn on) {
  using C = typename DTypeOf<T>::Number;
  const std::int64_t size = outer * length * inner, columns = outer * inner;
  const std::vector<T> x = normals<T>(size);
  const std::vector<C> grad = normals<C>(columns), down = normals<C>(size);
  std::vector<std::uint8_t> mask(size);
  for (std::int64_t i = 0; i < size; ++i) mask[i] = i % 7 != 3;
  std::vector<C> result(columns), normalized(size);
  std::vector<T> of_x(size);
  std::vector<Moments> whole(columns);
  for (bool unbiased : {false, true}) {
    const MaskedColumns in{x.data(), mask.data(), DTypeOf<T>::value, outer, length, inner, unbiased};
    for (Moment moment : {Moment::kMean, Moment::kVariance}) {
      masked_moment(in, moment, result.data(), whole.data(), on);
      masked_moment_backward(in, moment, whole.data(), grad.data(), of_x.data(), on);
    }
    if (columns != 1) continue;
    for (bool keep_mean : {false, true}) {
      masked_normalize(in, keep_mean, normalized.data(), whole.data(), on);
      masked_normalize_backward(in, keep_mean, whole.data(), down.data(), of_x.data(), on);
    }
  }
}

template <class T>
void everything(RunOn on) {
  for (std::int64_t vocab : {1, 2, 3, 15, 16, 17, 127, 1023, 1025, 5000}) rows<T>(2, 3, vocab, on);
  rows<T>(0, 1, 5, on);
  rows<T>(3, 40, 2049, on);
  for (bool packed : {false, true}) {
    for (int kind = 0; kind < 4; ++kind) {
      const auto whiten = static_cast<Whiten>(kind % 3);
      sequences<T>({0, 1, 15, 16, 17, 0, 513, 600}, packed, kind % 2 == 0, static_cast<KlKind>(kind), whiten, on);
    }
    sequences<T>(std::vector<std::int64_t>(300, 333), packed, true, KlKind::kK1, Whiten::kBiased, on);
    losses<T>({0, 1, 15, 16, 17, 0, 513, 600}, packed, on);
    losses<T>(std::vector<std::int64_t>(300, 333), packed, on);
  }
  for (std::int64_t length : {1, 2, 16, 511, 513, 100003}) moments<T>(1, length, 1, on);
  moments<T>(3, 700, 5, on);
  moments<T>(1, 40, 1031, on);
  moments<T>(200, 513, 1, on);
  moments<T>(2, 0, 3, on);
}

}  // namespace

int main() {
  for (int i = 0; i < 4; ++i) {
    void* block = take_block(5 << 20);
    expect(block != nullptr, "there is memory");
    return_block(block, 5 << 20);
  }
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (!isa_supported(isa)) continue;
    for (int threads : {1, 4}) {
      everything<float>({threads, isa});
      everything<double>({threads, isa});
      everything<BFloat16>({threads, isa});
      everything<Float16>({threads, isa});
    }
  }
  std::puts("every native entry point ran");
}
