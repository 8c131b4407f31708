// The clipped losses of a sequence of tokens: its sums, and its gradient. One body for every instruction set: losses.cpp
// includes it for each, after lanes.h; hence no include guard.
//
// A tile of tokens is copied to where every number that does not count is 0, and is taken from there a register at a time,
// counted from the sequence's first slot: so what is padded behind a sequence changes no bit of it.

#include "cpu/blocks.h"
#include "surrogate.h"

namespace ppo_fast {
namespace PPO_FAST_ISA {
namespace losses {

template <class C>
struct Tile {
  C counted[kTile];  // 1 or 0
  C now[kTile];
  C old[kTile];
  C target[kTile];
};

// The tokens of a sequence up to the last one that counts.
template <class C>
class Tokens {
 public:
  Tokens(const TokenBatch& in, std::int64_t sequence)
      : in_(in),
        sequence_(sequence),
        slots_(span_of(in.cu_seqlens, in.tokens, sequence)),
        mask_(static_cast<const std::uint8_t*>(in.mask.data) + start_of(in.mask)),
        end_(end_of_counted(mask_, slots_.size)) {}

  // Calls body(start, n) for every tile.
  template <class Body>
  void for_tiles(const Body& body) const {
    for (std::int64_t start = 0; start < end_; start += kTile) body(start, end_ - start < kTile ? end_ - start : kTile);
  }

  void take(const TokenRows& rows, std::int64_t start, std::int64_t n, C* out) const {
    take_counted(mask_ + start, rows, start_of(rows) + start, n, out);
  }
  void take(std::int64_t start, std::int64_t n, Tile<C>& tile) const {
    take_mask(mask_ + start, n, tile.counted);
    take(in_.now, start, n, tile.now);
    take(in_.old, start, n, tile.old);
    take(in_.target, start, n, tile.target);
  }

  // Into a contiguous tensor; a slot that does not count is written as 0, and so is all after the last one that does.
  void put(const C* x, std::int64_t start, std::int64_t n, DType dtype, void* out) const {
    narrow_block(x, n, dtype, out, slots_.first + start);
  }
  void clear_the_rest(DType dtype, void* out) const {
    if (end_ == slots_.size) return;
    const std::int64_t bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
    std::memset(static_cast<char*>(out) + (slots_.first + end_) * bytes, 0, (slots_.size - end_) * bytes);
  }

  std::int64_t length() const {
    std::int64_t counted = 0;
    for (std::int64_t i = 0; i < end_; ++i) counted += mask_[i] != 0;
    return counted;
  }

 private:
  std::int64_t start_of(const TokenRows& rows) const {
    return in_.cu_seqlens == nullptr ? sequence_ * rows.row_stride : slots_.first;
  }

  const TokenBatch& in_;
  std::int64_t sequence_;
  Span slots_;
  const std::uint8_t* mask_;
  std::int64_t end_;
};

// d loss / d term of the tokens of a sequence that count.
inline double weight_of(Reduction reduction, double divisor, std::int64_t length) {
  const bool mean = reduction == Reduction::kSeqMeanTokenMean && length > 0;
  return mean ? 1.0 / divisor / static_cast<double>(length) : 1.0 / divisor;
}

// Of a tile: the log ratio, and e^ of it held by its clamp; loops over all of it, which the vectoriser takes.
template <class C>
inline void log_ratios(const Tile<C>& tile, std::int64_t n, const Clip<C>& clip, C* log_ratio, C* exp_held) {
  for (std::int64_t i = 0; i < n; ++i) log_ratio[i] = tile.now[i] - tile.old[i];
  for (std::int64_t i = 0; i < n; ++i) exp_held[i] = exp_any(held(log_ratio[i], clip.log_ratio_clamp));
}

template <class C>
inline std::int64_t whole_registers(std::int64_t n) {
  return (n + Lanes<C>::kWidth - 1) / Lanes<C>::kWidth * Lanes<C>::kWidth;
}

template <class C>
struct PolicyLanes {
  DoubleSum<C> terms, clipped, k3, ratios;
  typename Lanes<C>::Vec highest{};

  void add(const Tile<C>& tile, std::int64_t n, const Clip<C>& clip) {
    using V = typename Lanes<C>::Vec;
    C log_ratio[kTile], exp_held[kTile];
    log_ratios(tile, whole_registers<C>(n), clip, log_ratio, exp_held);
    PolicyLanes own = *this;  // in registers
    for (std::int64_t i = 0; i < n; i += Lanes<C>::kWidth) {
      const V x = load(log_ratio + i), ratio = load(exp_held + i);
      const auto token = clipped_term(x, ratio, load(tile.target + i), clip);
      own.terms.add(token.term);
      own.clipped.add(token.is_clipped);
      own.k3.add(expm1_less_x<C>(held(x, clip.log_ratio_clamp), ratio));
      const V counted = load(tile.counted + i);
      const V counted_ratio = counted > V{} ? ratio : V{};
      own.ratios.add(counted_ratio);
      own.highest = counted_ratio > own.highest ? counted_ratio : own.highest;
    }
    *this = own;
  }

