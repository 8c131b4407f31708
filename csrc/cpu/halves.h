// The two 16-bit float formats, one number at a time, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace ppo_fast {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline std::uint32_t bits_of(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline float float_of(std::uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 h) { return float_of(static_cast<std::uint32_t>(h.bits) << 16); }

inline float widen(Float16 h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (h.bits >> 10) & 0x1fu;
  const std::uint32_t fraction = h.bits & 0x3ffu;
  if (exponent == 0x1fu) return float_of(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {  // zero and subnormal: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return float_of(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

template <class T>
T narrow(double x);

template <>
inline float narrow<float>(double x) {
  return static_cast<float>(x);
}
template <>
inline double narrow<double>(double x) {
  return x;
}
template <>
inline BFloat16 narrow<BFloat16>(double x) {
  const std::uint32_t u = bits_of(static_cast<float>(x));
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline Float16 narrow<Float16>(double x) {
  const std::uint32_t u = bits_of(static_cast<float>(x));
  const std::uint16_t sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
  const std::uint32_t size = u & 0x7fffffffu;
  if (size > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (size >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65520 and above round to inf
  if (size < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal, rounded, in the last bits
    const std::uint32_t shifted = bits_of(float_of(size) + 0.5f);
    return {static_cast<std::uint16_t>(sign | (shifted - 0x3f000000u))};
  }
  const std::uint32_t rounded = size + 0xfffu + ((size >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace ppo_fast
