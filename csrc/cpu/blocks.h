// Tokens a block at a time, whatever their dtype: what the bodies of the token ops share. Included before each of them, in
// the namespace of an instruction set, after lanes.h; hence no include guard.

namespace ppo_fast {
namespace PPO_FAST_ISA {

constexpr std::int64_t kTile = 512;  // tokens converted at once where an input is not in the dtype of the arithmetic

template <class C, class T>
inline void widen_block(const T* x, std::int64_t n, C* y) {
  std::int64_t i = 0;
  if constexpr (std::is_same_v<C, Compute<T>>) {
    for (; i + Lanes<C>::kWidth <= n; i += Lanes<C>::kWidth) store(y + i, load(x + i));
  }
  for (; i < n; ++i) y[i] = static_cast<C>(widen(x[i]));
}

template <class C>
inline void load_block(const TokenRows& rows, std::int64_t at, std::int64_t n, C* y) {
  switch (rows.dtype) {
    case DType::kFloat32:
      widen_block(static_cast<const float*>(rows.data) + at, n, y);
      break;
    case DType::kFloat64:
      widen_block(static_cast<const double*>(rows.data) + at, n, y);
      break;
    case DType::kBFloat16:
      widen_block(static_cast<const BFloat16*>(rows.data) + at, n, y);
      break;
    case DType::kFloat16:
      widen_block(static_cast<const Float16*>(rows.data) + at, n, y);
      break;
  }
}

template <class C, class T>
inline void narrow_to(const C* x, std::int64_t n, T* y) {
  std::int64_t i = 0;
  if constexpr (std::is_same_v<C, Compute<T>>) {
    for (; i + Lanes<C>::kWidth <= n; i += Lanes<C>::kWidth) store(y + i, load(x + i));
  }
  for (; i < n; ++i) y[i] = narrow<T>(x[i]);
}

template <class C>
inline void narrow_block(const C* x, std::int64_t n, DType dtype, void* out, std::int64_t at) {
  switch (dtype) {
    case DType::kFloat32:
      return narrow_to(x, n, static_cast<float*>(out) + at);
    case DType::kFloat64:
      return narrow_to(x, n, static_cast<double*>(out) + at);
    case DType::kBFloat16:
      return narrow_to(x, n, static_cast<BFloat16*>(out) + at);
    case DType::kFloat16:
      return narrow_to(x, n, static_cast<Float16*>(out) + at);
  }
}

// e^x in float, relative error below 2e-7, as code that the vectoriser takes: x = n ln 2 + r, and 2^n in two factors, since
// 2^128 is no float though e^x may be one. The polynomial is that of lanes.h.
inline float exp_any(float x) {
  const float kShift = 0x1.8p23f;  // adding it rounds to an integer, left in the last bits
  const float bounded = x > 90.0f ? 90.0f : x < -105.0f ? -105.0f : x;
  const float shifted = bounded * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (bounded - n * 0.693145751953125f) - n * 1.42860682e-6f;
  float q = r * 0.0013814539f + 0.0083687454f;
  q = q * r + 0.041668389f;
  q = q * r + 0.16666521f;
  q = q * r + 0.49999994f;
  const float y = (q * r) * r + r + 1.0f;
  const std::int32_t power = static_cast<std::int32_t>(n);
  const std::int32_t half = power >> 1;
  const float factor = float_of(static_cast<std::uint32_t>(half + 127) << 23);
  const float rest = float_of(static_cast<std::uint32_t>(power - half + 127) << 23);
  return x == x ? y * factor * rest : x;
}
inline double exp_any(double x) { return std::exp(x); }

// e^x - 1 - x >= 0 of numbers or registers of C, e^x being known: by its series near 0, where the difference would cancel.
template <class C, class V>
inline V expm1_less_x(V x, V exp_x) {
  constexpr C kInverseFactorials[] = {C(1.0 / 6),    C(1.0 / 24),    C(1.0 / 120),    C(1.0 / 720),
                                      C(1.0 / 5040), C(1.0 / 40320), C(1.0 / 362880), C(1.0 / 3628800)};
  V series = V{} + C(1.0 / 39916800);
  for (int k = 7; k >= 0; --k) series = series * x + kInverseFactorials[k];
  series = (series * x + C(0.5)) * (x * x);
  const C near = sizeof(C) == sizeof(float) ? C(1) : C(0.125);
  return ((x < near) & (x > -near)) ? series : exp_x - C(1) - x;
}

// A number or register of numbers, held within [-bound, bound]; NaN stays NaN.
template <class V, class C>
inline V held(V x, C bound) {
  const V most = V{} + bound;
  return x > most ? most : x < -most ? -most : x;
}

// One past the last of n slots that counts, 0 for none.
inline std::int64_t end_of_counted(const std::uint8_t* mask, std::int64_t n) {
  for (std::uint64_t eight; n >= 8; n -= 8) {
    std::memcpy(&eight, mask + n - 8, 8);
    if (eight != 0) break;
  }
  while (n > 0 && mask[n - 1] == 0) --n;
  return n;
}

// `rows` from slot `at` as numbers of the arithmetic: where they lie, or converted into `buffer`.
template <class C>
inline const C* as_compute(const TokenRows& rows, std::int64_t at, std::int64_t n, C* buffer) {
  if (rows.data == nullptr) return nullptr;
  if (rows.dtype == (sizeof(C) == sizeof(float) ? DType::kFloat32 : DType::kFloat64)) {
    return static_cast<const C*>(rows.data) + at;
  }
  load_block(rows, at, n, buffer);
  return buffer;
}

struct Span {
  std::int64_t first;
  std::int64_t size;
};

// The slots of a sequence in a contiguous output.
inline Span span_of(const std::int64_t* cu_seqlens, std::int64_t tokens, std::int64_t sequence) {
  if (cu_seqlens == nullptr) return {sequence * tokens, tokens};
  return {cu_seqlens[sequence], cu_seqlens[sequence + 1] - cu_seqlens[sequence]};
}

// Numbers of a tile, 0 where the mask does not count, and from its end to that of the last register.
template <class C>
inline void take_counted(const std::uint8_t* mask, const TokenRows& rows, std::int64_t at, std::int64_t n, C* out) {
  C buffer[kTile];
  const C* x = as_compute(rows, at, n, buffer);
  for (std::int64_t i = 0; i < n; ++i) out[i] = mask[i] != 0 ? x[i] : C(0);
  for (std::int64_t i = n; i % Lanes<C>::kWidth != 0; ++i) out[i] = C(0);
}

// 1 where the mask counts, else 0, as above.
template <class C>
inline void take_mask(const std::uint8_t* mask, std::int64_t n, C* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = mask[i] != 0 ? C(1) : C(0);
  for (std::int64_t i = n; i % Lanes<C>::kWidth != 0; ++i) out[i] = C(0);
}

template <class C>
inline bool any_lane(C flags) {
  bool any = false;
  for (std::size_t i = 0; i < sizeof(C) / sizeof(flags[0]); ++i) any |= flags[i] != 0;
  return any;
}

// Count, mean and sum of squares about the mean of what counts of a tile; the last is exactly 0 where it does not vary.
template <class C>
inline Moments tile_moments(const C* x, const C* counted, std::int64_t n) {
  using V = typename Lanes<C>::Vec;
  std::int64_t some = 0;
  while (some < n && counted[some] == 0) ++some;
  if (some == n) return {0.0, 0.0, 0.0};
  const V first = V{} + x[some];
  auto varies = first - first != V{};  // an infinity, or NaN
  DoubleSum<C> count, sum, squares;
  for (std::int64_t i = 0; i < n; i += Lanes<C>::kWidth) {
    const V own = load(x + i), counts = load(counted + i);
    count.add(counts);
    sum.add(own);
    varies |= (own != first) & (counts > V{});
  }
  if (!any_lane(varies)) return {count.total(), static_cast<double>(x[some]), 0.0};
  const double mean = sum.total() / count.total();
  for (std::int64_t i = 0; i < n; i += Lanes<C>::kWidth) squares.add_squares(load(x + i), load(counted + i), mean);
  return {count.total(), mean, squares.total()};
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