  double top() const {
    C most = 0;
    for (int i = 0; i < Lanes<C>::kWidth; ++i) most = highest[i] > most ? highest[i] : most;
    return static_cast<double>(most);
  }
};

template <class C>
inline double sum_of_tile(const C* x, std::int64_t n) {
  DoubleSum<C> sum;
  for (std::int64_t i = 0; i < n; i += Lanes<C>::kWidth) sum.add(load(x + i));
  return sum.total();
}

// One sequence; where there is no tensor of entropies or KLs, theirs are 0.
template <class C>
PolicySums policy_sums(const TokenBatch& in, const PolicyTerms& terms, const PolicyCoefficients& of, void* kept,
                       std::int64_t sequence) {
  const Tokens<C> tokens(in, sequence);
  const Clip<C> clip(of);
  PolicyLanes<C> lanes;
  double entropy = 0.0, kl = 0.0;
  Tile<C> tile;
  C other[kTile];
  tokens.for_tiles([&](std::int64_t start, std::int64_t n) {
    tokens.take(start, n, tile);
    tokens.put(tile.now, start, n, in.compute, kept);
    lanes.add(tile, n, clip);
    if (terms.entropy.data != nullptr) {
      tokens.take(terms.entropy, start, n, other);
      entropy += sum_of_tile(other, n);
    }
    if (terms.kl.data != nullptr) {
      tokens.take(terms.kl, start, n, other);
      kl += sum_of_tile(other, n);
    }
  });
  tokens.clear_the_rest(in.compute, kept);
  // Without a coefficient, one of them that is not finite does not reach the loss.
  const double of_entropy = of.entropy_coef == 0.0 ? 0.0 : of.entropy_coef * entropy;
  const double of_kl = of.kl_coef == 0.0 ? 0.0 : of.kl_coef * kl;
  return {lanes.terms.total() - of_entropy + of_kl, lanes.clipped.total(), lanes.k3.total(), lanes.ratios.total(),
          lanes.top(), entropy, kl, tokens.length()};
}

template <class C>
void some_policy_sums(const TokenBatch& in, const PolicyTerms& terms, const PolicyCoefficients& of, void* kept,
                      PolicySums* sums, std::int64_t begin, std::int64_t end) {
  for (std::int64_t s = begin; s < end; ++s) sums[s] = policy_sums<C>(in, terms, of, kept, s);
}

template <class C>
inline void policy_slopes(const Tile<C>& tile, std::int64_t n, const Clip<C>& clip, C weight, C* grad) {
  using V = typename Lanes<C>::Vec;
  C log_ratio[kTile], exp_held[kTile];
  log_ratios(tile, whole_registers<C>(n), clip, log_ratio, exp_held);
  for (std::int64_t i = 0; i < n; i += Lanes<C>::kWidth) {
    const auto token = clipped_term(load(log_ratio + i), load(exp_held + i), load(tile.target + i), clip);
    store(grad + i, load(tile.counted + i) > V{} ? weight * token.slope : V{});
  }
}

template <class C>
struct SquaredErrors {
  using V = typename Lanes<C>::Vec;
  V plain, clipped, held_error;
  decltype(V{} < V{}) inside;  // of the clip

  SquaredErrors(V value, V old, V target, C clip) {
    // Without a clip (inf) what is old is not looked at; a clip about NaN is NaN.
    const V unbounded = V{} + C(HUGE_VAL);
    const V low = clip == C(HUGE_VAL) ? -unbounded : old - clip;
    const V high = clip == C(HUGE_VAL) ? unbounded : old + clip;
    const V held = value < low ? low : value > high ? high : value;
    held_error = (low == low ? held : low) - target;
    plain = (value - target) * (value - target);
    clipped = held_error * held_error;
    inside = (value >= low) & (value <= high);
  }
};

template <class C>
struct ValueLanes {
  DoubleSum<C> terms, clipped, values, returns;

