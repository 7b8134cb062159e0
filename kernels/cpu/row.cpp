#include "cpu/row.h"

#include "cpu/vector_math.h"

namespace synco::cpu {
namespace {

SYNCO_INLINE float dot_inline(const float* a, const float* b, int dim) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int d = 0; d < dim; ++d) sum += a[d] * b[d];
  return sum;
}

SYNCO_INLINE float half_to_float(uint16_t half) {
  // Exponents re-biased by a multiplication, which makes subnormals right too; the queue holds no infinities.
  const float magnitude = bits_to_float(static_cast<uint32_t>(half & 0x7fffu) << 13) * 0x1p112f;
  return bits_to_float(float_to_bits(magnitude) | static_cast<uint32_t>(half & 0x8000u) << 16);
}

SYNCO_INLINE void load_row(const Settings& s, int64_t row, float* to) {
  const int64_t start = row * s.dim;
  if (s.type == RowType::kFloat) {
    memcpy(to, static_cast<const float*>(s.queue) + start, sizeof(float) * s.dim);
  } else if (s.type == RowType::kHalf) {
    const uint16_t* from = static_cast<const uint16_t*>(s.queue) + start;
    for (int d = 0; d < s.dim; ++d) to[d] = half_to_float(from[d]);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(s.queue) + start;
    for (int d = 0; d < s.dim; ++d) to[d] = bits_to_float(static_cast<uint32_t>(from[d]) << 16);
  }
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
  Draw* draws = scratch.draws;
  for (int kind = 0; kind < kKinds; ++kind) {
    const Range range = coefficient_range(kind, s.hard);
    for (int i = 0; i < s.hard.count[kind]; ++i)
      draws[i] = draw(kind, range, size, s.seed, query.row, static_cast<uint32_t>(i), s.step);
    for (int i = 0; i < s.hard.count[kind]; ++i) {
      scratch.hard_norm2[draws[i].first] = 0.0f;
      if (kind == kMixed) scratch.hard_norm2[draws[i].second] = 0.0f;
    }
    draws += s.hard.count[kind];
  }
}

// Bring the rows that were drawn together: everything after this stays in the cache.
SYNCO_INLINE void gather(const Settings& s, const Candidates& hard_set, const RowScratch& scratch) {
  constexpr int kAhead = 8;
  for (int i = 0; i < hard_set.size; ++i) {
    if (i + kAhead < hard_set.size && scratch.hard_norm2[i + kAhead] >= 0) prefetch_row(s, hard_set.row[i + kAhead]);
    scratch.hard_weight[i] = 0;
    if (scratch.hard_norm2[i] < 0) continue;
    float* to = scratch.hard_rows + static_cast<int64_t>(i) * s.dim;
    load_row(s, hard_set.row[i], to);
    scratch.hard_norm2[i] = dot_inline(to, to, s.dim);
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

// What all synthetic negatives of a query add up to, but for their parents' weights and the noise.
struct Synthetic {
  double mass[kKinds] = {};
  int64_t rank = 0;
  double on_query = 0, on_sign = 0;  // in double, like hard_weight: hundreds of terms of one sign may meet in each
};

// Weigh every synthetic negative through its closed form; spread the weights over what it is a combination of.
SYNCO_INLINE Synthetic weigh(const Settings& s, const Query& query, const RowScratch& scratch, float log2e_over_t) {
  const int dim = s.dim;
  const float qq = dot_inline(query.q, query.q, dim);
  float l1 = 0, nonzero = 0;
  for (int d = 0; d < dim; ++d) {
    scratch.sign[d] = static_cast<float>((query.q[d] > 0) - (query.q[d] < 0));
    l1 += fabsf(query.q[d]);
    nonzero += scratch.sign[d] != 0;
  }
  Synthetic sum;
  const Draw* draws = scratch.draws;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (int i = 0; i < s.hard.count[kind]; ++i) {
      const Draw& d = draws[i];
      const float* first = scratch.hard_rows + static_cast<int64_t>(d.first) * dim;
      const Terms t = terms(kind, d.coefficient, s.hard.extrapolate_from_negative);
      Products p{};
      p.qq = qq;
      p.q_first = query.hard_set.similarity[d.first];
      p.first2 = scratch.hard_norm2[d.first];
      if (kind == kMixed) {
        p.q_second = query.hard_set.similarity[d.second];
        p.second2 = scratch.hard_norm2[d.second];
        p.first_second = dot_inline(first, scratch.hard_rows + static_cast<int64_t>(d.second) * dim, dim);
      } else if (kind == kNoisy) {
        make_noise(s, query.row, static_cast<uint32_t>(i), scratch.noise);
        p.q_extra = dot_inline(query.q, scratch.noise, dim);
        p.first_extra = dot_inline(first, scratch.noise, dim);
        p.extra2 = dot_inline(scratch.noise, scratch.noise, dim);
      } else if (kind == kAdversarial) {
        p.q_extra = s.hard.eta * l1;
        p.first_extra = s.hard.eta * dot_inline(first, scratch.sign, dim);
        p.extra2 = s.hard.eta * s.hard.eta * nonzero;
      }
      const ClosedForm form = closed_form(t, p);
      const float weight = exp2_of_product(form.similarity, log2e_over_t), scaled = weight * form.scale;
      sum.mass[kind] += weight;
      sum.rank += form.similarity >= query.positive;
      sum.on_query += scaled * t.query;
      scratch.hard_weight[d.first] += scaled * t.first;
      if (kind == kMixed) scratch.hard_weight[d.second] += scaled * t.second;
      if (kind == kAdversarial) sum.on_sign += scaled * s.hard.eta;
      if (kind == kNoisy)
        for (int e = 0; e < dim; ++e) query.pull[e] += scaled * scratch.noise[e];
    }
    draws += s.hard.count[kind];
  }
  return sum;
}

SYNCO_INLINE Synthetic synthesize(const Settings& s, const Query& query, const RowScratch& scratch, float log2e_over_t) {
  make_draws(s, query, scratch);
  gather(s, query.hard_set, scratch);
  const Synthetic sum = weigh(s, query, scratch, log2e_over_t);
  for (int i = 0; i < query.hard_set.size; ++i) {
    const float weight = static_cast<float>(scratch.hard_weight[i]);
    if (weight == 0) continue;
    const float* row = scratch.hard_rows + static_cast<int64_t>(i) * s.dim;
    for (int d = 0; d < s.dim; ++d) query.pull[d] += weight * row[d];
  }
  const float on_query = static_cast<float>(sum.on_query), on_sign = static_cast<float>(sum.on_sign);
  for (int d = 0; d < s.dim; ++d) query.pull[d] += on_query * query.q[d] + on_sign * scratch.sign[d];
  return sum;
}

}  // namespace

SYNCO_CLONES float dot(const float* a, const float* b, int dim) { return dot_inline(a, b, dim); }

SYNCO_CLONES RowResult finish_row(const Settings& s, const Query& query, const RowScratch& scratch, float* gradient) {
  const float log2e_over_t = static_cast<float>(1.4426950408889634 / s.temperature);
  const double positive_weight = exp2_of_product(query.positive, log2e_over_t);
  Synthetic synthetic;
  if (query.hard_set.size > 0) synthetic = synthesize(s, query, scratch, log2e_over_t);

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
  return result;
}

}  // namespace synco::cpu
