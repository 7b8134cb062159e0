// exp2, log, sine and cosine as straight-line code that a compiler can vectorise. Libm's are calls.
#pragma once

#include "synco/clones.h"
#include "synco/portable.h"

namespace synco::cpu {

SYNCO_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SYNCO_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Dot product in one fixed order: 16 running sums, then halves onto halves. A plain loop with a reduction would add the
// 16 up one after the other, which takes longer than the products of a row.
SYNCO_INLINE float dot_inline(const float* a, const float* b, int dim) {
  typedef float Vector __attribute__((vector_size(64)));
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Vector sums = {};
  int d = 0;
  for (; d + 16 <= dim; d += 16) {
    Vector left, right;
    memcpy(&left, a + d, sizeof left);
    memcpy(&right, b + d, sizeof right);
    sums += left * right;
  }
  Half half[2];
  memcpy(half, &sums, sizeof sums);
  half[0] += half[1];
  Quarter quarter[2];
  memcpy(quarter, half, sizeof half[0]);
  quarter[0] += quarter[1];
  float sum = (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
  for (; d < dim; ++d) sum += a[d] * b[d];
  return sum;
}

// 2^(x * scale) to 2 units in the last place; infinite from 2^127 on and 0 below 2^-126, which only rows that are far from
// unit length reach. The product is not rounded before it is split into
// whole and fraction (with FMA), which keeps large exponents as exact as small ones.
SYNCO_INLINE float exp2_of_product(float x, float scale) {
  const float magic = 0x1.8p23f;  // adding it leaves the nearest whole number in the low bits
  const float shifted = x * scale + magic;
  const float fraction = x * scale - (shifted - magic);  // in [-0.5, 0.5]
  float p = 1.535336188319500e-4f;                        // Taylor's 2^f, degree 6: relative error 1e-8 there
  p = p * fraction + 1.339887440266574e-3f;
  p = p * fraction + 9.618437357674640e-3f;
  p = p * fraction + 5.550332471162809e-2f;
  p = p * fraction + 2.402264791363012e-1f;
  p = p * fraction + 6.931472028550421e-1f;
  p = p * fraction + 1.0f;
  const float power = bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
  return shifted >= magic + 127.0f ? HUGE_VALF : shifted < magic - 125.0f ? 0.0f : power;
}

// Natural logarithm of a positive normal number.
SYNCO_INLINE float log_positive(float x) {
  const uint32_t bits = float_to_bits(x);
  // Mantissa in [sqrt(1/2), sqrt(2)), so that the series is in a small argument.
  const uint32_t offset = bits - 0x3f3504f3u;
  const float exponent = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  const float f = bits_to_float((offset & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  // log((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + ...) with s = f / (2 + f), |s| < 0.172
  const float s = f / (2.0f + f), z = s * s;
  float p = 2.0f / 11.0f;
  p = p * z + 2.0f / 9.0f;
  p = p * z + 2.0f / 7.0f;
  p = p * z + 2.0f / 5.0f;
  p = p * z + 2.0f / 3.0f;
  return exponent * 0.693147180559945f + (2.0f * s + s * z * p);
}

// Cosine and sine of a whole turn's share u in [0, 1).
SYNCO_INLINE void cosine_sine(float u, float& cosine, float& sine) {
  const int32_t quadrant = static_cast<int32_t>(u * 4.0f + 0.5f);
  const float x = (u - static_cast<float>(quadrant) * 0.25f) * 6.283185307179586f;  // in [-pi/4, pi/4]
  const float z = x * x;
  const float s = x * (1.0f + z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880)))));
  const float c = 1.0f + z * (-0.5f + z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320))));
  const float swapped_cosine = quadrant & 1 ? s : c, swapped_sine = quadrant & 1 ? c : s;
  cosine = (quadrant + 1) & 2 ? -swapped_cosine : swapped_cosine;
  sine = quadrant & 2 ? -swapped_sine : swapped_sine;
}

}  // namespace synco::cpu
