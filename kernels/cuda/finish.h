// Row phase: everything of one query after the matrix phase, by one block; and the batch's means at the end.
#pragma once

#include "selection.h"
#include "synthesis.h"

namespace synco::cuda {

// What is kept of each query until the means are taken, in this order.
enum RowStat : int {
  kLoss,
  kAcc1,
  kAcc5,
  kPositive,
  kMassPositive,
  kMassQueue,
  kMassKinds,
  kSyntheticShare = kMassKinds + kKinds,
  kHardSimilarity,
  kRowStatsUsed
};
static_assert(kRowStatsUsed <= kRowStats, "");

enum GroupScalar : int { kOnQuery = kKinds, kOnSign, kSyntheticRank, kHardSum, kGroupScalars };

struct FinishShared {
  SelectionShared selection;
  SynthesisShared synthesis;
  float* pull;     // (kWarps, dim), then (kThreads / dim, dim)
  float* scalars;  // (kWarps, kGroupScalars)
  float* totals;   // (2): sum of the queue's weights, rank
};

inline constexpr unsigned finish_shared_bytes(int dim, int n_hard, int kept_chunks) {
  const unsigned candidates = static_cast<unsigned>(max_candidates(n_hard));
  unsigned end = shared_end<uint4>(0, static_cast<unsigned>(kept_chunks));
  end = shared_end<uint4>(end, candidates / 8);
  end = shared_end<int>(end, candidates);
  end = shared_end<int>(end, kBins);
  end = shared_end<int>(end, kWarps);
  end = shared_end<float>(end, static_cast<unsigned>(dim));
  end = shared_end<int>(end, static_cast<unsigned>(n_hard));
  end = shared_end<Draw>(end, kDrawsAtOnce);
  end = shared_end<float>(end, static_cast<unsigned>(kWarps * dim));
  end = shared_end<float>(end, kWarps * kGroupScalars);
  return shared_end<float>(end, 2);
}

template <int dim>
__device__ __forceinline__ FinishShared take_finish_shared(const Arguments& a, const Plan& p, SharedArena& arena) {
  FinishShared shared;
  uint4* row = arena.take<uint4>(p.keep_row ? p.row_stride / 8 : 0);
  shared.selection.row = p.keep_row ? row : nullptr;
  const unsigned candidates = static_cast<unsigned>(max_candidates(a.hard.n_hard));
  shared.selection.candidates = arena.take<uint4>(candidates / 8);
  shared.selection.candidate_rows = arena.take<int>(candidates);
  shared.selection.histogram = arena.take<int>(kBins);
  shared.selection.scan = arena.take<int>(kWarps);
  shared.selection.query = arena.take<float>(dim);
  shared.selection.hard_set = arena.take<int>(static_cast<unsigned>(a.hard.n_hard));
  shared.synthesis.hard_set = shared.selection.hard_set;
  shared.synthesis.draws = arena.take<Draw>(kDrawsAtOnce);
  shared.pull = arena.take<float>(kWarps * dim);
  shared.scalars = arena.take<float>(kWarps * kGroupScalars);
  shared.totals = arena.take<float>(2);
  return shared;
}

template <int dim>
__device__ __forceinline__ QueryShare<dim> share_query(const Arguments& a, const float* query, int row) {
  QueryShare<dim> share;
  float l1 = 0.f, nonzero = 0.f;
#pragma unroll
  for (int c = 0; c < Share<dim>::chunks; ++c)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float v = query[share_start<dim>(c) + i];
      share.q.v[c * 8 + i] = v;
      l1 += fabsf(v);
      nonzero += v != 0.f ? 1.f : 0.f;
    }
  share.qq = dot<dim>(share.q, share.q);
  share.l1 = sum_over<kGroup<dim>>(l1);
  share.nonzero = sum_over<kGroup<dim>>(nonzero);
  constexpr int kPart = dim / 32;
  float q[kPart], k[kPart];
  with_element(a.k_type, [&](auto type) {
    load_elements<type.value>(a.k, static_cast<size_t>(row) * dim + lane_id() * kPart, k);
  });
#pragma unroll
  for (int j = 0; j < kPart; ++j) q[j] = query[lane_id() * kPart + j];
  share.positive = positive_similarity(q, k);
  share.log2e_over_t = 1.4426950408889634f / a.temperature;
  share.row = a.row_offset + static_cast<uint32_t>(row);
  share.step = static_cast<uint32_t>(load_global(a.step));
  return share;
}

