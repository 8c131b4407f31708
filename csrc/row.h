// One row of logits: online maximum and sums, target, entropy, gradient. One body for every instruction set and dtype:
// logits.cpp includes it once for each set, after lanes.h, inside that set's target pragma; hence no include guard.
//
// Everything is said of d = (x - top) / T <= 0 with top = max x, never of x / T itself: a common offset of the logits
// cancels exactly, and d carries two roundings at its own size where x / T carries one at the size of x.

namespace ppo_fast {
namespace PPO_FAST_ISA {

constexpr std::int64_t kBlock = 1024;  // elements read twice while they are in L1: once for the maximum, once for exp

// exp is 0 long before this; a logit of -inf stands here, so that 0 * d is 0 and not NaN. NaN compares false and stays.
template <class V, class C>
inline V distance(V x, C top, C inverse_temperature) {
  const V d = (x - top) * inverse_temperature;
  const V floor = V{} + C(-1000);
  return floor > d ? floor : d;
}

// The last elements of a row, filled up with -inf: logits that weigh nothing.
template <class T>
inline Vec<T> load_tail(const T* x, std::int64_t n) {
  T lanes[Lanes<Compute<T>>::kWidth];
  for (T& lane : lanes) lane = narrow<T>(-HUGE_VAL);
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = x[i];
  return load(lanes);
}

template <class T>
inline Compute<T> block_max(const T* x, std::int64_t n) {
  constexpr int kWidth = Lanes<Compute<T>>::kWidth;
  constexpr int kChains = 4;  // independent maxima: one chain would wait for its own latency
  Vec<T> top[kChains];
  for (Vec<T>& t : top) t = Vec<T>{} - Compute<T>(HUGE_VAL);
  std::int64_t i = 0;
  for (; i + kChains * kWidth <= n; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) {
      const Vec<T> v = load(x + i + c * kWidth);
      top[c] = v > top[c] ? v : top[c];
    }
  }
  for (; i < n; i += kWidth) {
    const Vec<T> v = i + kWidth <= n ? load(x + i) : load_tail(x + i, n - i);
    top[0] = v > top[0] ? v : top[0];
  }
  Compute<T> best = top[0][0];
  for (const Vec<T>& t : top) {
    for (int lane = 0; lane < kWidth; ++lane) best = t[lane] > best ? t[lane] : best;
  }
  return best;
}

// total += sum exp(d), weighted += sum exp(d) d over one block; lanes are float, blocks are added in double.
template <class T>
inline void add_block(const T* x, std::int64_t n, Compute<T> top, Compute<T> inverse_temperature, double* total,
                      double* weighted) {
  constexpr int kWidth = Lanes<Compute<T>>::kWidth;
  Vec<T> sum{};
  Vec<T> weighted_sum{};
  for (std::int64_t i = 0; i < n; i += kWidth) {
    const Vec<T> v = i + kWidth <= n ? load(x + i) : load_tail(x + i, n - i);
    const Vec<T> d = distance(v, top, inverse_temperature);
    const Vec<T> e = exp_nonpositive(d);
    sum += e;
    weighted_sum += e * d;
  }
  for (int lane = 0; lane < kWidth; ++lane) {
    *total += sum[lane];
    *weighted += weighted_sum[lane];
  }
}

// When the maximum rises from t to u, with s = (t - u) / T: sum exp(d) -> e^s sum, sum exp(d) d -> e^s (weighted + s sum).
template <class T>
inline RowStats row_forward(const T* x, std::int64_t vocab, double temperature) {
  using C = Compute<T>;
  const C inverse_temperature = static_cast<C>(1.0 / temperature);
  double top = -HUGE_VAL;
  double total = 0.0;
  double weighted = 0.0;
  for (std::int64_t start = 0; start < vocab; start += kBlock) {
    const std::int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const double candidate = block_max(x + start, n);
    if (candidate > top) {
      if (total != 0.0) {
        const double step = (top - candidate) / temperature;
        const double factor = std::exp(step);
        weighted = factor == 0.0 ? 0.0 : factor * (weighted + step * total);
        total *= factor;
      }
      top = candidate;
    }
    // While every logit so far is -inf, measure from 0: they then weigh nothing instead of being inf - inf.
    add_block(x + start, n, top == -HUGE_VAL ? C(0) : static_cast<C>(top), inverse_temperature, &total, &weighted);
  }
  return {top, total, weighted / total};
}

template <class T>
inline void store_some(T* y, Vec<T> v, std::int64_t n) {
  if (n >= Lanes<Compute<T>>::kWidth) return store(y, v);
  T lanes[Lanes<Compute<T>>::kWidth];
  store(lanes, v);
  for (std::int64_t k = 0; k < n; ++k) y[k] = lanes[k];
}

// The gradient of g_logprob * logprob + g_entropy * entropy:
// dx_j = p_j (a + b d_j) + c [j = label], with T a = g_entropy mean - g_logprob, T b = -g_entropy, T c = g_logprob.
// dx may be x itself. Without a label (-1: it lies in another slice of the vocabulary) c is 0.
template <class T>
inline void row_backward(const T* x, T* dx, std::int64_t vocab, std::int64_t label, double temperature,
                         const RowStats& stats, double g_logprob, double g_entropy) {
  using C = Compute<T>;
  constexpr int kWidth = Lanes<C>::kWidth;
  const C inverse_temperature = static_cast<C>(1.0 / temperature);
  const C top = static_cast<C>(stats.top);
  const double scale = 1.0 / (stats.total * temperature);
  const C a = static_cast<C>((g_entropy * stats.mean - g_logprob) * scale);
  const C b = static_cast<C>(-g_entropy * scale);
  C at_label = 0;
  if (label >= 0) {
    // The target in one shot: 1 - p rounds to nothing near p = 1, and reading back a stored p would round it first.
    const double d_label = (widen(x[label]) - stats.top) / temperature;
    const double p = std::exp(d_label) / stats.total;
    const double from_entropy = p == 0.0 ? 0.0 : g_entropy * p * (stats.mean - d_label);
    const double from_logprob = g_logprob == 0.0 ? 0.0 : -g_logprob * std::expm1(d_label - std::log(stats.total));
    at_label = static_cast<C>((from_logprob + from_entropy) / temperature);
  }
  for (std::int64_t i = 0; i < vocab; i += kWidth) {
    const std::int64_t n = vocab - i;
    const Vec<T> d = distance(n >= kWidth ? load(x + i) : load_tail(x + i, n), top, inverse_temperature);
    store_some(dx + i, exp_nonpositive(d) * (b * d + a), n);
  }
  if (label >= 0) dx[label] = narrow<T>(at_label);
}

template <class T>
void forward_rows(const RowGrid& grid, const ForwardOut& out, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  for (std::int64_t r = begin; r < end; ++r) {
    const T* x = row_start<T>(grid, r);
    const double temperature = grid.temperature[r * grid.temperature_stride];
    const RowStats stats = row_forward(x, grid.vocab, temperature);
    const double log_total = std::log(stats.total);
    const double d = (widen(x[grid.labels[r]]) - stats.top) / temperature;
    out.stats[r] = stats;
    static_cast<C*>(out.logprobs)[r] = static_cast<C>(d - log_total);
    static_cast<C*>(out.entropy)[r] = static_cast<C>(log_total - stats.mean);
  }
}

template <class T>
void backward_rows(const RowGrid& grid, const BackwardIn& in, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  const C* grad_logprobs = static_cast<const C*>(in.grad_logprobs);
  const C* grad_entropy = static_cast<const C*>(in.grad_entropy);
  for (std::int64_t r = begin; r < end; ++r) {
    T* dx = static_cast<T*>(in.grad_logits) + r * grid.vocab;
    const double g_logprob = grad_logprobs != nullptr ? grad_logprobs[r] : 0.0;
    const double g_entropy = grad_entropy != nullptr ? grad_entropy[r] : 0.0;
    if (g_logprob == 0.0 && g_entropy == 0.0) {  // masked and clipped rows: their logits, NaN included, are not read
      std::memset(static_cast<void*>(dx), 0, grid.vocab * sizeof(T));
      continue;
    }
    const double temperature = grid.temperature[r * grid.temperature_stride];
    row_backward(row_start<T>(grid, r), dx, grid.vocab, grid.labels[r], temperature, in.stats[r], g_logprob, g_entropy);
  }
}

inline void exp_rows(const float* x, float* y, std::int64_t n) {
  constexpr int kWidth = Lanes<float>::kWidth;
  for (std::int64_t i = 0; i < n; i += kWidth) {
    const auto v = n - i >= kWidth ? load(x + i) : load_tail(x + i, n - i);
    const auto e = exp_nonpositive(distance(v, 0.0f, 1.0f));
    for (int lane = 0; lane < kWidth && i + lane < n; ++lane) y[i + lane] = e[lane];
  }
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
