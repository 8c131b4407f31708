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
inline Vec<BFloat16> load(const BFloat16* p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  const UIntVec u = __builtin_convertvector(h, UIntVec) << 16;
  return reinterpret_cast<Vec<BFloat16>>(u);
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

// exp on [-1000, 0], relative error below 1e-7; below ln(FLT_MIN) 0, with AVX-512 the subnormal; NaN stays NaN.
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
#if PPO_FAST_BYTES == 64  // 2^n y in one instruction, which is not held up by a NaN's payload either
  return (Lanes<float>::Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)n);
#else
  // The power of two multiplies instead of entering y's exponent bits: a NaN's payload would shift into them.
  const IntVec power = (reinterpret_cast<IntVec>(shifted) + 127) << 23;
  return x < -87.33654f ? Lanes<float>::Vec{} : y * reinterpret_cast<Lanes<float>::Vec>(power);
#endif
}

inline Lanes<double>::Vec exp_nonpositive(Lanes<double>::Vec x) {
  for (int i = 0; i < Lanes<double>::kWidth; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace PPO_FAST_ISA
}  // namespace ppo_fast
