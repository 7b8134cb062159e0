// Keeping what passes a bound, in order: the one loop of selection that compilers do not vectorise by themselves.
#pragma once

#include <cstdint>

namespace synco::cpu {

// Both write whole vectors: up to this many entries past the last one kept.
constexpr int kCompressSlack = 16;

// Append (values[i], first_row + i) for all values[i] > bound to `to_values` and `to_rows`. Returns how many.
int append_above(const float* values, int count, int32_t first_row, float bound, float* to_values, int32_t* to_rows);

// Drop, in place, all entries with values[i] < bound. Returns how many are left.
int keep_at_least(float* values, int32_t* rows, int count, float bound);

}  // namespace synco::cpu
