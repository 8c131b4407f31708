// Vector registers of one instruction set. Included once for each by logits.cpp, which sets
// PPO_FAST_ISA (a namespace) and PPO_FAST_BYTES (the register's size); hence no include guard.

namespace ppo_fast {
namespace PPO_FAST_ISA {

template <class T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::Type;

template <class C>
struct Lanes {
  static constexpr int kWidth = PPO_FAST_BYTES / sizeof(C);
  typedef C Vec __attribute__((vector_size(PPO_FAST_BYTES)));
};
template <class T>
using Vec = typename Lanes<Compute<T>>::Vec;

typedef std::int32_t IntVec __attribute__((vector_size(PPO_FAST_BYTES)));
typedef std::uint32_t UIntVec __attribute__((vector_size(PPO_FAST_BYTES)));
typedef std::uint16_t HalfVec __attribute__((vector_size(PPO_FAST_BYTES / 2)));

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
inline void store(BFloat16* p, Vec<BFloat16> v) {
  const UIntVec u = reinterpret_cast<UIntVec>(v);
  const UIntVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UIntVec nan = UIntVec{} + 0x7fc0u;
  const HalfVec h = __builtin_convertvector(v == v ? rounded : nan, HalfVec);
  std::memcpy(p, &h, sizeof h);
}

#if PPO_FAST_BYTES > 16
constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif

#if PPO_FAST_BYTES == 64
// One instruction where widening and shifting would be two: each half goes to the upper place of its lane.
inline Vec<BFloat16> load(const BFloat16* p) {
  const __m512i places = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                          3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i halves = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Vec<BFloat16>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, halves);
}
#else
inline Vec<BFloat16> load(const BFloat16* p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  const UIntVec u = __builtin_convertvector(h, UIntVec) << 16;
  return reinterpret_cast<Vec<BFloat16>>(u);
}
#endif

#if PPO_FAST_BYTES == 64  // the zero-masking forms: gcc 12 warns of uninitialised values inside the plain ones
inline Vec<Float16> load(const Float16* p) {
  return (Vec<Float16>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(Float16* p, Vec<Float16> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)v, kToNearest));
}
#elif PPO_FAST_BYTES == 32
inline Vec<Float16> load(const Float16* p) {
  return (Vec<Float16>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(Float16* p, Vec<Float16> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, kToNearest));
}
#else
inline Vec<Float16> load(const Float16* p) {
  Vec<Float16> v;
  for (int i = 0; i < Lanes<float>::kWidth; ++i) v[i] = widen(p[i]);
  return v;
}
inline void store(Float16* p, Vec<Float16> v) {
  for (int i = 0; i < Lanes<float>::kWidth; ++i) p[i] = narrow<Float16>(v[i]);
}
#endif

// The sum of registers in double, lane by lane; of squares about a mean, where `counted` is 1 and not 0.
template <class C>
struct DoubleSum;

template <>
struct DoubleSum<double> {
  Lanes<double>::Vec lanes{};

  void add(Lanes<double>::Vec x) { lanes += x; }
  void add_squares(Lanes<double>::Vec x, Lanes<double>::Vec counted, double mean) {
    const Lanes<double>::Vec deviation = (x - mean) * counted;
    lanes += deviation * deviation;
  }
  void add_scaled(const DoubleSum& other, double factor) { lanes += other.lanes * factor; }
  void scale(double factor) { lanes *= factor; }
  double total() const {
    double sum = 0.0;
    for (int i = 0; i < Lanes<double>::kWidth; ++i) sum += lanes[i];
    return sum;
  }
};

template <>
struct DoubleSum<float> {
  typedef float Half __attribute__((vector_size(PPO_FAST_BYTES / 2)));
  DoubleSum<double> first;
  DoubleSum<double> second;

  void add(Lanes<float>::Vec x) {
    first.add(low(x, kLanes));
    second.add(high(x, kLanes));
  }
  void add_squares(Lanes<float>::Vec x, Lanes<float>::Vec counted, double mean) {
    first.add_squares(low(x, kLanes), low(counted, kLanes), mean);
    second.add_squares(high(x, kLanes), high(counted, kLanes), mean);
  }
  void add_scaled(const DoubleSum& other, double factor) {
    first.add_scaled(other.first, factor);
    second.add_scaled(other.second, factor);
  }
  void scale(double factor) {
    first.scale(factor);
    second.scale(factor);
  }
  double total() const { return first.total() + second.total(); }

 private:
  static constexpr std::make_integer_sequence<int, Lanes<double>::kWidth> kLanes{};

  template <int... I>
  static Lanes<double>::Vec low(Lanes<float>::Vec x, std::integer_sequence<int, I...>) {
    const Half half = __builtin_shufflevector(x, x, I...);
    return __builtin_convertvector(half, Lanes<double>::Vec);
  }
  template <int... I>
  static Lanes<double>::Vec high(Lanes<float>::Vec x, std::integer_sequence<int, I...>) {
    const Half half = __builtin_shufflevector(x, x, (I + Lanes<double>::kWidth)...);
    return __builtin_convertvector(half, Lanes<double>::Vec);
  }
};

