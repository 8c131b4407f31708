// One row of policy logits beside one of the reference: exact KL, and the clipped policy loss with its gradient. One body
// for every instruction set; policy.cpp includes it once for each; hence no include guard.
//
// As in row.h all is said of d = (x - top) / T, and of the gap d - d_ref of a column, which is log p - log q up to a
// constant of the row: the difference is taken column by column before anything is summed, so that two nearly equal rows
// do not cancel.
#include "cpu/blocks.h"
#include "row.h"
#include "surrogate.h"

namespace ppo_fast {
namespace PPO_FAST_ISA {

template <class R, class C>
inline void widen_row(const R* x, std::int64_t n, C* y) {
  constexpr int kWidth = Lanes<C>::kWidth;
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, load(x + i));
  for (; i < n; ++i) y[i] = widen(x[i]);
}

// Elements [start, start + n) of a reference row in the dtype of the arithmetic: where they lie, or through `buffer`.
template <class C>
inline const C* ref_block(const RefGrid& ref, std::int64_t row, std::int64_t start, std::int64_t n, C* buffer) {
  const std::int64_t at =
      (row / ref.inner_rows) * ref.outer_stride + (row % ref.inner_rows) * ref.inner_stride + start;
  if constexpr (sizeof(C) == sizeof(double)) {
    return static_cast<const double*>(ref.logits) + at;
  } else {
    if (ref.dtype == DType::kBFloat16) {
      widen_row(static_cast<const BFloat16*>(ref.logits) + at, n, buffer);
    } else if (ref.dtype == DType::kFloat16) {
      widen_row(static_cast<const Float16*>(ref.logits) + at, n, buffer);
    } else {
      return static_cast<const float*>(ref.logits) + at;
    }
    return buffer;
  }
}

// Sums of one block, lanes added in double: e^d and e^d d as in add_block and in its order, so that a log-probability has
// the same bits beside a reference as alone; and e^(d_ref) and e^d (d - d_ref).
struct PairSums {
  double total;
  double weighted;
  double ref_total;
  double gaps;
};

template <class T>
inline PairSums pair_block(const T* x, const Compute<T>* r, std::int64_t n, Compute<T> top, Compute<T> ref_top,
                           Compute<T> inverse_temperature) {
  using C = Compute<T>;
  constexpr int kWidth = Lanes<C>::kWidth;
  const C infinity = static_cast<C>(HUGE_VAL);
  Vec<T> sum{}, weighted{}, ref_sum{}, gaps{};
  for (std::int64_t i = 0; i < n; i += kWidth) {
    const Vec<T> v = i + kWidth <= n ? load(x + i) : load_tail(x + i, n - i);
    const Vec<T> u = i + kWidth <= n ? load(r + i) : load_tail(r + i, n - i);
    const Vec<T> d = distance(v, top, inverse_temperature);
    const Vec<T> e = exp_nonpositive(d);
    sum += e;
    weighted += e * d;
    ref_sum += exp_nonpositive(distance(u, ref_top, inverse_temperature));
    const Vec<T> gap = (v - top) * inverse_temperature - (u - ref_top) * inverse_temperature;
    const Vec<T> term = e == C(0) ? Vec<T>{} : e * gap;
    // A column that the policy may take and the reference may not.
    gaps += ((u == -infinity) & (v > -infinity)) ? Vec<T>{} + infinity : term;
  }
  PairSums sums{};
  for (int lane = 0; lane < kWidth; ++lane) {
    sums.total += sum[lane];
    sums.weighted += weighted[lane];
    sums.ref_total += ref_sum[lane];
    sums.gaps += gaps[lane];
  }
  return sums;
}

// s e^step with 0 for a weight that vanished.
inline double carried(double factor, double x) { return factor == 0.0 ? 0.0 : factor * x; }

// row_forward of both rows at once. Where a maximum rises, every gap moves by the difference of the two steps.
template <class T>
inline PolicyState pair_forward(const T* x, const RefGrid& ref, std::int64_t row, std::int64_t vocab, double temperature) {
  using C = Compute<T>;
  const C inverse_temperature = static_cast<C>(1.0 / temperature);
  double top = -HUGE_VAL, ref_top = -HUGE_VAL;
  PairSums sums{};
  C buffer[kBlock];
  for (std::int64_t start = 0; start < vocab; start += kBlock) {
    const std::int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const C* r = ref_block(ref, row, start, n, buffer);
    const double candidate = block_max(x + start, n);
    const double ref_candidate = block_max(r, n);
    const double step = candidate > top && sums.total != 0.0 ? (top - candidate) / temperature : 0.0;
    const double ref_step = ref_candidate > ref_top && sums.ref_total != 0.0 ? (ref_top - ref_candidate) / temperature : 0.0;
    if (step != 0.0 || ref_step != 0.0) {
      const double factor = std::exp(step);
      if (sums.gaps != HUGE_VAL) sums.gaps = carried(factor, sums.gaps + (step - ref_step) * sums.total);
      sums.weighted = carried(factor, sums.weighted + step * sums.total);
      sums.total *= factor;
      sums.ref_total *= std::exp(ref_step);
    }
    if (candidate > top) top = candidate;
    if (ref_candidate > ref_top) ref_top = ref_candidate;
    // While every logit so far is -inf, measure from 0, as row_forward does.
    const PairSums block = pair_block(x + start, r, n, top == -HUGE_VAL ? C(0) : static_cast<C>(top),
                                      ref_top == -HUGE_VAL ? C(0) : static_cast<C>(ref_top), inverse_temperature);
    sums.total += block.total;
    sums.weighted += block.weighted;
    sums.ref_total += block.ref_total;
    sums.gaps += block.gaps;
  }
  return {{top, sums.total, sums.weighted / sums.total}, ref_top, sums.ref_total, sums.gaps / sums.total, 0.0, 0.0, 0.0};
}

// The gradient with a KL: dx_j = p_j (a + b d_j + k gap_j) + c [j = label], with T a = g_entropy mean - g_logprob -
// g_kl mean_gap, T b = -g_entropy, T k = g_kl, T c = g_logprob. Without a label (-1) c is 0. dx may be x itself.
template <class T>
inline void pair_backward(const T* x, const RefGrid& ref, std::int64_t row, T* dx, std::int64_t vocab, std::int64_t label,
                          double temperature, const PolicyState& state) {
  using C = Compute<T>;
  constexpr int kWidth = Lanes<C>::kWidth;
  const RowStats& stats = state.stats;
  const C inverse_temperature = static_cast<C>(1.0 / temperature);
  const C top = static_cast<C>(stats.top), ref_top = static_cast<C>(state.ref_top);
  const double scale = 1.0 / (stats.total * temperature);
  const double down = state.g_entropy * stats.mean - state.g_logprob - state.g_kl * state.mean_gap;
  const C a = static_cast<C>(down * scale);
  const C b = static_cast<C>(-state.g_entropy * scale), k = static_cast<C>(state.g_kl * scale);
  // An infinite KL has no gradient: without this guard NaN shows it.
  const C negligible = state.mean_gap < HUGE_VAL ? C(0) : C(-1);
  C buffer[kBlock];
  C at_label = 0;
  if (label >= 0) {
    const double d = (widen(x[label]) - stats.top) / temperature;
    const double p = std::exp(d) / stats.total;
    const double of_label = *ref_block(ref, row, label, 1, buffer);
    const double gap = d - (of_label - state.ref_top) / temperature;
    const double terms = state.g_entropy * (stats.mean - d) + state.g_kl * (gap - state.mean_gap);
    const double from_logprob = state.g_logprob == 0.0 ? 0.0 : -state.g_logprob * std::expm1(d - std::log(stats.total));
    at_label = static_cast<C>((from_logprob + (p <= negligible ? 0.0 : p * terms)) / temperature);
  }
  for (std::int64_t start = 0; start < vocab; start += kBlock) {
    const std::int64_t size = vocab - start < kBlock ? vocab - start : kBlock;
    const C* r = ref_block(ref, row, start, size, buffer);
    for (std::int64_t i = 0; i < size; i += kWidth) {
      const std::int64_t n = size - i;
      const Vec<T> v = n >= kWidth ? load(x + start + i) : load_tail(x + start + i, n);
      const Vec<T> u = n >= kWidth ? load(r + i) : load_tail(r + i, n);
      const Vec<T> d = distance(v, top, inverse_temperature);
      const Vec<T> e = exp_nonpositive(d);
      const Vec<T> gap = (v - top) * inverse_temperature - (u - ref_top) * inverse_temperature;
      const Vec<T> gradient = e * (b * d + a + k * gap);
      store_some(dx + start + i, e <= negligible ? Vec<T>{} : gradient, n);
    }
  }
  if (label >= 0) dx[label] = narrow<T>(at_label);
}

// dr_j = g (q_j - p_j) / T for the reference's logits, in the arithmetic's dtype.
template <class T>
inline void ref_gradient_block(const T* x, const Compute<T>* r, std::int64_t n, const PolicyState& state, double temperature,
                               double g, Compute<T>* dr) {
  using C = Compute<T>;
  constexpr int kWidth = Lanes<C>::kWidth;
  const C inverse_temperature = static_cast<C>(1.0 / temperature);
  const C scale = static_cast<C>(g / (state.stats.total * temperature));
  const C ref_scale = static_cast<C>(g / (state.ref_total * temperature));
  const C top = static_cast<C>(state.stats.top), ref_top = static_cast<C>(state.ref_top);
  for (std::int64_t i = 0; i < n; i += kWidth) {
    const Vec<T> v = n - i >= kWidth ? load(x + i) : load_tail(x + i, n - i);
    const Vec<T> u = n - i >= kWidth ? load(r + i) : load_tail(r + i, n - i);
    const Vec<T> p = exp_nonpositive(distance(v, top, inverse_temperature)) * scale;
    const Vec<T> q = exp_nonpositive(distance(u, ref_top, inverse_temperature)) * ref_scale;
    store_some(dr + i, q - p, n - i);
  }
}

template <class R, class C>
inline void narrow_row(const C* x, std::int64_t n, R* y) {
  constexpr int kWidth = Lanes<C>::kWidth;
  for (std::int64_t i = 0; i < n; i += kWidth) store_some(y + i, n - i >= kWidth ? load(x + i) : load_tail(x + i, n - i), n - i);
}

template <class C>
inline void narrow_to(DType dtype, const C* x, std::int64_t n, void* y, std::int64_t at) {
  if constexpr (sizeof(C) == sizeof(double)) {
    return narrow_row(x, n, static_cast<double*>(y) + at);
  } else {
    if (dtype == DType::kBFloat16) return narrow_row(x, n, static_cast<BFloat16*>(y) + at);
    if (dtype == DType::kFloat16) return narrow_row(x, n, static_cast<Float16*>(y) + at);
    return narrow_row(x, n, static_cast<float*>(y) + at);
  }
}

inline bool is_read(const PolicyState& state) {
  return state.g_logprob != 0.0 || state.g_entropy != 0.0 || state.g_kl != 0.0;
}

template <class T>
inline void state_backward(const RowGrid& grid, const RefGrid& ref, std::int64_t row, const PolicyState& state, T* dx) {
  const T* x = row_start<T>(grid, row);
  const double temperature = grid.temperature[row * grid.temperature_stride];
  if (!is_read(state)) {
    std::memset(static_cast<void*>(dx), 0, grid.vocab * sizeof(T));
  } else if (state.g_kl != 0.0) {
    pair_backward(x, ref, row, dx, grid.vocab, grid.labels[row], temperature, state);
  } else {
    row_backward(x, dx, grid.vocab, grid.labels[row], temperature, state.stats, state.g_logprob, state.g_entropy);
  }
}

// d term / d logprob of one token, in the lanes of a register like those of many.
template <class C>
inline C slope_of(C log_ratio, C advantage, const Clip<C>& clip) {
  using V = typename Lanes<C>::Vec;
  const C ratio = exp_any(held(log_ratio, clip.log_ratio_clamp));
  return clipped_term(V{} + log_ratio, V{} + ratio, V{} + advantage, clip).slope[0];
}

template <class T>
inline void policy_row(const PolicyIn& in, const PolicyOut& out, const Clip<Compute<T>>& clip, std::int64_t r) {
  using C = Compute<T>;
  const T* x = row_start<T>(in.grid, r);
  const C weight = static_cast<const C*>(in.weights)[r];
  const bool beside = in.ref.logits != nullptr;
  PolicyState state{};
  C logprob = 0, entropy = 0, kl = 0;
  if (weight != -static_cast<C>(HUGE_VAL)) {
    const double temperature = in.grid.temperature[r * in.grid.temperature_stride];
    if (beside) {
      state = pair_forward(x, in.ref, r, in.grid.vocab, temperature);
    } else {
      state.stats = row_forward(x, in.grid.vocab, temperature);
    }
    const double log_total = std::log(state.stats.total);
    logprob = static_cast<C>((widen(x[in.grid.labels[r]]) - state.stats.top) / temperature - log_total);
    entropy = static_cast<C>(log_total - state.stats.mean);
    if (beside) kl = static_cast<C>(state.mean_gap - std::log(state.stats.total / state.ref_total));
    const C old = static_cast<const C*>(in.old_logprobs)[r], advantage = static_cast<const C*>(in.advantages)[r];
    state.g_logprob = weight * slope_of<C>(logprob - old, advantage, clip);
    state.g_entropy = -weight * in.of.entropy_coef;
    state.g_kl = beside ? weight * in.of.kl_coef : 0.0;
  }
  static_cast<C*>(out.logprobs)[r] = logprob;
  static_cast<C*>(out.entropy)[r] = entropy;
  if (out.kl != nullptr) static_cast<C*>(out.kl)[r] = kl;
  if (out.state != nullptr) {
    out.state[r] = state;
  } else {
    state_backward(in.grid, in.ref, r, state, const_cast<T*>(x));
  }
}

template <class T>
void policy_rows(const PolicyIn& in, const PolicyOut& out, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  const Clip<C> clip(in.of);
  for (std::int64_t r = begin; r < end; ++r) policy_row<T>(in, out, clip, r);
}

template <class T>
void policy_gradients(const RowGrid& grid, const RefGrid& ref, const PolicyState* states, double grad_loss, void* out,
                      std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    PolicyState state = states[r];
    for (double* g : {&state.g_logprob, &state.g_entropy, &state.g_kl}) {
      if (*g != 0.0) *g *= grad_loss;  // 0 stays 0 under inf and NaN: it may mean that there is nothing to read
    }
    T* dx = out == nullptr ? const_cast<T*>(row_start<T>(grid, r)) : static_cast<T*>(out) + r * grid.vocab;
    state_backward(grid, ref, r, state, dx);
  }
}

