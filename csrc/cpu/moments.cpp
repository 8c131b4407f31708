// The masked moments on a CPU: one body (masked_moments.h) for every instruction set, chunks of columns over threads.
#include "cpu/moments.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/halves.h"
#include "cpu/threads.h"

namespace ppo_fast {

constexpr std::int64_t kAlong = 1 << 13;  // numbers of a chunk of one column
constexpr std::int64_t kAcross = 128;     // and of one of neighbouring columns
constexpr std::int64_t kColumns = 512;    // at most so many neighbours: a tile

// `rows` numbers of each of `columns` neighbouring columns, the first of all of them at `first` in memory.
struct Chunk {
  std::int64_t column;
  std::int64_t number;  // of the chunks of its columns
  std::int64_t first;
  std::int64_t rows;
  std::int64_t columns;
};

// How columns are cut: by their shape alone.
struct Cut {
  std::int64_t length;
  std::int64_t inner;
  std::int64_t height;
  std::int64_t chunks;  // of a column
  std::int64_t groups;  // of neighbouring columns
  std::int64_t all;

  explicit Cut(const MaskedColumns& in)
      : length(in.length),
        inner(in.inner),
        height(in.inner == 1 ? kAlong : kAcross),
        chunks(std::max<std::int64_t>(1, (in.length + height - 1) / height)),
        groups((in.inner + kColumns - 1) / kColumns),
        all(in.outer * groups * chunks) {}

  Chunk chunk(std::int64_t i) const {
    const std::int64_t number = i % chunks;
    const std::int64_t group = i / chunks % groups;
    const std::int64_t outer = i / chunks / groups;
    const std::int64_t start = number * height;
    return {outer * inner + group * kColumns, number, (outer * length + start) * inner + group * kColumns,
            std::min(height, length - start), std::min(kColumns, inner - group * kColumns)};
  }

  std::int64_t size() const { return std::min(height, length) * std::min(kColumns, inner); }
};

struct GradientSums {
  double grads;
  double products;  // with x - mean
};

struct NormalGradient {
  double mean;
  double scale;
  double mean_grad;
  double slope;
  bool keep_mean;
};

// What divides a sum of squares.
inline double freedom_of(const Moments& whole, bool unbiased) { return std::max(1.0, whole.count - (unbiased ? 1.0 : 0.0)); }

}  // namespace ppo_fast

#define PPO_FAST_BODY "masked_moments.h"
#include "cpu/every_isa.h"