// e^x of x <= 0, relative error below 1e-7 where the result is a normal float; anything below that.
// x = n ln 2 + r with |r| <= ln(2)/2, and 1 + r + r^2 q(r) for exp(r), q fitted for the least greatest relative error
// (3.7e-9).
inline Lanes<float>::Vec exp_nonpositive(Lanes<float>::Vec x) {
  const float kShift = 0x1.8p23f;  // adding it rounds to an integer, left in the last bits
  const Lanes<float>::Vec shifted = x * 1.44269504f + kShift;
  const Lanes<float>::Vec n = shifted - kShift;
  const Lanes<float>::Vec r = (x - n * 0.693145751953125f) - n * 1.42860682e-6f;
  Lanes<float>::Vec q = r * 0.0013814539f + 0.0083687454f;
  q = q * r + 0.041668389f;
  q = q * r + 0.16666521f;
  q = q * r + 0.49999994f;
  const Lanes<float>::Vec y = (q * r) * r + r + 1.0f;
  // The power of two multiplies instead of entering y's exponent bits: a NaN's payload would shift into them.
  const UIntVec power = (reinterpret_cast<UIntVec>(shifted) + 127) << 23;
  return y * reinterpret_cast<Lanes<float>::Vec>(power);
}

// e^(d / T) for the distances d <= 0 of a row's logits from their top. `counts` says which are not 0: what is below the least
// normal float is 0, and so is that of d = -inf, whose product with d would be NaN.
#if PPO_FAST_BYTES == 64
// Relative error below 1.8e-7 if `exact`, else more by that of T in float, at most 6e-8 |d| / T. d / T = (n + r) ln(2) / 32 with |r| <= 1/2: the low five bits of n find 2^(n/32) in a
// table, those above are added to its exponent, and 1 + r (a + b r) is 2^(r/32) to 5.3e-8. A third of the instructions
// of a polynomial alone.
template <bool exact>
class FloatExp {
  using V = Lanes<float>::Vec;
  // 2^(k/32) with k << 18 taken off its bits, which is what the low bits of n << 18 add.
  alignas(64) static constexpr std::uint32_t kRoots[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
  };

  V scale_, rest_, low_, high_;  // 32 log2(e) / T and what rounding took from it; both halves of the table

 public:
  using Counts = __mmask16;

  explicit FloatExp(double temperature) {
    const double scale = std::fmin(46.166241308446828 / temperature, FLT_MAX);
    scale_ = V{} + static_cast<float>(scale);
    rest_ = V{} + static_cast<float>(scale - static_cast<double>(static_cast<float>(scale)));
    std::memcpy(&low_, kRoots, sizeof low_);
    std::memcpy(&high_, kRoots + 16, sizeof high_);
  }

  V operator()(V d, Counts& counts) const {
    const V shift = V{} + 0x1.8p23f;  // adding it rounds to an integer, left in the last bits
    const V shifted = (V)_mm512_fmadd_ps((__m512)d, (__m512)scale_, (__m512)shift);
    const V n = shifted - shift;
    V r = (V)_mm512_fmsub_ps((__m512)d, (__m512)scale_, (__m512)n);
    if constexpr (exact) r = (V)_mm512_fmadd_ps((__m512)d, (__m512)rest_, (__m512)r);
    counts = _mm512_cmp_ps_mask((__m512)shifted, (__m512)(shift - 32.0f * 126), _CMP_NLT_UQ);  // NaN counts
    const V root = (V)_mm512_permutex2var_ps((__m512)low_, (__m512i)shifted, (__m512)high_);
    const V power = reinterpret_cast<V>(reinterpret_cast<UIntVec>(root) + (reinterpret_cast<UIntVec>(shifted) << 18));
    const V q = (V)_mm512_fmadd_ps((__m512)r, (__m512)(V{} + 0.00023459618f), (__m512)(V{} + 0.021661166f));
    return (V)_mm512_maskz_fmadd_ps(counts, (__m512)(power * r), (__m512)q, (__m512)power);
  }

  static V product(V x, V y, Counts counts) { return (V)_mm512_maskz_mul_ps(counts, (__m512)x, (__m512)y); }
  static V add_product(V x, V y, V sum, Counts counts) {
    return (V)_mm512_mask3_fmadd_ps((__m512)x, (__m512)y, (__m512)sum, counts);
  }
};
#else
template <bool>
class FloatExp {
  using V = Lanes<float>::Vec;
  float inverse_temperature_;

 public:
  using Counts = decltype(V{} > V{});

  explicit FloatExp(double temperature) : inverse_temperature_(static_cast<float>(1.0 / temperature)) {}

  V operator()(V d, Counts& counts) const {
    const V x = d * inverse_temperature_;
    counts = ~(x < -87.33654f);  // NaN counts
    return counts ? exp_nonpositive(x) : V{};
  }

  static V product(V x, V y, Counts counts) { return counts ? x * y : V{}; }
  static V add_product(V x, V y, V sum, Counts counts) { return sum + product(x, y, counts); }
};
#endif

class DoubleExp {
  using V = Lanes<double>::Vec;
  double inverse_temperature_;

 public:
  using Counts = decltype(V{} > V{});

  explicit DoubleExp(double temperature) : inverse_temperature_(1.0 / temperature) {}

  V operator()(V d, Counts& counts) const {
    V e{};
    for (int i = 0; i < Lanes<double>::kWidth; ++i) e[i] = std::exp(d[i] * inverse_temperature_);
    counts = ~(e == 0.0);
    return e;
  }

  static V product(V x, V y, Counts counts) { return counts ? x * y : V{}; }
  static V add_product(V x, V y, V sum, Counts counts) { return sum + product(x, y, counts); }
};

// By the dtype of the logits: 16-bit ones are themselves rounded 2^15 times as coarsely as T is in float.
template <class T>
using RowExp = std::conditional_t<std::is_same_v<T, double>, DoubleExp, FloatExp<std::is_same_v<T, float>>>;

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