template <class T>
void scaled_rows(const RowGrid& grid, double factor, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  constexpr int kWidth = Lanes<C>::kWidth;
  for (std::int64_t r = begin; r < end; ++r) {
    T* x = const_cast<T*>(row_start<T>(grid, r));
    for (std::int64_t i = 0; i < grid.vocab; i += kWidth) {
      const std::int64_t n = grid.vocab - i;
      const Vec<T> v = n >= kWidth ? load(x + i) : load_tail(x + i, n);
      const Vec<T> scaled = v * static_cast<C>(factor);
      store_some(x + i, v == C(0) ? Vec<T>{} : scaled, n);
    }
  }
}

template <class T>
void kl_rows(const RowGrid& grid, const RefGrid& ref, void* kl, PolicyState* states, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  for (std::int64_t r = begin; r < end; ++r) {
    const double temperature = grid.temperature[r * grid.temperature_stride];
    states[r] = pair_forward(row_start<T>(grid, r), ref, r, grid.vocab, temperature);
    const double kl_of_row = states[r].mean_gap - std::log(states[r].stats.total / states[r].ref_total);
    static_cast<C*>(kl)[r] = static_cast<C>(kl_of_row);
  }
}

template <class T>
void kl_gradients(const RowGrid& grid, const RefGrid& ref, const PolicyState* states, const void* grad_kl, void* of_logits,
                  void* of_ref, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  C buffer[kBlock], gradient[kBlock];
  for (std::int64_t r = begin; r < end; ++r) {
    const double g = static_cast<const C*>(grad_kl)[r];
    const double temperature = grid.temperature[r * grid.temperature_stride];
    const T* x = row_start<T>(grid, r);
    if (of_logits != nullptr) {
      PolicyState state = states[r];
      state.g_kl = g;
      T* dx = static_cast<T*>(of_logits) + r * grid.vocab;
      if (g == 0.0) std::memset(static_cast<void*>(dx), 0, grid.vocab * sizeof(T));
      if (g != 0.0) pair_backward(x, ref, r, dx, grid.vocab, -1, temperature, state);
    }
    for (std::int64_t start = 0; of_ref != nullptr && start < grid.vocab; start += kBlock) {
      const std::int64_t n = grid.vocab - start < kBlock ? grid.vocab - start : kBlock;
      if (g == 0.0) std::memset(gradient, 0, sizeof gradient);
      if (g != 0.0) ref_gradient_block(x + start, ref_block(ref, r, start, n, buffer), n, states[r], temperature, g, gradient);
      narrow_to(ref.dtype, gradient, n, of_ref, r * grid.vocab + start);
    }
  }
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