namespace ppo_fast {
namespace {

struct MomentOps {
  void (*moments[2])(const MaskedColumns&, const Cut&, Moments*, std::int64_t, std::int64_t);  // float, double
  void (*gradients[2])(const MaskedColumns&, const Cut&, Moment, const Moments*, const void*, void*, std::int64_t,
                       std::int64_t);
  void (*normalize[2])(const MaskedColumns&, Affine, bool, void*, std::int64_t, std::int64_t);
  GradientSums (*gradient_sums[2])(const MaskedColumns&, const void*, double, std::int64_t, std::int64_t);
  void (*normalize_gradient[2])(const MaskedColumns&, const NormalGradient&, const void*, void*, std::int64_t,
                                std::int64_t);
};

#define PPO_FAST_OPS(isa)                                                                   \
  MomentOps {                                                                               \
    {isa::moments::some_moments<float>, isa::moments::some_moments<double>},                \
        {isa::moments::some_gradients<float>, isa::moments::some_gradients<double>},        \
        {isa::moments::normalize_some<float>, isa::moments::normalize_some<double>},        \
        {isa::moments::gradient_sums<float>, isa::moments::gradient_sums<double>},          \
        {isa::moments::normalize_gradient<float>, isa::moments::normalize_gradient<double>} \
  }

const MomentOps& ops_of(Isa isa) { PPO_FAST_CHOOSE(MomentOps, isa); }

#undef PPO_FAST_OPS

int of_compute(const MaskedColumns& in) { return in.dtype == DType::kFloat64 ? 1 : 0; }

void put(const MaskedColumns& in, void* out, std::int64_t at, double x) {
  if (in.dtype == DType::kFloat64) {
    static_cast<double*>(out)[at] = x;
  } else {
    static_cast<float*>(out)[at] = static_cast<float>(x);
  }
}

// By a variance of the arithmetic's dtype: one that overflows it is infinite, and all is 0.
Affine normal_of(const MaskedColumns& in, const Moments& whole) {
  double variance = whole.squares / freedom_of(whole, in.unbiased);
  if (in.dtype != DType::kFloat64) variance = static_cast<double>(static_cast<float>(variance));
  return {whole.mean, 1.0 / std::sqrt(variance + kWhitenEps)};
}

}  // namespace

void masked_moment(const MaskedColumns& in, Moment moment, void* result, Moments* whole, RunOn on) {
  const Cut cut(in);
  const std::int64_t columns = in.outer * in.inner;
  std::vector<Moments> several(cut.chunks == 1 ? 0 : columns * cut.chunks);
  Moments* parts = cut.chunks == 1 ? whole : several.data();
  const auto some = ops_of(on.isa).moments[of_compute(in)];
  parallel_rows(cut.all, cut.size(), on.threads,
                [&](std::int64_t begin, std::int64_t end) { some(in, cut, parts, begin, end); });
  for (std::int64_t c = 0; c < columns; ++c) {
    if (cut.chunks > 1) whole[c] = merge_parts(parts + c * cut.chunks, cut.chunks);
    put(in, result, c, moment == Moment::kMean ? whole[c].mean : whole[c].squares / freedom_of(whole[c], in.unbiased));
  }
}

void masked_moment_backward(const MaskedColumns& in, Moment moment, const Moments* whole, const void* grad, void* grad_x,
                            RunOn on) {
  const Cut cut(in);
  const auto some = ops_of(on.isa).gradients[of_compute(in)];
  parallel_rows(cut.all, cut.size(), on.threads, [&](std::int64_t begin, std::int64_t end) {
    some(in, cut, moment, whole, grad, grad_x, begin, end);
  });
}

void masked_normalize(const MaskedColumns& in, bool keep_mean, void* out, Moments* whole, RunOn on) {
  const MomentOps& ops = ops_of(on.isa);
  const int compute = of_compute(in);
  const Cut cut(in);
  std::vector<Moments> parts(cut.chunks);
  Affine affine{};
  parallel_sweeps(
      cut.chunks, cut.size(), on.threads,
      [&](std::int64_t begin, std::int64_t end) { ops.moments[compute](in, cut, parts.data(), begin, end); },
      [&] {
        *whole = merge_parts(parts.data(), cut.chunks);
        affine = normal_of(in, *whole);
      },
      [&](std::int64_t begin, std::int64_t end) {
        ops.normalize[compute](in, affine, keep_mean, out, begin * kAlong, std::min(in.length, end * kAlong));
      });
}

void masked_normalize_backward(const MaskedColumns& in, bool keep_mean, const Moments* whole, const void* grad,
                               void* grad_x, RunOn on) {
  const MomentOps& ops = ops_of(on.isa);
  const int compute = of_compute(in);
  const Cut cut(in);
  std::vector<GradientSums> sums(cut.chunks);
  const Affine affine = normal_of(in, *whole);
  NormalGradient gradient{affine.mean, affine.scale, 0.0, 0.0, keep_mean};
  parallel_sweeps(
      cut.chunks, cut.size(), on.threads,
      [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t c = begin; c < end; ++c) {
          const std::int64_t last = std::min(in.length, (c + 1) * kAlong);
          sums[c] = ops.gradient_sums[compute](in, grad, affine.mean, c * kAlong, last);
        }
      },
      [&] {
        GradientSums all{0.0, 0.0};
        for (const GradientSums& own : sums) all = {all.grads + own.grads, all.products + own.products};
        gradient.mean_grad = all.grads / std::max(1.0, whole->count);
        gradient.slope = affine.scale * affine.scale * all.products / freedom_of(*whole, in.unbiased);
      },
      [&](std::int64_t begin, std::int64_t end) {
        ops.normalize_gradient[compute](in, gradient, grad, grad_x, begin * kAlong, std::min(in.length, end * kAlong));
      });
}

}  // namespace ppo_fast
