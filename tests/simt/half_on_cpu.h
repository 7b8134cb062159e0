// float16 for g++, under the names of cuda_fp16.h: conversions in integers, since the processor at hand may have none.
#pragma once

#include <cstdint>
#include <cstring>

struct __attribute__((may_alias)) __half {
  uint16_t bits;
};
struct __attribute__((may_alias, aligned(4))) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

namespace simt {
inline uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
inline float bits_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
}  // namespace simt

inline half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(half h) { return h.bits; }

// To the nearest, ties to even; a NaN becomes 0x7fff, as on the device.
inline half __float2half_rn(float f) {
  const uint32_t u = simt::float_bits(f), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above
  uint32_t rounded;
  if (magnitude < 0x38800000u) {
    // Below 2^-14, where halves are multiples of 2^-24: as are the floats from 0.5 to 1, so the addition rounds.
    rounded = simt::float_bits(simt::bits_float(magnitude) + 0.5f) - simt::float_bits(0.5f);
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | rounded)};
}

// Exact. Without branches, so that loops over it become vector code.
inline float __half2float(half h) {
  const uint32_t magnitude = h.bits & 0x7fffu, sign = (h.bits & 0x8000u) << 16;
  // 2^112 mends the exponent's bias, for subnormal halves too; infinities and NaNs get their exponent by hand.
  const uint32_t finite = simt::float_bits(simt::bits_float(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return simt::bits_float(sign | finite | special);
}

inline half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

// The larger of each pair of elements: a number rather than a NaN, 0 rather than -0.
inline half2 __hmax2(half2 a, half2 b) {
  const auto larger = [](half x, half y) -> half {
    const float u = __half2float(x), v = __half2float(y);
    if (u != u || v != v) return u == u ? x : v == v ? y : half{0x7fff};
    return u > v || (u == v && !(x.bits & 0x8000u)) ? x : y;
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}

// 0xffff in each half of the result where a >= b; false with a NaN.
inline unsigned __hge2_mask(half2 a, half2 b) {
  return (__half2float(a.x) >= __half2float(b.x) ? 0xffffu : 0u) |
         (__half2float(a.y) >= __half2float(b.y) ? 0xffff0000u : 0u);
}
