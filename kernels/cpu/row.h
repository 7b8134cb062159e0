// One query's share of the op after the pass over the queue: synthetic negatives, loss, gradient, statistics.
#pragma once

#include "cpu/clock.h"
#include "cpu/selection.h"
#include "synco/closed_forms.h"

namespace synco::cpu {

enum class RowType { kFloat, kHalf, kBFloat16 };

// What all queries share.
struct Settings {
  HardNegatives hard;
  const void* queue;  // (K, dim) of `type`
  RowType type;
  int dim, batch;
  double temperature;
  uint64_t seed;
  uint32_t step;
};

// One query, and what the pass over the queue left of it.
struct Query {
  const float *q, *k;     // (dim); q rounded to the queue's type
  uint32_t row;           // in the global batch
  float positive;         // q . k
  double queue_weight;    // sum of exp(q . n / t)
  int64_t rank;           // rows of the queue with q . n >= q . k
  float* pull;            // (dim): sum of exp(q . n / t) n; finished in place
  Candidates hard_set;    // ascending rows; size 0 without synthetic negatives
};

// What one query adds to the batch's means.
struct RowResult {
  double loss, positive_similarity, mass_positive, mass_queue, mass[kKinds], hard_similarity;
  int64_t rank, rank_all;
};

// Elements of noise that are made at once, and synthetic negatives that are weighed at once.
constexpr int kNoiseBlock = 64;
constexpr int kBlock = 64;

// What the synthetic negatives of a query are made of (synco::Draw), kind after kind.
struct Draws {
  int32_t *first, *second;  // (total)
  float* coefficient;       // (total)
};

// One thread's buffers, for any query.
struct RowScratch {
  Draws draws;
  const float** hard_rows;  // (n_hard): the rows that were drawn, null for the others
  float* widened;           // (n_hard, dim), where the queue is not float32: what hard_rows points to
  float* hard_norm2;        // (n_hard)
  double* hard_weight;      // (n_hard)
  float* sign;         // (dim)
  float* noise;        // (kBlock, noise_stride)
  int64_t noise_stride;
};

// Dot product in a fixed order, the same for any caller.
float dot(const float* a, const float* b, int dim);

// gradient (dim) is that of the batch's mean loss.
RowResult finish_row(const Settings& settings, const Query& query, const RowScratch& scratch, float* gradient,
                     Clock& clock);

}  // namespace synco::cpu
