#include "cpu/selection.h"

#include "cpu/vector_math.h"

namespace synco::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

SYNCO_CLONES int count_at_least(const float* values, int count, float bound) {
  int sum = 0;
  for (int i = 0; i < count; ++i) sum += values[i] >= bound;
  return sum;
}

SYNCO_CLONES int count_equal(const float* values, int count, float value) {
  int sum = 0;
  for (int i = 0; i < count; ++i) sum += values[i] == value;
  return sum;
}

struct Extremes {
  float least, most;
};

SYNCO_CLONES Extremes extremes(const float* values, int count) {
  float least = kInfinity, most = -kInfinity;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int i = 0; i < count; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  return {least, most};
}

// A bound that at least n of the values reach, and by how many more than n they do.
struct Bound {
  float value;
  int surplus;
};

// By halving the range of the values' keys, until at most `most` reach the bound; count >= n.
Bound bound_of_n_largest(const float* values, int count, int n, int most) {
  const Extremes ends = extremes(values, count);
  uint32_t low = order_key(ends.least), high = order_key(ends.most);
  int reached = count;  // how many values have keys >= low; never fewer than n
  while (low < high && reached > most) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    const int at_least = count_at_least(values, count, key_value(middle));
    if (at_least >= n) {
      low = middle;
      reached = at_least;
    } else {
      high = middle - 1;
    }
  }
  return {key_value(low), reached - n};
}

// Where no bound would do, the surplus consists of values equal to it: the last of them go, which are the higher rows.
void drop_last_equal(Candidates& c, const Bound& bound) {
  int equal_left = count_equal(c.similarity, c.size, bound.value) - bound.surplus, kept = 0;
  for (int i = 0; i < c.size; ++i) {
    const bool equal = c.similarity[i] == bound.value;
    c.similarity[kept] = c.similarity[i];
    c.row[kept] = c.row[i];
    kept += !equal || equal_left > 0;
    equal_left -= equal;
  }
  c.size = kept;
}

}  // namespace

void shrink(Candidates& c, int most) {
  if (c.size <= most) return;
  const Bound bound = bound_of_n_largest(c.similarity, c.size, c.n, most);
  c.size = keep_at_least(c.similarity, c.row, c.size, bound.value);
  if (c.size > most) drop_last_equal(c, bound);
  c.threshold = bound.value;
}

void scan(Candidates& c, const float* similarity, int first_row, int count) {
  for (int start = 0; start < count; start += kScanBlock) {
    const int block = count - start < kScanBlock ? count - start : kScanBlock;
    if (c.size + block + kCompressSlack > c.capacity) shrink(c, loosely(c.n));
    c.size += append_above(similarity + start, block, first_row + start, c.threshold, c.similarity + c.size,
                           c.row + c.size);
  }
}

}  // namespace synco::cpu
