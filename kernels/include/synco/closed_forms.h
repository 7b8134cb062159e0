// Similarity of a query with a synthetic negative that is never made (docs/design.md, The op).
#pragma once

#include "synco/negatives.h"

namespace synco {

// A shorter synthetic vector is divided by this and not by its length (synco_fast/ops/numbers.py).
constexpr float kMinNorm = 1e-2f;

// A synthetic vector before normalisation: query q + first n_i + second n_j (+ sigma e, or eta sign(q)).
struct Terms {
  float query, first, second;
};

SYNCO_BOTH Terms terms(int kind, float c, bool extrapolate_from_negative) {
  switch (kind) {
    case kInterpolated: return {c, 1.0f - c, 0.0f};
    case kExtrapolated: return extrapolate_from_negative ? Terms{-c, 1.0f + c, 0.0f} : Terms{1.0f - c, c, 0.0f};
    case kMixed: return {0.0f, c, 1.0f - c};
    case kPerturbed: return {c, 1.0f, 0.0f};
    default: return {0.0f, 1.0f, 0.0f};
  }
}

// The dot products that a kind's similarity is a function of. What a kind does not have is 0.
struct Products {
  float qq;                   // q . q: rounding leaves it off 1
  float q_first, q_second;    // q . n_i, q . n_j
  float first2, second2;      // n_i . n_i, n_j . n_j
  float first_second;         // n_i . n_j
  float q_extra, first_extra; // with extra = sigma e or eta sign(q)
  float extra2;
};

struct ClosedForm {
  float similarity;  // q . v / |v|
  float scale;       // 1 / |v|
};

SYNCO_BOTH ClosedForm closed_form(const Terms& t, const Products& p) {
  const float dot = t.query * p.qq + t.first * p.q_first + t.second * p.q_second + p.q_extra;
  const float length2 = t.query * t.query * p.qq + t.first * t.first * p.first2 + t.second * t.second * p.second2 +
                        2.0f * (t.query * (t.first * p.q_first + t.second * p.q_second) +
                                t.first * t.second * p.first_second + t.first * p.first_extra) +
                        p.extra2;
  // Not fmaxf, which compilers for the CPU do not vectorise.
  const float scale = 1.0f / sqrtf(length2 > kMinNorm * kMinNorm ? length2 : kMinNorm * kMinNorm);
  return {dot * scale, scale};
}

}  // namespace synco
