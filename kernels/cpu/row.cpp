#include "cpu/row.h"

#include <type_traits>

#include "cpu/vector_math.h"

namespace synco::cpu {
namespace {

SYNCO_INLINE float half_to_float(uint16_t half) {
  // Exponents re-biased by a multiplication, which makes subnormals right too; the queue holds no infinities.
  const float magnitude = bits_to_float(static_cast<uint32_t>(half & 0x7fffu) << 13) * 0x1p112f;
  return bits_to_float(float_to_bits(magnitude) | static_cast<uint32_t>(half & 0x8000u) << 16);
}

// A row of the queue in float32: the row itself, or `to` with its values.
SYNCO_INLINE const float* load_row(const Settings& s, int64_t row, float* to) {
  const int64_t start = row * s.dim;
  if (s.type == RowType::kFloat) return static_cast<const float*>(s.queue) + start;
  const uint16_t* from = static_cast<const uint16_t*>(s.queue) + start;
  if (s.type == RowType::kHalf)
    for (int d = 0; d < s.dim; ++d) to[d] = half_to_float(from[d]);
  else
    for (int d = 0; d < s.dim; ++d) to[d] = bits_to_float(static_cast<uint32_t>(from[d]) << 16);
  return to;
}

SYNCO_INLINE void prefetch_row(const Settings& s, int64_t row) {
  const int64_t size = s.dim * (s.type == RowType::kFloat ? 4 : 2);
  const char* start = static_cast<const char*>(s.queue) + row * size;
  for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch(start + byte);
}

// All draws of the query, kind after kind, with the rows they name marked by hard_norm2 = 0.
SYNCO_INLINE void make_draws(const Settings& s, const Query& query, const RowScratch& scratch) {
  const int size = query.hard_set.size;
  for (int i = 0; i < size; ++i) scratch.hard_norm2[i] = -1.0f;
  Draws draws = scratch.draws;
  for (int kind = 0; kind < kKinds; ++kind) {
    const Range range = coefficient_range(kind, s.hard);
    const int count = s.hard.count[kind];
    for (int i = 0; i < count; ++i) {
      const Draw one = draw(kind, range, size, s.seed, query.row, static_cast<uint32_t>(i), s.step);
      draws.first[i] = one.first;
      draws.second[i] = one.second;
      draws.coefficient[i] = one.coefficient;
    }
    for (int i = 0; i < count; ++i) scratch.hard_norm2[draws.first[i]] = 0.0f;
    if (kind == kMixed)
      for (int i = 0; i < count; ++i) scratch.hard_norm2[draws.second[i]] = 0.0f;
    draws = {draws.first + count, draws.second + count, draws.coefficient + count};
  }
}

// Bring the rows that were drawn into the cache: everything after this finds them there.
SYNCO_INLINE void gather(const Settings& s, const Candidates& hard_set, const RowScratch& scratch) {
  constexpr int kAhead = 16;
  for (int i = 0; i < hard_set.size; ++i) {
    if (i + kAhead < hard_set.size && scratch.hard_norm2[i + kAhead] >= 0) prefetch_row(s, hard_set.row[i + kAhead]);
    scratch.hard_weight[i] = 0;
    if (scratch.hard_norm2[i] < 0) continue;
    const float* row = load_row(s, hard_set.row[i], scratch.widened + static_cast<int64_t>(i) * s.dim);
    scratch.hard_rows[i] = row;
    scratch.hard_norm2[i] = dot_inline(row, row, s.dim);
  }
}

// sigma e by Box-Muller, 16 Philox blocks at a time: loops over arrays, which compilers vectorise.
SYNCO_INLINE void make_noise(const Settings& s, uint32_t row, uint32_t sample, float* noise) {
  constexpr int kQuads = kNoiseBlock / 4;
  for (int start = 0; start < s.dim; start += kNoiseBlock) {
    uint32_t word[4][kQuads];
    for (int i = 0; i < kQuads; ++i) {
      const Words words = noise_words(s.seed, row, sample, start / 4 + i, s.step);
      word[0][i] = words.word[0];
      word[1][i] = words.word[1];
      word[2][i] = words.word[2];
      word[3][i] = words.word[3];
    }
    for (int pair = 0; pair < 2; ++pair) {
      float cosine[kQuads], sine[kQuads];
      for (int i = 0; i < kQuads; ++i) {
        const float radius = s.hard.sigma * sqrtf(-2.0f * log_positive(uniform(word[2 * pair][i]) + 0x1p-24f));
        float c, n;
        cosine_sine(uniform(word[2 * pair + 1][i]), c, n);
        cosine[i] = radius * c;
        sine[i] = radius * n;
      }
      for (int i = 0; i < kQuads; ++i) {
        noise[start + 4 * i + 2 * pair] = cosine[i];
        noise[start + 4 * i + 2 * pair + 1] = sine[i];
      }
    }
  }
}

// What the synthetic negatives of a query are made of besides rows of the queue, and what they add up to but for those
// rows' weights and the noise.
struct Synthetic {
  float qq = 0, l1 = 0, nonzero = 0;  // q . q, sum of |q|, number of entries that are not 0
  double mass[kKinds] = {};
  int64_t rank = 0;
  double on_query = 0, on_sign = 0;  // in double, like hard_weight: hundreds of terms of one sign may meet in each
};

// The dot products (synco::Products) of kBlock synthetic negatives, but for q . q.
struct Block {
  float q_first[kBlock], q_second[kBlock], first2[kBlock], second2[kBlock], first_second[kBlock], q_extra[kBlock],
      first_extra[kBlock], extra2[kBlock];
};

SYNCO_INLINE float* noise_of(const RowScratch& scratch, int i) { return scratch.noise + i * scratch.noise_stride; }

template <int kind>
SYNCO_INLINE void multiply(const Settings& s, const Query& query, const RowScratch& scratch, const Synthetic& sum,
                           int first, int second, Block& to, int i) {
  const float* row = scratch.hard_rows[first];
  to.q_first[i] = query.hard_set.similarity[first];
  to.first2[i] = scratch.hard_norm2[first];
  if (kind == kMixed) {
    to.q_second[i] = query.hard_set.similarity[second];
    to.second2[i] = scratch.hard_norm2[second];
    to.first_second[i] = dot_inline(row, scratch.hard_rows[second], s.dim);
  } else if (kind == kNoisy) {
    const float* noise = noise_of(scratch, i);
    to.q_extra[i] = dot_inline(query.q, noise, s.dim);
    to.first_extra[i] = dot_inline(row, noise, s.dim);
    to.extra2[i] = dot_inline(noise, noise, s.dim);
  } else if (kind == kAdversarial) {
    to.q_extra[i] = s.hard.eta * sum.l1;
    to.first_extra[i] = s.hard.eta * dot_inline(row, scratch.sign, s.dim);
    to.extra2[i] = s.hard.eta * s.hard.eta * sum.nonzero;
  }
}

// Weigh a kind's synthetic negatives through their closed form, and spread the weights over what each is a combination
// of: a block at a time, so that the loop in the middle is vectorised.
template <int kind>
SYNCO_INLINE void weigh_kind(const Settings& s, const Query& query, const RowScratch& scratch, const Draws& draws,
                             float log2e_over_t, Synthetic& sum, Clock& clock) {
  constexpr bool extra = kind == kNoisy || kind == kAdversarial;
  Block b;
  float similarity[kBlock], weight[kBlock], on_query[kBlock], on_first[kBlock], on_second[kBlock], scaled[kBlock];
  for (int start = 0; start < s.hard.count[kind]; start += kBlock) {
    const int block = s.hard.count[kind] - start < kBlock ? s.hard.count[kind] - start : kBlock;
    const int32_t *first = draws.first + start, *second = draws.second + start;
    for (int i = 0; i < block; ++i) {
      if (kind == kNoisy) make_noise(s, query.row, static_cast<uint32_t>(start + i), noise_of(scratch, i));
      multiply<kind>(s, query, scratch, sum, first[i], second[i], b, i);
    }
#pragma omp simd
    for (int i = 0; i < block; ++i) {
      const Terms t = terms(kind, draws.coefficient[start + i], s.hard.extrapolate_from_negative);
      const ClosedForm form = closed_form(
          t, {sum.qq, b.q_first[i], kind == kMixed ? b.q_second[i] : 0.0f, b.first2[i],
              kind == kMixed ? b.second2[i] : 0.0f, kind == kMixed ? b.first_second[i] : 0.0f,
              extra ? b.q_extra[i] : 0.0f, extra ? b.first_extra[i] : 0.0f, extra ? b.extra2[i] : 0.0f});
      similarity[i] = form.similarity;
      weight[i] = exp2_of_product(form.similarity, log2e_over_t);
      scaled[i] = weight[i] * form.scale;
      on_query[i] = scaled[i] * t.query;
      on_first[i] = scaled[i] * t.first;
      on_second[i] = scaled[i] * t.second;
    }
    for (int i = 0; i < block; ++i) {
      sum.mass[kind] += weight[i];
      sum.rank += similarity[i] >= query.positive;
      sum.on_query += on_query[i];
      scratch.hard_weight[first[i]] += on_first[i];
      if (kind == kMixed) scratch.hard_weight[second[i]] += on_second[i];
      if (kind == kAdversarial) sum.on_sign += scaled[i] * s.hard.eta;
    }
    if (kind == kNoisy)
      for (int i = 0; i < block; ++i) {
        const float* noise = noise_of(scratch, i);
        for (int d = 0; d < s.dim; ++d) query.pull[d] += scaled[i] * noise[d];
      }
    clock.lap(phase_of(kind));
  }
}

SYNCO_INLINE Synthetic weigh(const Settings& s, const Query& query, const RowScratch& scratch, float log2e_over_t,
                             Clock& clock) {
  Synthetic sum;
  sum.qq = dot_inline(query.q, query.q, s.dim);
  for (int d = 0; d < s.dim; ++d) {
    scratch.sign[d] = static_cast<float>((query.q[d] > 0) - (query.q[d] < 0));
    sum.l1 += fabsf(query.q[d]);
    sum.nonzero += scratch.sign[d] != 0;
  }
  clock.lap(kParents);
  Draws draws = scratch.draws;
  const auto weigh_next = [&](auto kind) __attribute__((always_inline)) {
    weigh_kind<kind.value>(s, query, scratch, draws, log2e_over_t, sum, clock);
    const int count = s.hard.count[kind.value];
    draws = {draws.first + count, draws.second + count, draws.coefficient + count};
  };
  weigh_next(std::integral_constant<int, kInterpolated>{});
  weigh_next(std::integral_constant<int, kExtrapolated>{});
  weigh_next(std::integral_constant<int, kMixed>{});
  weigh_next(std::integral_constant<int, kNoisy>{});
  weigh_next(std::integral_constant<int, kPerturbed>{});
  weigh_next(std::integral_constant<int, kAdversarial>{});
  return sum;
}

// The parents' share of the gradient, four rows at a time: it is read and written once for all of them.
SYNCO_INLINE void add_hard_rows(const Settings& s, const Query& query, const RowScratch& scratch) {
  int drawn = 0;
  for (int i = 0; i < query.hard_set.size; ++i) {
    if (scratch.hard_norm2[i] < 0) continue;
    scratch.hard_rows[drawn] = scratch.hard_rows[i];
    scratch.hard_weight[drawn++] = scratch.hard_weight[i];
  }
  for (int i = 0; i < drawn; i += 4) {
    const float* row[4];
    float weight[4];
    for (int j = 0; j < 4; ++j) {
      row[j] = scratch.hard_rows[i + j < drawn ? i + j : i];
      weight[j] = i + j < drawn ? static_cast<float>(scratch.hard_weight[i + j]) : 0.0f;
    }
    for (int d = 0; d < s.dim; ++d)
      query.pull[d] += weight[0] * row[0][d] + weight[1] * row[1][d] + (weight[2] * row[2][d] + weight[3] * row[3][d]);
  }
}

SYNCO_INLINE Synthetic synthesize(const Settings& s, const Query& query, const RowScratch& scratch,
                                  float log2e_over_t, Clock& clock) {
  make_draws(s, query, scratch);
  clock.lap(kDraws);
  gather(s, query.hard_set, scratch);
  const Synthetic sum = weigh(s, query, scratch, log2e_over_t, clock);
  add_hard_rows(s, query, scratch);
  clock.lap(kParents);
  const float on_query = static_cast<float>(sum.on_query), on_sign = static_cast<float>(sum.on_sign);
  for (int d = 0; d < s.dim; ++d) query.pull[d] += on_query * query.q[d] + on_sign * scratch.sign[d];
  return sum;
}

}  // namespace

SYNCO_CLONES float dot(const float* a, const float* b, int dim) { return dot_inline(a, b, dim); }

SYNCO_CLONES RowResult finish_row(const Settings& s, const Query& query, const RowScratch& scratch, float* gradient,
                                  Clock& clock) {
  const float log2e_over_t = static_cast<float>(1.4426950408889634 / s.temperature);
  const double positive_weight = exp2_of_product(query.positive, log2e_over_t);
  Synthetic synthetic;
  if (query.hard_set.size > 0) synthetic = synthesize(s, query, scratch, log2e_over_t, clock);

  double total = positive_weight + query.queue_weight;
  for (int kind = 0; kind < kKinds; ++kind) total += synthetic.mass[kind];
  const double scale = 1.0 / (s.batch * s.temperature);
  const float on_pull = static_cast<float>(scale / total);
  const float on_key = static_cast<float>(scale * (positive_weight / total - 1.0));
  for (int d = 0; d < s.dim; ++d) gradient[d] = on_pull * query.pull[d] + on_key * query.k[d];

  RowResult result{};
  // The positive in the same rounded 1/t as the weights: what is left is not the difference of two roundings.
  result.loss = log(total) - query.positive * (log2e_over_t * 0.6931471805599453);
  result.positive_similarity = query.positive;
  result.mass_positive = positive_weight / total;
  result.mass_queue = query.queue_weight / total;
  for (int kind = 0; kind < kKinds; ++kind) result.mass[kind] = synthetic.mass[kind] / total;
  double hard_sum = 0;
  for (int i = 0; i < query.hard_set.size; ++i) hard_sum += query.hard_set.similarity[i];
  result.hard_similarity = query.hard_set.size ? hard_sum / query.hard_set.size : 0.0;
  result.rank = query.rank;
  result.rank_all = query.rank + synthetic.rank;
  clock.lap(kFinish);
  return result;
}

}  // namespace synco::cpu