  void add(const Tile<C>& tile, std::int64_t n, C clip) {
    using V = typename Lanes<C>::Vec;
    for (std::int64_t i = 0; i < n; i += Lanes<C>::kWidth) {
      const V value = load(tile.now + i), target = load(tile.target + i);
      const SquaredErrors<C> error(value, load(tile.old + i), target, clip);
      const auto is_clipped = error.clipped > error.plain;
      const V counted = load(tile.counted + i);
      terms.add(is_clipped | (error.clipped != error.clipped) ? error.clipped : error.plain);
      clipped.add(is_clipped ? counted : V{});
      values.add(value);
      returns.add(target);
    }
  }
};

template <class C>
ValueSums value_sums(const TokenBatch& in, double clip, std::int64_t sequence) {
  const Tokens<C> tokens(in, sequence);
  ValueLanes<C> lanes;
  Moments returns{}, errors{};
  Tile<C> tile;
  C error[kTile];
  tokens.for_tiles([&](std::int64_t start, std::int64_t n) {
    tokens.take(start, n, tile);
    lanes.add(tile, n, static_cast<C>(clip));
    for (std::int64_t i = 0; i < whole_registers<C>(n); ++i) error[i] = tile.target[i] - tile.now[i];
    returns = merged(returns, tile_moments(tile.target, tile.counted, n));
    errors = merged(errors, tile_moments(error, tile.counted, n));
  });
  return {lanes.terms.total(), lanes.clipped.total(), lanes.values.total(), lanes.returns.total(), returns, errors,
          tokens.length()};
}

template <class C>
void some_value_sums(const TokenBatch& in, double clip, ValueSums* sums, std::int64_t begin, std::int64_t end) {
  for (std::int64_t s = begin; s < end; ++s) sums[s] = value_sums<C>(in, clip, s);
}

// A tie of the two errors splits the gradient in halves, and the clip passes it at its bounds.
template <class C>
inline void value_slopes(const Tile<C>& tile, std::int64_t n, C clip, C weight, C* grad) {
  using V = typename Lanes<C>::Vec;
  const V zero{}, one = zero + C(1), half = zero + C(0.5);
  for (std::int64_t i = 0; i < n; i += Lanes<C>::kWidth) {
    const V value = load(tile.now + i), target = load(tile.target + i);
    const SquaredErrors<C> error(value, load(tile.old + i), target, clip);
    const V of_plain = error.clipped > error.plain ? zero : error.plain == error.clipped ? half : one;
    const V of_clipped = error.inside ? (one - of_plain) * error.held_error : zero;
    const V finite = of_plain * (value - target) + of_clipped;
    const V slope = error.clipped == error.clipped ? finite : error.clipped;
    store(grad + i, load(tile.counted + i) > zero ? weight * slope : zero);
  }
}

// Calls slopes(tile, n, weight, grad) for every tile of a sequence.
template <class C, class Slopes>
inline void one_gradient(const TokenBatch& in, const LossGradient& gradient, std::int64_t sequence, const Slopes& slopes) {
  const Tokens<C> tokens(in, sequence);
  const double weight = weight_of(in.reduction, gradient.divisor, gradient.lengths[sequence]);
  const C down = static_cast<C>(gradient.grad_loss * weight);
  Tile<C> tile;
  C grad[kTile];
  tokens.for_tiles([&](std::int64_t start, std::int64_t n) {
    tokens.take(start, n, tile);
    slopes(tile, n, down, grad);
    tokens.put(grad, start, n, in.now.dtype, gradient.grad_now);
  });
  tokens.clear_the_rest(in.now.dtype, gradient.grad_now);
}

template <class C>
void some_policy_gradients(const TokenBatch& in, const PolicyCoefficients& of, const LossGradient& gradient,
                           std::int64_t begin, std::int64_t end) {
  const Clip<C> clip(of);
  const auto slopes = [&](const Tile<C>& tile, std::int64_t n, C weight, C* grad) {
    policy_slopes(tile, n, clip, weight, grad);
  };
  for (std::int64_t s = begin; s < end; ++s) one_gradient<C>(in, gradient, s, slopes);
}

template <class C>
void some_value_gradients(const TokenBatch& in, double clip, const LossGradient& gradient, std::int64_t begin,
                          std::int64_t end) {
  const auto slopes = [&](const Tile<C>& tile, std::int64_t n, C weight, C* grad) {
    value_slopes(tile, n, static_cast<C>(clip), weight, grad);
  };
  for (std::int64_t s = begin; s < end; ++s) one_gradient<C>(in, gradient, s, slopes);
}

inline void some_weights(const TokenBatch& in, const std::int64_t* lengths, double divisor, double* weights,
                         std::int64_t begin, std::int64_t end) {
  const auto* mask = static_cast<const std::uint8_t*>(in.mask.data);
  for (std::int64_t s = begin; s < end; ++s) {
    const double weight = weight_of(in.reduction, divisor, lengths[s]);
    const std::uint8_t* row = mask + s * in.mask.row_stride;
    for (std::int64_t t = 0; t < in.tokens; ++t) weights[s * in.tokens + t] = row[t] != 0 ? weight : -HUGE_VAL;
  }
}

}  // namespace losses
}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
