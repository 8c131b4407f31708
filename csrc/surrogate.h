// The clipped surrogate of one token.
#pragma once

#include <cmath>
#include <limits>

namespace ppo_fast {

template <class C>
struct Surrogate {
  C term;
  C slope;  // d term / d logprob
  bool is_clipped;
};

template <class C>
struct ClipRange {
  C low;
  C high;
  C dual_clip;        // infinity for none
  C log_ratio_clamp;  // infinity for none
};

// ratio = e^log_ratio; term = max(-A ratio, -A clip(ratio, low, high)), and at most -c A where A < 0. A tie of max or min
// splits the gradient in halves, a clip passes it at its bounds.
template <class C>
inline Surrogate<C> surrogate(C log_ratio, C advantage, const ClipRange<C>& clip) {
  const C infinity = std::numeric_limits<C>::infinity();
  const C limit = std::log(std::numeric_limits<C>::max()) - 1;
  const bool stopped = log_ratio > clip.log_ratio_clamp || log_ratio < -clip.log_ratio_clamp;
  C held = log_ratio > clip.log_ratio_clamp ? clip.log_ratio_clamp : log_ratio;
  held = held < -clip.log_ratio_clamp ? -clip.log_ratio_clamp : held;
  // Where another branch bounds the term the ratio may overflow harmlessly: held finite, else inf * 0 follows.
  const bool overflows = (clip.dual_clip < infinity || advantage > 0) && held > limit;
  const C ratio = advantage == 0 ? C(1) : std::exp(overflows ? limit : held);
  const C plain = -advantage * ratio;
  const bool inside = ratio >= clip.low && ratio <= clip.high;
  const C clipped = -advantage * (ratio < clip.low ? clip.low : ratio > clip.high ? clip.high : ratio);
  const bool is_clipped = clipped > plain;
  const C term = is_clipped ? clipped : plain;

  const C of_plain = is_clipped ? C(0) : plain == clipped ? C(0.5) : C(1);
  C passes = inside ? C(1) : of_plain;
  const C cap = advantage < 0 ? -clip.dual_clip * advantage : infinity;
  if (term > cap) passes = 0;
  if (term == cap) passes *= C(0.5);
  if (overflows || stopped) passes = 0;
  // A zero advantage has no slope, also where the term is 0 * inf; NaN must not hide behind a zero share.
  const C slope = passes == 0 && plain == plain ? C(0) : plain * passes;
  return {term > cap ? cap : term, slope, is_clipped};
}

}  // namespace ppo_fast
