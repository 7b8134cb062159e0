// The N most similar rows of the queue, found exactly while the similarities stream past.
#pragma once

#include <limits>

#include "cpu/compress.h"
#include "synco/order.h"

namespace synco::cpu {

// One query's candidates in ascending queue row. Never more than `capacity` are held: when they would be, all but about
// the n largest are dropped, and from then on only what exceeds the smallest of them is taken.
struct Candidates {
  float* similarity;
  int32_t* row;
  int capacity, n;
  int size = 0;
  float threshold = -std::numeric_limits<float>::infinity();  // strictly above it
};

// Similarities are looked at in blocks of this many.
constexpr int kScanBlock = 256;

// How many may be left when a buffer is full: a bound that leaves up to n / 8 more than n is found in half the time.
constexpr int loosely(int n) { return n + n / 8; }

// A capacity at which a buffer does not shrink at every block.
constexpr int capacity_for(int n) { return loosely(n) + (n > 1024 ? n : 1024) + kScanBlock + kCompressSlack; }

// Take what may belong to the hard set from similarities of the rows first_row, first_row + 1, ...
void scan(Candidates& candidates, const float* similarity, int first_row, int count);

// Drop what cannot belong to the n largest, ties going to the lower row, until at most `most` >= n are left.
void shrink(Candidates& candidates, int most);

}  // namespace synco::cpu
