// Which synthetic negatives, and the draws each is made of: the C++ side of synco_fast/ops/hard.py and draws.py.
#pragma once

#include "synco/philox.h"

namespace synco {

// The order of synco_fast.ops.KINDS; a kind's position is its number in the Philox counter.
enum Kind : int { kInterpolated, kExtrapolated, kMixed, kNoisy, kPerturbed, kAdversarial };
constexpr int kKinds = 6;

struct HardNegatives {
  int n_hard;
  int count[kKinds];
  float alpha_max, beta_width, gamma_max, sigma, delta, eta;  // beta_width = beta_max - 1, subtracted in double
  bool extrapolate_from_negative;

  SYNCO_BOTH int total() const {
    int sum = 0;
    for (int kind = 0; kind < kKinds; ++kind) sum += count[kind];
    return sum;
  }
};

// What one synthetic negative is made of.
struct Draw {
  int first, second;  // positions of its parents in the hard set; `second` is for `mixed` only
  float coefficient;  // a, b or g; for the other kinds the constant sigma, delta or eta
};

struct Range {
  float low, width;
};

// The interval a kind's coefficient is uniform on.
SYNCO_BOTH Range coefficient_range(int kind, const HardNegatives& hard) {
  switch (kind) {
    case kInterpolated: return {0.0f, hard.alpha_max};
    case kExtrapolated: return {1.0f, hard.beta_width};
    case kMixed: return {0.0f, hard.gamma_max};
    case kNoisy: return {hard.sigma, 0.0f};
    case kPerturbed: return {hard.delta, 0.0f};
    default: return {hard.eta, 0.0f};
  }
}

// Counter words: (global row, sample index within its kind, kind | block << 8, step); block 0 is this one. hard_size is
// the size of the row's hard set.
SYNCO_BOTH Draw draw(int kind, Range range, int hard_size, uint64_t seed, uint32_t row, uint32_t sample,
                     uint32_t step) {
  const Words words = philox(seed, row, sample, static_cast<uint32_t>(kind), step);
  // Product and sum are each rounded, as in PyTorch. A product would be fused into the sum (by g++ for x86-64-v3, by nvcc),
  // also where the sum is written in double: compilers make a float sum of that. An fma cannot be fused once more.
  const float part = fmaf(range.width, uniform(words.word[2]), 0.0f);
  return {integer(words.word[0], hard_size), integer(words.word[1], hard_size), range.low + part};
}

// Blocks 1, 2, ...: the words of noise elements 4 quad .. 4 quad + 3.
SYNCO_BOTH Words noise_words(uint64_t seed, uint32_t row, uint32_t sample, int quad, uint32_t step) {
  return philox(seed, row, sample, static_cast<uint32_t>(kNoisy) | static_cast<uint32_t>(quad + 1) << 8, step);
}

}  // namespace synco
