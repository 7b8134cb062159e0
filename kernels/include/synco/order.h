// Keys that order like the floats they come from, so that selection can work on bits.
#pragma once

#include "synco/portable.h"

namespace synco {

// a < b exactly when order_key(a) < order_key(b); -0 and 0 get one key. Not for NaN.
SYNCO_BOTH uint32_t order_key(float value) {
  const float zeroed = value + 0.0f;  // -0 + 0 = 0
  uint32_t bits;
  memcpy(&bits, &zeroed, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The float a key was made of.
SYNCO_BOTH float key_value(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace synco
