// A query's synthetic negatives, by one block: drawn, weighed through closed forms, and pulled into the gradient.
//
// A group of lanes takes a synthetic negative, each a share of its parents' rows: read once, they give the dot products of
// the closed form, and then, still in registers, the term of the gradient. Never materialised: synthetic vectors.
#pragma once

#include "common.h"
#include "synco/closed_forms.h"

namespace synco::cuda {

template <int dim>
constexpr int kGroup = dim == 256 ? 16 : 8;  // lanes to a synthetic negative; 32 coordinates each would not fit
constexpr int kDrawsAtOnce = 1024;

// Coordinates of a lane: chunk c of 8 lies at (c * kGroup + lane % kGroup) * 8.
template <int dim>
struct Share {
  static constexpr int chunks = dim / (8 * kGroup<dim>), size = dim / kGroup<dim>;
  float v[size];
};

template <int dim>
__device__ __forceinline__ int share_start(int chunk) {
  return (chunk * kGroup<dim> + lane_id() % kGroup<dim>) * 8;
}

// A lane's share of a row of the queue as it lies there.
template <int dim>
struct PackedShare {
  uint4 chunk[Share<dim>::chunks];
};

template <int dim>
__device__ __forceinline__ PackedShare<dim> load_row(const half* queue, int row) {
  PackedShare<dim> share;
#pragma unroll
  for (int c = 0; c < Share<dim>::chunks; ++c)
    share.chunk[c] =
        load_global(reinterpret_cast<const uint4*>(queue + static_cast<size_t>(row) * dim + share_start<dim>(c)));
  return share;
}

template <int dim>
__device__ __forceinline__ Share<dim> widen(const PackedShare<dim>& packed) {
  Share<dim> share;
#pragma unroll
  for (int c = 0; c < Share<dim>::chunks; ++c) {
    const uint32_t pairs[4] = {packed.chunk[c].x, packed.chunk[c].y, packed.chunk[c].z, packed.chunk[c].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack(pairs[i]);
      share.v[c * 8 + 2 * i] = pair.x;
      share.v[c * 8 + 2 * i + 1] = pair.y;
    }
  }
  return share;
}

template <int dim>
__device__ __forceinline__ float dot(const Share<dim>& a, const Share<dim>& b) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < Share<dim>::size; ++i) sum = fmaf(a.v[i], b.v[i], sum);
  return sum_over<kGroup<dim>>(sum);
}

template <int dim>
__device__ __forceinline__ void add_scaled(Share<dim>& to, float scale, const Share<dim>& from) {
#pragma unroll
  for (int i = 0; i < Share<dim>::size; ++i) to.v[i] = fmaf(scale, from.v[i], to.v[i]);
}

// sigma e, two Philox blocks to a chunk.
template <int dim>
__device__ __forceinline__ Share<dim> make_noise(const Arguments& a, uint32_t row, uint32_t sample, uint32_t step) {
  Share<dim> noise;
#pragma unroll
  for (int c = 0; c < Share<dim>::chunks; ++c)
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
      const Words words = noise_words(a.seed, row, sample, share_start<dim>(c) / 4 + quad, step);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const float radius = a.hard.sigma * sqrtf(-2.f * logf(uniform(words.word[2 * pair]) + 0x1p-24f));
        float sine, cosine;
        sine_cosine_pi(2.f * uniform(words.word[2 * pair + 1]), &sine, &cosine);
        noise.v[c * 8 + quad * 4 + 2 * pair] = radius * cosine;
        noise.v[c * 8 + quad * 4 + 2 * pair + 1] = radius * sine;
      }
    }
  return noise;
}

// What a group of lanes has summed up. Scalars are the same in all its lanes.
template <int dim>
struct Pulled {
  Share<dim> pull;
  float mass[kKinds];
  float on_query, on_sign;
  int rank;
};

// What all groups know of the query.
template <int dim>
struct QueryShare {
  Share<dim> q;
  float qq, l1, nonzero;  // q . q, sum of |q|, number of entries that are not 0
  float positive, log2e_over_t;
  uint32_t row;           // Philox counter words
  uint32_t step;
};

struct SynthesisShared {
  const int* hard_set;  // (n_hard)
  Draw* draws;          // (kDrawsAtOnce)
};

// The rows that a synthetic negative is made of; `second` is for `mixed` only.
template <int dim>
struct Parents {
  PackedShare<dim> first, second;
};

template <int dim, int kind>
__device__ __forceinline__ Parents<dim> load_parents(const Arguments& a, const SynthesisShared& shared, int i) {
  Parents<dim> parents{};
  parents.first = load_row<dim>(a.queue, shared.hard_set[shared.draws[i].first]);
  if constexpr (kind == kMixed) parents.second = load_row<dim>(a.queue, shared.hard_set[shared.draws[i].second]);
  return parents;
}