// Add up the groups of a warp, and leave each warp's sums in shared memory.
template <int dim>
__device__ __forceinline__ void gather_groups(const FinishShared& shared, Pulled<dim>& sum, float hard_sum) {
  const auto over_groups = [](float v) {
#pragma unroll
    for (int offset = kGroup<dim>; offset < 32; offset *= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
    return v;
  };
#pragma unroll
  for (int i = 0; i < Share<dim>::size; ++i) sum.pull.v[i] = over_groups(sum.pull.v[i]);
  float scalars[kGroupScalars];
#pragma unroll
  for (int kind = 0; kind < kKinds; ++kind) scalars[kind] = over_groups(sum.mass[kind]);
  scalars[kOnQuery] = over_groups(sum.on_query);
  scalars[kOnSign] = over_groups(sum.on_sign);
  scalars[kSyntheticRank] = over_groups(static_cast<float>(sum.rank));  // exact up to 2^24
  scalars[kHardSum] = sum_over<32>(hard_sum);
  if (lane_id() < kGroup<dim>) {
#pragma unroll
    for (int c = 0; c < Share<dim>::chunks; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) shared.pull[warp_id() * dim + share_start<dim>(c) + i] = sum.pull.v[c * 8 + i];
  }
  if (lane_id() == 0) {
#pragma unroll
    for (int i = 0; i < kGroupScalars; ++i) shared.scalars[warp_id() * kGroupScalars + i] = scalars[i];
  }
}

// The splits' sums of weights and ranks, by warp 0.
__device__ __forceinline__ void gather_splits(const Arguments& a, const Plan& p, int row, float* totals) {
  float weight = 0.f;
  int rank = 0;
  for (int split = lane_id(); split < p.splits; split += 32) {
    const size_t slot = static_cast<size_t>(split) * p.rows_per_pass + row;
    weight += load_global_cg(reinterpret_cast<const float*>(a.workspace + p.weight) + slot);
    rank += load_global_cg(reinterpret_cast<const int*>(a.workspace + p.rank) + slot);
  }
  weight = sum_over<32>(weight);
  rank = __reduce_add_sync(kAllLanes, rank);
  if (lane_id() == 0) {
    totals[0] = weight;
    totals[1] = static_cast<float>(rank);
  }
}

// One query: select, synthesise, add up, write gradient, ranks and row statistics. `row` counts within the pass; the
// similarities of `next`, if there is one, are asked for as soon as there is room.
template <int dim, class Clock>
__device__ __forceinline__ void finish_row(const Arguments& a, const Plan& p, const FinishShared& shared, int first_row,
                                           int row, int next, Clock& clock) {
  const int thread = static_cast<int>(threadIdx.x), batch_row = first_row + row;
  __syncthreads();  // the query before may still be read
  for (int d = thread; d < dim; d += kThreads)
    shared.selection.query[d] = __half2float(load_query(a, static_cast<size_t>(batch_row) * dim + d));
  __syncthreads();

  Pulled<dim> sum{};
  float hard_sum = 0.f;
  const QueryShare<dim> query = share_query<dim>(a, shared.selection.query, batch_row);
  if (a.hard.n_hard) {
    clock.lap(kFinish);
    draw_some(a, shared.synthesis, query.row, query.step, 0);  // while the similarities come
    clock.lap(kDraws);
    const Similarities s = narrow(a, all_similarities(a, p, shared.selection, row), shared.selection);
    const Threshold threshold = find_threshold<dim>(a, s, shared.selection);
    hard_sum = write_hard_set<dim>(a, s, shared.selection, threshold);
    if (next >= 0) bring_similarities(a, p, shared.selection, next);
    clock.lap(kSelection);
    pull_all<dim>(a, query, shared.synthesis, sum, clock);
  }
  gather_groups<dim>(shared, sum, hard_sum);
  if (warp_id() == 0) gather_splits(a, p, row, shared.totals);
  __syncthreads();

  float scalars[kGroupScalars];
#pragma unroll
  for (int i = 0; i < kGroupScalars; ++i) {
    scalars[i] = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) scalars[i] += shared.scalars[w * kGroupScalars + i];
  }
  // Each coordinate by kThreads / dim threads, which share the splits.
  constexpr int kParts = kThreads / dim;
  const int d = thread % dim, part = thread / dim;
  float pull = 0.f;
#pragma unroll 8
  for (int split = part; split < p.splits; split += kParts) {
    const size_t slot = static_cast<size_t>(split) * p.rows_per_pass + row;
    pull += load_global_cg(reinterpret_cast<const float*>(a.workspace + p.pull) + slot * dim + d);
  }
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    if (w % kParts == part) pull += shared.pull[w * dim + d];
  __syncthreads();
  shared.pull[part * dim + d] = pull;
  __syncthreads();

  const float positive_weight = exp2_approx(query.positive * query.log2e_over_t);
  float synthetic = 0.f;
#pragma unroll
  for (int kind = 0; kind < kKinds; ++kind) synthetic += scalars[kind];
  const float total = positive_weight + shared.totals[0] + synthetic;
  if (part == 0) {
#pragma unroll
    for (int other = 1; other < kParts; ++other) pull += shared.pull[other * dim + d];
    const float q = shared.selection.query[d];
    const float sign = q > 0.f ? 1.f : q < 0.f ? -1.f : 0.f;
    pull += scalars[kOnQuery] * q + scalars[kOnSign] * sign;
    const size_t i = static_cast<size_t>(batch_row) * dim + d;
    const float scale = 1.f / (static_cast<float>(a.batch) * a.temperature);
    // positive_weight / total - 1, without the difference of near-equal numbers.
    const float on_key = -(shared.totals[0] + synthetic) / total;
    store_global(a.gradient + i, scale * (pull / total + on_key * load_element(a.k, a.k_type, i)));
  }
  if (thread == 0) {
    const float rank = shared.totals[1];
    store_global(a.rank + batch_row, static_cast<int64_t>(rank));
    store_global(a.rank_all + batch_row, static_cast<int64_t>(rank) + static_cast<int64_t>(scalars[kSyntheticRank]));
    float* stats = reinterpret_cast<float*>(a.workspace + p.stats) + static_cast<size_t>(batch_row) * kRowStats;
    store_global(stats + kLoss, logf(total) - query.positive * query.log2e_over_t * 0.6931471805599453f);
    store_global(stats + kAcc1, rank < 1.f ? 1.f : 0.f);
    store_global(stats + kAcc5, rank < 5.f ? 1.f : 0.f);
    store_global(stats + kPositive, query.positive);
    store_global(stats + kMassPositive, positive_weight / total);
    store_global(stats + kMassQueue, shared.totals[0] / total);
    for (int kind = 0; kind < kKinds; ++kind) store_global(stats + kMassKinds + kind, scalars[kind] / total);
    store_global(stats + kSyntheticShare, synthetic / total);
    store_global(stats + kHardSimilarity, scalars[kHardSum] / fmaxf(static_cast<float>(a.hard.n_hard), 1.f));
  }
}

