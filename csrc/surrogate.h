// The clipped surrogate of a register of tokens. Included for every instruction set after cpu/blocks.h; hence no guard.

namespace ppo_fast {
namespace PPO_FAST_ISA {

template <class C>
struct Clip {
  C low;
  C high;
  C dual_clip;
  C log_ratio_clamp;

  explicit Clip(const PolicyCoefficients& of)
      : low(static_cast<C>(of.low)),
        high(static_cast<C>(of.high)),
        dual_clip(static_cast<C>(of.dual_clip)),
        log_ratio_clamp(static_cast<C>(of.log_ratio_clamp)) {}
};

template <class V>
struct ClippedTerm {
  V term;
  V slope;      // d term / d logprob
  V is_clipped;  // 1 or 0
};

// term = max(-A ratio, -A clip(ratio, low, high)), and at most -c A where A < 0. A tie of max or min splits the gradient in
// halves, a clip passes it at its bounds. exp_held is e^log_ratio with log_ratio held by its clamp.
template <class C, class V>
inline ClippedTerm<V> clipped_term(V log_ratio, V exp_held, V advantage, const Clip<C>& clip) {
  const V zero{}, one = zero + C(1), half = zero + C(0.5), infinity = zero + C(HUGE_VAL);
  const auto stopped = (log_ratio > clip.log_ratio_clamp) | (log_ratio < -clip.log_ratio_clamp);
  const V ratio = advantage != zero ? exp_held : one;
  const V plain = -advantage * ratio;
  const V low = zero + clip.low, high = zero + clip.high;
  const V clipped = -advantage * (ratio < low ? low : ratio > high ? high : ratio);
  const auto is_clipped = clipped > plain;
  const V term = is_clipped ? clipped : plain;

  const V of_plain = is_clipped ? zero : plain == clipped ? half : one;
  const V cap = advantage < zero ? -clip.dual_clip * advantage : infinity;
  V passes = (ratio >= low) & (ratio <= high) ? one : of_plain;
  passes = term == cap ? half * passes : passes;
  passes = (term > cap) | stopped ? zero : passes;
  // Where another branch bounds the term the ratio may overflow: no share of it is 0. NaN must not hide behind a zero share.
  const V slope = (passes == zero) & (plain == plain) ? zero : plain * passes;
  return {term > cap ? cap : term, slope, is_clipped ? one : zero};
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