// One synthetic negative of a kind. Uniform over the warp: where a group has none left, it repeats one that exists and
// `counts` is false.
template <int dim, int kind>
__device__ __forceinline__ void pull_one(const Arguments& a, const QueryShare<dim>& query,
                                         const Parents<dim>& parents, float coefficient, uint32_t sample, bool counts,
                                         Pulled<dim>& sum) {
  const Share<dim> first = widen<dim>(parents.first);
  const Terms t = terms(kind, coefficient, a.hard.extrapolate_from_negative);
  Products p{};
  p.qq = query.qq;
  p.q_first = dot<dim>(query.q, first);
  p.first2 = dot<dim>(first, first);
  Share<dim> other;  // the second parent, or sigma e
  if constexpr (kind == kMixed) {
    other = widen<dim>(parents.second);
    p.q_second = dot<dim>(query.q, other);
    p.second2 = dot<dim>(other, other);
    p.first_second = dot<dim>(first, other);
  } else if constexpr (kind == kNoisy) {
    other = make_noise<dim>(a, query.row, sample, query.step);
    p.q_extra = dot<dim>(query.q, other);
    p.first_extra = dot<dim>(first, other);
    p.extra2 = dot<dim>(other, other);
  } else if constexpr (kind == kAdversarial) {
    float along = 0.f;
#pragma unroll
    for (int i = 0; i < Share<dim>::size; ++i) along += query.q.v[i] > 0.f   ? first.v[i]
                                                        : query.q.v[i] < 0.f ? -first.v[i]
                                                                             : 0.f;
    p.q_extra = a.hard.eta * query.l1;
    p.first_extra = a.hard.eta * sum_over<kGroup<dim>>(along);
    p.extra2 = a.hard.eta * a.hard.eta * query.nonzero;
  }
  const ClosedForm form = closed_form(t, p);
  const float weight = counts ? exp2_approx(form.similarity * query.log2e_over_t) : 0.f;
  const float scaled = weight * form.scale;
  sum.mass[kind] += weight;
  sum.rank += counts && form.similarity >= query.positive;
  sum.on_query = fmaf(scaled, t.query, sum.on_query);
  add_scaled<dim>(sum.pull, scaled * t.first, first);
  if constexpr (kind == kMixed) add_scaled<dim>(sum.pull, scaled * t.second, other);
  if constexpr (kind == kNoisy) add_scaled<dim>(sum.pull, scaled, other);
  if constexpr (kind == kAdversarial) sum.on_sign = fmaf(scaled, a.hard.eta, sum.on_sign);
}

// Draws start .. start + kDrawsAtOnce - 1 of the query's, counted over all kinds in their order, by the block.
__device__ __forceinline__ void draw_some(const Arguments& a, const SynthesisShared& shared, uint32_t row, uint32_t step,
                                          int start) {
  const int end = min(start + kDrawsAtOnce, a.hard.total());
  for (int i = start + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    int kind = 0, sample = i, before = 0;
    Range range{};
#pragma unroll
    for (int each = 0; each < kKinds; ++each) {
      if (i >= before && i < before + a.hard.count[each]) {
        kind = each;
        sample = i - before;
        range = coefficient_range(each, a.hard);
      }
      before += a.hard.count[each];
    }
    shared.draws[i - start] = draw(kind, range, a.hard.n_hard, a.seed, row, static_cast<uint32_t>(sample), step);
  }
}

// Those synthetic negatives of a kind whose draws lie from `start` on, shared out over the block's groups. `before`: how
// many draws the kinds before this one have.
template <int dim, int kind, class Clock>
__device__ __forceinline__ void pull_kind(const Arguments& a, const QueryShare<dim>& query,
                                          const SynthesisShared& shared, int start, int& before, Pulled<dim>& sum,
                                          Clock& clock) {
  constexpr int groups = kThreads / kGroup<dim>;
  const int group = static_cast<int>(threadIdx.x) / kGroup<dim>, begin = before;
  before += a.hard.count[kind];
  const int first = max(begin - start, 0), left = min(before - start, kDrawsAtOnce) - first;
  if (left <= 0) return;
  // Rows are asked for one turn ahead: they take longer to come than a synthetic negative takes.
  const int turns_end = (left + groups - 1) / groups * groups;
  Parents<dim> next = load_parents<dim, kind>(a, shared, first + min(group, left - 1));
  for (int i = group; i < turns_end; i += groups) {
    const Parents<dim> parents = next;
    if (i + groups < turns_end) next = load_parents<dim, kind>(a, shared, first + min(i + groups, left - 1));
    const int own = first + min(i, left - 1);
    const uint32_t sample = static_cast<uint32_t>(start + own - begin);
    pull_one<dim, kind>(a, query, parents, shared.draws[own].coefficient, sample, i < left, sum);
  }
  clock.lap(phase_of(kind));
}

// All synthetic negatives of a query, of which draw_some has drawn the first.
template <int dim, class Clock>
__device__ __forceinline__ void pull_all(const Arguments& a, const QueryShare<dim>& query,
                                         const SynthesisShared& shared, Pulled<dim>& sum, Clock& clock) {
  for (int start = 0; start < a.hard.total(); start += kDrawsAtOnce) {
    if (start) {
      __syncthreads();  // the draws before may still be read
      draw_some(a, shared, query.row, query.step, start);
      __syncthreads();
      clock.lap(kDraws);
    }
    int before = 0;
    pull_kind<dim, kInterpolated>(a, query, shared, start, before, sum, clock);
    pull_kind<dim, kExtrapolated>(a, query, shared, start, before, sum, clock);
    pull_kind<dim, kMixed>(a, query, shared, start, before, sum, clock);
    pull_kind<dim, kNoisy>(a, query, shared, start, before, sum, clock);
    pull_kind<dim, kPerturbed>(a, query, shared, start, before, sum, clock);
    pull_kind<dim, kAdversarial>(a, query, shared, start, before, sum, clock);
  }
}

}  // namespace synco::cuda