template <int dim, class Clock>
__device__ __forceinline__ void finish_rows(const Arguments& a, const Plan& p, int first_row, int rows, Clock& clock) {
  SharedArena arena;
  const FinishShared shared = take_finish_shared<dim>(a, p, arena);
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) shared.selection.histogram[i] = 0;
  int row = static_cast<int>(blockIdx.x);
  if (row < rows) bring_similarities(a, p, shared.selection, row);
  for (int next; row < rows; row = next) {
    next = row + static_cast<int>(gridDim.x);
    finish_row<dim>(a, p, shared, first_row, row, next < rows ? next : -1, clock);
  }
  clock.lap(kFinish);
}

// Means over the batch, by one block, each in a fixed order. What was not made has no place in the result.
__device__ __forceinline__ void finish_batch(const Arguments& a, const Plan& p) {
  const bool synthetic = a.hard.n_hard > 0;
  for (int stat = warp_id(); stat < kRowStatsUsed; stat += kWarps) {
    const float* values = reinterpret_cast<const float*>(a.workspace + p.stats) + stat;
    double sum = 0.;
    for (int row = lane_id(); row < a.batch; row += 32)
      sum += load_global_cg(values + static_cast<size_t>(row) * kRowStats);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    int place = stat - kAcc1;
    for (int kind = 0; kind < kKinds; ++kind) {
      if (stat == kMassKinds + kind && a.hard.count[kind] == 0) place = -1;
      if (stat > kMassKinds + kind && a.hard.count[kind] == 0) --place;
    }
    if (stat >= kSyntheticShare && !synthetic) place = -1;
    if (lane_id() != 0) continue;
    const float mean = static_cast<float>(sum / a.batch);
    if (stat == kLoss) store_global(a.loss, mean);
    else if (place >= 0) store_global(a.stats + place, mean);
  }
}

}  // namespace synco::cuda
