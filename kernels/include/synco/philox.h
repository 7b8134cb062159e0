// Philox4x32-10 (Salmon et al., SC 2011) and what is made of its words, bit for bit as in synco_fast/ops/philox.py.
#pragma once

#include "synco/portable.h"

namespace synco {

struct Words {
  uint32_t word[4];
};

// Four random words, a pure function of the 64-bit seed and four counter words.
SYNCO_BOTH Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// [0, 1) with 24 random bits.
SYNCO_BOTH float uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// [0, n) by multiply-shift.
SYNCO_BOTH int integer(uint32_t word, int n) {
  return static_cast<int>((uint64_t{word} * static_cast<uint32_t>(n)) >> 32);
}

}  // namespace synco
