// One row of policy logits beside one of the reference: exact KL, and the clipped policy loss with its gradient. One body
// for every instruction set; policy.cpp includes it once for each; hence no include guard.
//
// As in row.h all is said of d = x - top, and of the gap d - d_ref of a column, which is T (log p - log q) up to a constant
// of the row: the difference is taken column by column before anything is summed, so that two nearly equal rows
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

// Of both rows: what RowSums has of the policy's, by the same steps, so that a log-probability has the same bits beside a
// reference as alone; sum e^(d_ref / T); and sum e^(d / T) (d - d_ref).
template <class T>
struct PairSums {
  using C = Compute<T>;
  RowSums<T, true> own;
  DoubleSum<C> ref_total;
  DoubleSum<C> gaps;

  void add(const T* x, const C* r, std::int64_t n, C top, C ref_top, const RowExp<T>& exp) {
    using V = Vec<T>;
    constexpr int kWidth = Lanes<C>::kWidth;
    const C infinity = static_cast<C>(HUGE_VAL);
    BlockSums<T, true> block;
    V ref_sum{}, gap_sum{};
    for_registers(x, n, [&](V v, std::int64_t i, int chain) {
      const V u = i + kWidth <= n ? load(r + i) : load_tail(r + i, n - i);
      typename RowExp<T>::Counts counts, ref_counts;
      const V e = block.add(v - top, chain, exp, counts);
      ref_sum += exp(u - ref_top, ref_counts);
      const V term = RowExp<T>::product(e, (v - top) - (u - ref_top), counts);
      // A column that the policy may take and the reference may not.
      gap_sum += ((u == -infinity) & (v > -infinity)) ? V{} + infinity : term;
    });
    own.add(block);
    ref_total.add(ref_sum);
    gaps.add(gap_sum);
  }

  // The tops rise by a step each, and every gap by the difference of the two.
  void rise(double step, double ref_step, double temperature) {
    const double factor = std::exp(-step / temperature);
    if (gaps.total() != HUGE_VAL) {
      gaps.add_scaled(own.total, ref_step - step);
      gaps.scale(factor);
    }
    own.rise(step, factor);
    ref_total.scale(std::exp(-ref_step / temperature));
  }
};

// How far `top` rises for a candidate; nothing was summed from a top of -inf.
inline double rise_of(double top, double candidate) { return candidate > top && top > -HUGE_VAL ? candidate - top : 0.0; }

// row_forward of both rows at once.
template <class T>
inline PolicyState pair_forward(const T* x, const RefGrid& ref, std::int64_t row, std::int64_t vocab, double temperature) {
  using C = Compute<T>;
  const RowExp<T> exp(temperature);
  double top = -HUGE_VAL, ref_top = -HUGE_VAL;
  PairSums<T> sums;
  C buffer[kBlock<T>];
  for (std::int64_t start = 0; start < vocab; start += kBlock<T>) {
    const std::int64_t n = vocab - start < kBlock<T> ? vocab - start : kBlock<T>;
    const C* r = ref_block(ref, row, start, n, buffer);
    const double candidate = block_max(x + start, n);
    const double ref_candidate = block_max(r, n);
    const double step = rise_of(top, candidate), ref_step = rise_of(ref_top, ref_candidate);
    if (step != 0.0 || ref_step != 0.0) sums.rise(step, ref_step, temperature);
    if (candidate > top) top = candidate;
    if (ref_candidate > ref_top) ref_top = ref_candidate;
    sums.add(x + start, r, n, origin<C>(top), origin<C>(ref_top), exp);
  }
  const double total = sums.own.total.total();
  const RowStats stats{top, total, sums.own.weighted.total() / (total * temperature)};
  return {stats, ref_top, sums.ref_total.total(), sums.gaps.total() / (total * temperature), 0.0, 0.0, 0.0};
}

// The gradient with a KL: dx_j = p_j (a + b d_j + k gap_j) + c [j = label], with T a = g_entropy mean - g_logprob -
// g_kl mean_gap, T^2 b = -g_entropy, T^2 k = g_kl, T c = g_logprob. Without a label (-1) c is 0. dx may be x itself.
template <class T>
inline void pair_backward(const T* x, const RefGrid& ref, std::int64_t row, T* dx, std::int64_t vocab, std::int64_t label,
                          double temperature, const PolicyState& state) {
  using C = Compute<T>;
  constexpr int kWidth = Lanes<C>::kWidth;
  const RowStats& stats = state.stats;
  const RowExp<T> exp(temperature);
  const C top = static_cast<C>(stats.top), ref_top = static_cast<C>(state.ref_top);
  const double scale = 1.0 / (stats.total * temperature);
  const double down = state.g_entropy * stats.mean - state.g_logprob - state.g_kl * state.mean_gap;
  const C a = static_cast<C>(down * scale);
  const C b = static_cast<C>(-state.g_entropy * scale / temperature);
  const C k = static_cast<C>(state.g_kl * scale / temperature);
  // An infinite KL has no gradient: without this guard NaN shows it.
  const C negligible = state.mean_gap < HUGE_VAL ? C(0) : C(-1);
  C buffer[kBlock<T>];
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
  for (std::int64_t start = 0; start < vocab; start += kBlock<T>) {
    const std::int64_t size = vocab - start < kBlock<T> ? vocab - start : kBlock<T>;
    const C* r = ref_block(ref, row, start, size, buffer);
    for (std::int64_t i = 0; i < size; i += kWidth) {
      const std::int64_t n = size - i;
      const Vec<T> v = n >= kWidth ? load(x + start + i) : load_tail(x + start + i, n);
      const Vec<T> u = n >= kWidth ? load(r + i) : load_tail(r + i, n);
      const Vec<T> d = v - top;
      typename RowExp<T>::Counts counts;
      const Vec<T> e = exp(d, counts);
      const Vec<T> gradient = e * (b * d + a + k * (d - (u - ref_top)));
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
  const RowExp<T> exp(temperature);
  const C scale = static_cast<C>(g / (state.stats.total * temperature));
  const C ref_scale = static_cast<C>(g / (state.ref_total * temperature));
  const C top = static_cast<C>(state.stats.top), ref_top = static_cast<C>(state.ref_top);
  for (std::int64_t i = 0; i < n; i += kWidth) {
    const Vec<T> v = n - i >= kWidth ? load(x + i) : load_tail(x + i, n - i);
    const Vec<T> u = n - i >= kWidth ? load(r + i) : load_tail(r + i, n - i);
    typename RowExp<T>::Counts counts;
    const Vec<T> p = exp(v - top, counts) * scale;
    const Vec<T> q = exp(u - ref_top, counts) * ref_scale;
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
      state.stats = row_forward<T, true>(x, in.grid.vocab, temperature);
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
  C buffer[kBlock<T>], gradient[kBlock<T>];
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
    for (std::int64_t start = 0; of_ref != nullptr && start < grid.vocab; start += kBlock<T>) {
      const std::int64_t n = grid.vocab - start < kBlock<T> ? grid.vocab - start : kBlock<T>;
      if (g == 0.0) std::memset(gradient, 0, sizeof gradient);
      if (g != 0.0) ref_gradient_block(x + start, ref_block(ref, r, start, n, buffer), n, states[r], temperature, g, gradient);
      narrow_to(ref.dtype, gradient, n, of_ref, r * grid.vocab + start);
    }
  }
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
