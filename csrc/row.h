// One row of logits: online maximum and sums, target, entropy, gradient. One body for every instruction set and dtype:
// logits.cpp includes it once for each set, after lanes.h, inside that set's target pragma; hence no include guard.
//
// Everything is said of d = x - top <= 0 with top = max x, never of x / T itself: a common offset of the logits cancels
// exactly, and d carries one rounding at its own size where x / T carries one at the size of x.

namespace ppo_fast {
namespace PPO_FAST_ISA {

template <class T>
constexpr std::int64_t kBlock = 2048 / sizeof(T);  // elements read twice while they are in L1: for the maximum, then for exp
constexpr int kChains = 2;             // independent sums of a block: one would wait for its own latency
template <class T>
constexpr int kStep = kChains * Lanes<Compute<T>>::kWidth;

// The last elements of a row, filled up with -inf to `kWidth`: logits that weigh nothing.
template <int kWidth, class T>
inline void fill_tail(const T* x, std::int64_t n, T* lanes) {
  for (int i = 0; i < kWidth; ++i) lanes[i] = narrow<T>(-HUGE_VAL);
  for (std::int64_t i = 0; i < n; ++i) lanes[i] = x[i];
}

template <class T>
inline Vec<T> load_tail(const T* x, std::int64_t n) {
  T lanes[Lanes<Compute<T>>::kWidth];
  fill_tail<Lanes<Compute<T>>::kWidth>(x, n, lanes);
  return load(lanes);
}

// body(v, i, chain) over the registers of a block, from element i on, the last of them filled up; step(at) before each whole
// step of them.
template <class T, class Body, class Step>
inline void for_registers(const T* x, std::int64_t n, const Body& body, const Step& step) {
  constexpr int kWidth = Lanes<Compute<T>>::kWidth;
  std::int64_t i = 0;
  for (; i + kStep<T> <= n; i += kStep<T>) {
    step(x + i);
    for (int chain = 0; chain < kChains; ++chain) body(load(x + i + chain * kWidth), i + chain * kWidth, chain);
  }
  for (; i + kWidth <= n; i += kWidth) body(load(x + i), i, 0);
  if (i < n) body(load_tail(x + i, n - i), i, 0);
}

template <class T, class Body>
inline void for_registers(const T* x, std::int64_t n, const Body& body) {
  for_registers(x, n, body, [](const T*) {});
}

template <class V>
inline V greater(V x, V y) {
  return x > y ? x : y;
}

// The greatest of the lanes of a register, which holds numbers of type N.
template <class N, class V>
inline N greatest_lane(V v) {
  constexpr int kWidth = sizeof(V) / sizeof(N);
  N lanes[kWidth];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = greater(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

// The greatest logit, a step of them at a time. NaN compares false and is passed by.
template <class T>
struct Top {
  static_assert(kChains == 2, "value() joins two");
  Vec<T> most[kChains] = {Vec<T>{} - Compute<T>(HUGE_VAL), Vec<T>{} - Compute<T>(HUGE_VAL)};

  void take(const T* x) {
    for (int chain = 0; chain < kChains; ++chain) {
      most[chain] = greater(load(x + chain * Lanes<Compute<T>>::kWidth), most[chain]);
    }
  }
  Compute<T> value() const { return greatest_lane<Compute<T>>(greater(most[0], most[1])); }
};

// Of 16-bit floats by their bits, a register of them at once. As signed numbers those from +0 on are in order; where there is
// none, the greatest is the one of the least bits. A NaN may come out, of a row that is NaN anyway.
template <class Half>
struct HalfTop {
  typedef std::int16_t Signed __attribute__((vector_size(PPO_FAST_BYTES)));
  typedef std::uint16_t Unsigned __attribute__((vector_size(PPO_FAST_BYTES)));
  static_assert(kStep<Half> * sizeof(Half) == PPO_FAST_BYTES, "a step is a register of halves");
  Signed most = Signed{} - INT16_MAX;
  Unsigned least = Unsigned{} + UINT16_MAX;

  void take(const Half* x) {
    Signed bits;
    std::memcpy(&bits, x, sizeof bits);
    most = greater(bits, most);
    least = reinterpret_cast<Unsigned>(bits) < least ? reinterpret_cast<Unsigned>(bits) : least;
  }
  float value() const {
    const auto positive = greatest_lane<std::int16_t>(most);
    if (positive >= 0) return widen(Half{static_cast<std::uint16_t>(positive)});
    return widen(Half{static_cast<std::uint16_t>(~greatest_lane<std::uint16_t>(~least))});
  }
};
template <>
struct Top<BFloat16> : HalfTop<BFloat16> {};
template <>
struct Top<Float16> : HalfTop<Float16> {};

template <class T>
inline Compute<T> block_max(const T* x, std::int64_t n) {
  Top<T> top;
  std::int64_t i = 0;
  for (; i + kStep<T> <= n; i += kStep<T>) top.take(x + i);
  if (i < n) {
    T lanes[kStep<T>];
    fill_tail<kStep<T>>(x + i, n - i, lanes);
    top.take(lanes);
  }
  return top.value();
}

// Of one block: sum e^(d / T) and, where the mean is wanted, sum e^(d / T) d of d = x - top, in lanes of the arithmetic.
template <class T, bool mean>
struct BlockSums {
  Vec<T> total[kChains]{};
  Vec<T> weighted[kChains]{};

  // Returns e^(d / T).
  Vec<T> add(Vec<T> d, int chain, const RowExp<T>& exp, typename RowExp<T>::Counts& counts) {
    const Vec<T> e = exp(d, counts);
    total[chain] += e;
    if constexpr (mean) weighted[chain] = RowExp<T>::add_product(e, d, weighted[chain], counts);
    return e;
  }
};

// The same of a row: blocks are added in double.
template <class T, bool mean>
struct RowSums {
  DoubleSum<Compute<T>> total;
  DoubleSum<Compute<T>> weighted;

  void add(const BlockSums<T, mean>& block) {
    total.add(block.total[0] + block.total[1]);
    if constexpr (mean) weighted.add(block.weighted[0] + block.weighted[1]);
  }

  // The top rises by `step`: sum e^(d / T) -> f sum, sum e^(d / T) d -> f (weighted - step sum), with f = e^(-step / T).
  void rise(double step, double factor) {
    if constexpr (mean) {
      weighted.add_scaled(total, -step);
      weighted.scale(factor);
    }
    total.scale(factor);
  }
};

// The top from which a block is measured. While every logit so far is -inf, measure from 0: they then weigh nothing instead of
// being inf - inf.
template <class C>
inline C origin(double top) {
  return top == -HUGE_VAL ? C(0) : static_cast<C>(top);
}

// While a block is summed, the maximum of the next one is taken: memory has work when the arithmetic is the bottleneck.
template <class T, bool mean>
inline RowStats row_forward(const T* x, std::int64_t vocab, double temperature) {
  using C = Compute<T>;
  const RowExp<T> exp(temperature);
  double top = -HUGE_VAL;
  RowSums<T, mean> sums;
  double candidate = block_max(x, vocab < kBlock<T> ? vocab : kBlock<T>);
  for (std::int64_t start = 0; start < vocab; start += kBlock<T>) {
    if (candidate > top) {
      if (top > -HUGE_VAL) sums.rise(candidate - top, std::exp((top - candidate) / temperature));
      top = candidate;
    }
    const C from = origin<C>(top);
    BlockSums<T, mean> block;
    const auto add = [&](Vec<T> v, std::int64_t, int chain) {
      typename RowExp<T>::Counts counts;
      block.add(v - from, chain, exp, counts);
    };
    const std::int64_t left = vocab - start - kBlock<T>;
    if (left >= kBlock<T>) {
      Top<T> next;
      for_registers(x + start, kBlock<T>, add, [&](const T* at) { next.take(at + kBlock<T>); });
      candidate = next.value();
    } else {
      for_registers(x + start, left < 0 ? left + kBlock<T> : kBlock<T>, add);
      candidate = left > 0 ? block_max(x + start + kBlock<T>, left) : -HUGE_VAL;
    }
    sums.add(block);
  }
  const double total = sums.total.total();
  return {top, total, mean ? sums.weighted.total() / (total * temperature) : 0.0};
}

template <class T>
inline void store_some(T* y, Vec<T> v, std::int64_t n) {
  if (n >= Lanes<Compute<T>>::kWidth) return store(y, v);
  T lanes[Lanes<Compute<T>>::kWidth];
  store(lanes, v);
  for (std::int64_t k = 0; k < n; ++k) y[k] = lanes[k];
}

// The gradient of g_logprob * logprob + g_entropy * entropy:
// dx_j = p_j (a + b d_j) + c [j = label], with T a = g_entropy mean - g_logprob, T^2 b = -g_entropy, T c = g_logprob, and
// d = x - top. dx may be x itself. Without a label (-1: it lies in another slice of the vocabulary) c is 0.
template <class T>
inline void row_backward(const T* x, T* dx, std::int64_t vocab, std::int64_t label, double temperature,
                         const RowStats& stats, double g_logprob, double g_entropy) {
  using C = Compute<T>;
  constexpr int kWidth = Lanes<C>::kWidth;
  const RowExp<T> exp(temperature);
  const C top = static_cast<C>(stats.top);
  const double scale = 1.0 / (stats.total * temperature);
  const C a = static_cast<C>((g_entropy * stats.mean - g_logprob) * scale);
  const C b = static_cast<C>(-g_entropy * scale / temperature);
  double at_label = 0.0;
  if (label >= 0) {
    // The target in one shot: 1 - p rounds to nothing near p = 1, and reading back a stored p would round it first.
    const double d_label = (widen(x[label]) - stats.top) / temperature;
    const double p = std::exp(d_label) / stats.total;
    const double from_entropy = p == 0.0 ? 0.0 : g_entropy * p * (stats.mean - d_label);
    const double from_logprob = g_logprob == 0.0 ? 0.0 : -g_logprob * std::expm1(d_label - std::log(stats.total));
    at_label = (from_logprob + from_entropy) / temperature;
  }
  for (std::int64_t i = 0; i < vocab; i += kWidth) {
    const std::int64_t n = vocab - i;
    const Vec<T> d = (n >= kWidth ? load(x + i) : load_tail(x + i, n)) - top;
    typename RowExp<T>::Counts counts;
    const Vec<T> e = exp(d, counts);
    store_some(dx + i, RowExp<T>::product(e, b * d + a, counts), n);
  }
  if (label >= 0) dx[label] = narrow<T>(at_label);
}

template <class T>
void forward_rows(const RowGrid& grid, const ForwardOut& out, std::int64_t begin, std::int64_t end) {
  using C = Compute<T>;
  for (std::int64_t r = begin; r < end; ++r) {
    const T* x = row_start<T>(grid, r);
    const double temperature = grid.temperature[r * grid.temperature_stride];
    const RowStats stats = out.entropy != nullptr ? row_forward<T, true>(x, grid.vocab, temperature)
                                                  : row_forward<T, false>(x, grid.vocab, temperature);
    const double log_total = std::log(stats.total);
    const double d = (widen(x[grid.labels[r]]) - stats.top) / temperature;
    out.stats[r] = stats;
    static_cast<C*>(out.logprobs)[r] = static_cast<C>(d - log_total);
    if (out.entropy != nullptr) static_cast<C*>(out.entropy)[r] = static_cast<C>(log_total - stats.mean);
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

template <class T>
inline void exp_rows(const float* x, float* y, std::int64_t n, double temperature) {
  constexpr int kWidth = Lanes<float>::kWidth;
  const RowExp<T> exp(temperature);
  for (std::int64_t i = 0; i < n; i += kWidth) {
    const auto v = n - i >= kWidth ? load(x + i) : load_tail(x + i, n - i);
    typename RowExp<T>::Counts counts;
    const auto e = exp(v, counts);
    for (int lane = 0; lane < kWidth && i + lane < n; ++lane) y[i + lane] = e[lane];
  }
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
