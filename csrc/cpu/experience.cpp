// The experience stage on a CPU: one body (sequence.h) for every instruction set, sequences over threads.
#include "cpu/experience.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/halves.h"
#include "cpu/threads.h"

#define PPO_FAST_BODY "sequence.h"
#include "cpu/every_isa.h"

namespace ppo_fast {
namespace {

struct SequenceOps {
  void (*sequences[2])(const ExperienceIn&, const ExperienceOut&, std::int64_t, std::int64_t);  // float, double
  void (*gradients[2])(const GaeGradient&, std::int64_t, std::int64_t);
  void (*estimates[2])(const KlIn&, std::int64_t, std::int64_t);
  void (*whiten[2])(void*, const std::uint8_t*, Affine, std::int64_t, std::int64_t);
  void (*whiten_sequences[2])(const ExperienceIn&, const ExperienceOut&, Affine, std::int64_t, std::int64_t);
};

#define PPO_FAST_OPS(isa)                                             \
  SequenceOps {                                                       \
    {isa::some_sequences<float>, isa::some_sequences<double>},        \
        {isa::some_gradients<float>, isa::some_gradients<double>},    \
        {isa::some_estimates<float>, isa::some_estimates<double>},    \
        {isa::whiten_some<float>, isa::whiten_some<double>},          \
        {isa::whiten_sequences<float>, isa::whiten_sequences<double>} \
  }

const SequenceOps& ops_of(Isa isa) { PPO_FAST_CHOOSE(SequenceOps, isa); }

#undef PPO_FAST_OPS

int of_compute(DType compute) { return compute == DType::kFloat64 ? 1 : 0; }

Affine whitening(const Moments& whole, bool unbiased) {
  const double freedom = std::max(1.0, whole.count - (unbiased ? 1.0 : 0.0));
  return {whole.mean, 1.0 / std::sqrt(whole.squares / freedom + kWhitenEps)};
}

}  // namespace

void gae_backward(const GaeGradient& in, RunOn on) {
  const auto some = ops_of(on.isa).gradients[of_compute(in.compute)];
  const std::int64_t all = in.cu_seqlens != nullptr ? in.tokens : in.sequences * in.tokens;
  parallel_rows(in.sequences, all / std::max<std::int64_t>(1, in.sequences), on.threads,
                [&](std::int64_t begin, std::int64_t end) { some(in, begin, end); });
}

void kl_estimate(const KlIn& in, RunOn on) {
  const auto some = ops_of(on.isa).estimates[of_compute(in.compute)];
  parallel_rows(in.size, 1, on.threads, [&](std::int64_t begin, std::int64_t end) { some(in, begin, end); });
}

Moments merge_parts(const Moments* parts, std::int64_t count) {
  Moments whole{0.0, 0.0, 0.0};
  for (std::int64_t i = 0; i < count; ++i) whole = merged(whole, parts[i]);
  return whole;
}

void experience_forward(const ExperienceIn& in, const ExperienceOut& out, Whiten whiten, RunOn on) {
  const SequenceOps& ops = ops_of(on.isa);
  const int compute = of_compute(in.compute);
  const std::int64_t all = in.cu_seqlens != nullptr ? in.tokens : in.sequences * in.tokens;
  const std::int64_t each = all / std::max<std::int64_t>(1, in.sequences);
  if (whiten == Whiten::kNo) {
    parallel_rows(in.sequences, each, on.threads,
                  [&](std::int64_t begin, std::int64_t end) { ops.sequences[compute](in, out, begin, end); });
    return;
  }
  std::vector<Moments> parts(in.sequences);
  ExperienceOut with_moments = out;
  with_moments.moments = parts.data();
  Affine to_white{};
  parallel_sweeps(
      in.sequences, each, on.threads,
      [&](std::int64_t begin, std::int64_t end) { ops.sequences[compute](in, with_moments, begin, end); },
      [&] { to_white = whitening(merge_parts(parts.data(), in.sequences), whiten == Whiten::kUnbiased); },
      [&](std::int64_t begin, std::int64_t end) { ops.whiten_sequences[compute](in, out, to_white, begin, end); });
}

void whiten_by_parts(void* x, const std::uint8_t* mask, std::int64_t size, DType compute, const Moments* parts,
                     std::int64_t count, bool unbiased, RunOn on) {
  const Affine to_white = whitening(merge_parts(parts, count), unbiased);
  const auto some = ops_of(on.isa).whiten[of_compute(compute)];
  parallel_rows(size, 1, on.threads,
                [&](std::int64_t begin, std::int64_t end) { some(x, mask, to_white, begin, end); });
}

}  // namespace ppo_fast
