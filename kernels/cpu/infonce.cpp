// Tiles of the queue through ATen's matrix product; from each tile, while it is in the cache: sum of weights, rank,
// candidates for the hard set, and the weighted sum of its rows. Then, query by query, the synthetic negatives, loss
// and gradient (row.cpp). Never materialised: similarities beyond a tile, logits, softmax, synthetic vectors.
//
// Work is cut into row tiles x splits of the queue, by the shapes alone; partial results are added in a fixed order. So
// the number of threads changes nothing, to the bit.

#include "cpu/infonce.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/clock.h"
#include "cpu/row.h"
#include "cpu/vector_math.h"

namespace synco::cpu {
namespace {

constexpr int64_t kTileRows = 128;     // queries of a tile
constexpr int64_t kTileColumns = 512;  // queue rows of a tile: similarities and queue rows share the L2 cache
constexpr int64_t kTasks = 16;         // at least so many, when there is so much to do

struct Weighed {
  double weight;
  int64_t rank;
};

// exp(similarity / t) over similarity, with its sum, and the number of similarities at or above the positive.
SYNCO_CLONES Weighed weigh(float* similarity, int count, float positive, float log2e_over_t) {
  float weight = 0;
  int rank = 0;
#pragma omp simd reduction(+ : weight, rank)
  for (int i = 0; i < count; ++i) {
    rank += similarity[i] >= positive;
    similarity[i] = exp2_of_product(similarity[i], log2e_over_t);
    weight += similarity[i];
  }
  return {weight, rank};
}

// Whether oneDNN's bfloat16 products with float32 sums are there (AMX, or AVX-512's), and not switched off.
bool has_bfloat16_products() {
#if defined(__x86_64__)
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool found = [] {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    const at::BFloat16 operand[32] = {};
    float product[1];
    try {
      at::native::cpublas::brgemm(1, 1, 32, 32, 1, 1, false, operand, operand, product);
      at::native::cpublas::brgemm_release();
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }();
  return found;
#else
  return false;
#endif
}

// The inputs as float32, and what is fixed by their shapes.
struct Plan {
  at::Tensor q, k, queue;  // q rounded to the queue's dtype, then float32
  at::Tensor q_bfloat16;   // q in bfloat16, where similarities are bfloat16 products
  HardNegatives hard;
  double temperature;
  int64_t batch, rows, dim, row_tiles, splits, split_rows;
  int n_hard, capacity;  // of the hard set, and of a candidate buffer; 0 without synthetic negatives

  Plan(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& queue_, const HardNegatives& hard_, double t)
      : q(q_.to(queue_.scalar_type()).to(at::kFloat).contiguous()),
        k(k_.to(at::kFloat).contiguous()),
        queue(queue_.contiguous()),
        hard(hard_),
        temperature(t),
        batch(q.size(0)),
        rows(queue.size(0)),
        dim(q.size(1)),
        row_tiles((batch + kTileRows - 1) / kTileRows),
        n_hard(hard.total() ? hard.n_hard : 0),
        capacity(n_hard ? capacity_for(n_hard) : 0) {
    const int64_t tiles = (rows + kTileColumns - 1) / kTileColumns;
    splits = std::min((kTasks + row_tiles - 1) / row_tiles, tiles);
    split_rows = (tiles + splits - 1) / splits * kTileColumns;
    splits = (rows + split_rows - 1) / split_rows;
    if (queue.scalar_type() == at::kBFloat16 && dim % 2 == 0 && has_bfloat16_products())
      q_bfloat16 = q.to(at::kBFloat16);
  }

  float log2e_over_t() const { return static_cast<float>(1.4426950408889634 / temperature); }
};

// What the splits of the queue leave of each query.
struct Partials {
  at::Tensor pull;  // (splits, B, D)
  std::vector<double> weight;        // (splits, B)
  std::vector<int64_t> rank;         // (splits, B)
  at::Tensor similarity, row;        // (splits, B, n_hard): candidates
  std::vector<int32_t> size;         // (splits, B)
  std::vector<std::atomic<float>> bound;  // (B): n_hard rows of one split reach it
  std::vector<float> positive;       // (B)

  explicit Partials(const Plan& p)
      : pull(at::empty({p.splits, p.batch, p.dim}, at::kFloat)),
        weight(p.splits * p.batch),
        rank(p.splits * p.batch),
        similarity(at::empty({p.splits * p.batch * p.n_hard}, at::kFloat)),
        row(at::empty({p.splits * p.batch * p.n_hard}, at::kInt)),
        size(p.splits * p.batch),
        bound(p.batch),
        positive(p.batch) {
    const float *q = p.q.const_data_ptr<float>(), *k = p.k.const_data_ptr<float>();
    for (int64_t b = 0; b < p.batch; ++b) positive[b] = dot(q + b * p.dim, k + b * p.dim, static_cast<int>(p.dim));
    for (auto& one : bound) one = -std::numeric_limits<float>::infinity();
  }

  float* similarities(int64_t slot, int n_hard) { return similarity.mutable_data_ptr<float>() + slot * n_hard; }
  int32_t* rows(int64_t slot, int n_hard) { return row.mutable_data_ptr<int32_t>() + slot * n_hard; }
};

// One thread's buffers for the pass over the queue.
struct PassScratch {
  at::Tensor similarity, converted, packed;
  std::vector<float> candidate_similarity;
  std::vector<int32_t> candidate_row;

  explicit PassScratch(const Plan& p)
      : similarity(at::empty({kTileRows * kTileColumns}, at::kFloat)),
        candidate_similarity(kTileRows * p.capacity),
        candidate_row(kTileRows * p.capacity) {
    if (p.queue.scalar_type() != at::kFloat) converted = at::empty({kTileColumns, p.dim}, at::kFloat);
    if (p.q_bfloat16.defined()) packed = at::empty({kTileColumns * p.dim}, at::kBFloat16);
  }
};

// to (dim / 2, columns) = transpose of rows (columns, dim / 2), pairs of bfloat16: the layout of brgemm's right operand.
SYNCO_CLONES void pack_pairs(const uint32_t* rows, int columns, int pairs, uint32_t* to) {
  constexpr int kStrip = 16;  // rows whose pairs lie in the L1 cache
  for (int start = 0; start < columns; start += kStrip) {
    const int strip = columns - start < kStrip ? columns - start : kStrip;
    for (int pair = 0; pair < pairs; ++pair)
      for (int i = 0; i < strip; ++i) to[pair * columns + start + i] = rows[(start + i) * pairs + pair];
  }
}

// similarity (rows, columns) = q tile^T, the products of bfloat16 operands, exact, summed in float32.
void multiply_bfloat16(const Plan& p, int64_t first, int64_t rows, const at::Tensor& tile, PassScratch& scratch) {
  const int64_t columns = tile.size(0);
  at::BFloat16* packed = scratch.packed.mutable_data_ptr<at::BFloat16>();
  pack_pairs(static_cast<const uint32_t*>(tile.const_data_ptr()), static_cast<int>(columns),
             static_cast<int>(p.dim / 2), reinterpret_cast<uint32_t*>(packed));
  at::native::cpublas::brgemm(rows, columns, p.dim, p.dim, columns, columns, false,
                              p.q_bfloat16.const_data_ptr<at::BFloat16>() + first * p.dim, packed,
                              scratch.similarity.mutable_data_ptr<float>());
  at::native::cpublas::brgemm_release();  // AMX's tiles: the float32 product that follows may want them its own way
}

// Scan, with the best bound that any split has found so far. Which that is depends on the order in which threads run;
// the hard set does not, for only what cannot be in it is left out: n rows of another split reach its bound, so nothing
// below it can, but a lower row may still tie with it.
void select(Candidates& candidates, std::atomic<float>& bound, const float* similarity, int first_row, int count) {
  const float before = bound.load(std::memory_order_relaxed);
  float just_below = std::nextafter(before, -std::numeric_limits<float>::infinity());
  // A denormal counts as 0 on a thread that flushes them.
  if (just_below < 0 && just_below > -std::numeric_limits<float>::min()) just_below = -std::numeric_limits<float>::min();
  candidates.threshold = std::max(candidates.threshold, just_below);
  scan(candidates, similarity, first_row, count);
  if (candidates.threshold > before) bound.store(candidates.threshold, std::memory_order_relaxed);
}

// One row tile against one split of the queue.
void pass(const Plan& p, int64_t row_tile, int64_t split, PassScratch& scratch, Partials& partials, Clock& clock) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;  // thread-local, so here and not only in infonce
  const int64_t first = row_tile * kTileRows, rows = std::min(kTileRows, p.batch - first);
  const at::Tensor q = p.q.narrow(0, first, rows);
  at::Tensor pull = partials.pull.select(0, split).narrow(0, first, rows);
  const int64_t slot = split * p.batch + first;
  std::vector<Candidates> candidates;
  for (int64_t r = 0; r < (p.n_hard ? rows : 0); ++r)
    candidates.push_back({scratch.candidate_similarity.data() + r * p.capacity,
                          scratch.candidate_row.data() + r * p.capacity, p.capacity, p.n_hard});

  const int64_t begin = split * p.split_rows, end = std::min(begin + p.split_rows, p.rows);
  for (int64_t start = begin; start < end; start += kTileColumns) {
    const int64_t columns = std::min(kTileColumns, end - start);
    at::Tensor tile = p.queue.narrow(0, start, columns);
    if (scratch.packed.defined()) multiply_bfloat16(p, first, rows, tile, scratch);
    if (scratch.converted.defined()) tile = scratch.converted.narrow(0, 0, columns).copy_(tile);
    at::Tensor similarity = scratch.similarity.narrow(0, 0, rows * columns).view({rows, columns});
    if (!scratch.packed.defined()) at::mm_out(similarity, q, tile.t());
    clock.lap(kSimilarity);
    float* s = similarity.mutable_data_ptr<float>();
    for (int64_t r = 0; r < rows; ++r, s += columns) {
      const int count = static_cast<int>(columns);
      if (p.n_hard) {
        select(candidates[r], partials.bound[first + r], s, static_cast<int>(start), count);
        clock.lap(kSelection);
      }
      const Weighed weighed = weigh(s, count, partials.positive[first + r], p.log2e_over_t());
      partials.weight[slot + r] += weighed.weight;
      partials.rank[slot + r] += weighed.rank;
      if (p.n_hard) clock.lap(kWeights);
    }
    clock.lap(kWeights);
    if (start == begin) at::mm_out(pull, similarity, tile);
    else pull.addmm_(similarity, tile);
    clock.lap(kGradient);
  }

  for (int64_t r = 0; r < (p.n_hard ? rows : 0); ++r) {
    shrink(candidates[r], p.n_hard);
    std::copy_n(candidates[r].similarity, candidates[r].size, partials.similarities(slot + r, p.n_hard));
    std::copy_n(candidates[r].row, candidates[r].size, partials.rows(slot + r, p.n_hard));
    partials.size[slot + r] = candidates[r].size;
  }
  if (p.n_hard) clock.lap(kSelection);
}

// One thread's buffers for finishing queries.
struct FinishScratch {
  std::vector<float> candidate_similarity, floats;
  std::vector<int32_t> candidate_row, integers;
  std::vector<const float*> hard_rows;
  std::vector<double> hard_weight;
  RowScratch row;

  explicit FinishScratch(const Plan& p)
      : candidate_similarity(p.splits * p.n_hard + kCompressSlack),
        floats(widened_size(p) + p.n_hard + p.hard.total() + p.dim + kBlock * noise_stride(p)),
        candidate_row(p.splits * p.n_hard + kCompressSlack),
        integers(2 * p.hard.total()),
        hard_rows(p.n_hard),
        hard_weight(p.n_hard) {
    float* next = floats.data();
    const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
    row.draws = {integers.data(), integers.data() + p.hard.total(), take(p.hard.total())};
    row.hard_rows = hard_rows.data();
    row.widened = take(widened_size(p));
    row.hard_norm2 = take(p.n_hard);
    row.hard_weight = hard_weight.data();
    row.sign = take(p.dim);
    row.noise = take(kBlock * noise_stride(p));
    row.noise_stride = noise_stride(p);
  }

  static int64_t noise_stride(const Plan& p) {
    return p.hard.count[kNoisy] ? (p.dim + kNoiseBlock - 1) / kNoiseBlock * kNoiseBlock : 0;
  }
  static int64_t widened_size(const Plan& p) { return p.queue.scalar_type() == at::kFloat ? 0 : p.n_hard * p.dim; }
};

RowType row_type(const at::Tensor& queue) {
  if (queue.scalar_type() == at::kHalf) return RowType::kHalf;
  return queue.scalar_type() == at::kBFloat16 ? RowType::kBFloat16 : RowType::kFloat;
}

// Add up the splits of query b, select its hard set among their candidates, and finish it.
RowResult finish(const Plan& p, const Settings& settings, int64_t b, uint32_t row_offset, FinishScratch& scratch,
                 Partials& partials, float* gradient, Clock& clock) {
  const int dim = static_cast<int>(p.dim);
  Query query{p.q.const_data_ptr<float>() + b * dim,
              p.k.const_data_ptr<float>() + b * dim,
              row_offset + static_cast<uint32_t>(b),
              partials.positive[b],
              0,
              0,
              partials.pull.mutable_data_ptr<float>() + b * dim,
              {scratch.candidate_similarity.data(), scratch.candidate_row.data(), 0, p.n_hard}};
  Candidates& hard_set = query.hard_set;
  for (int64_t slot = b; slot < p.splits * p.batch; slot += p.batch) {
    query.queue_weight += partials.weight[slot];
    query.rank += partials.rank[slot];
    if (slot != b)
      for (int d = 0; d < dim; ++d) query.pull[d] += partials.pull.const_data_ptr<float>()[slot * dim + d];
  }
  clock.lap(kFinish);
  for (int64_t slot = b; p.n_hard && slot < p.splits * p.batch; slot += p.batch) {
    std::copy_n(partials.similarities(slot, p.n_hard), partials.size[slot], hard_set.similarity + hard_set.size);
    std::copy_n(partials.rows(slot, p.n_hard), partials.size[slot], hard_set.row + hard_set.size);
    hard_set.size += partials.size[slot];
  }
  shrink(hard_set, p.n_hard);
  if (p.n_hard) clock.lap(kSelection);
  return finish_row(settings, query, scratch.row, gradient + b * dim, clock);
}

// Tasks 0 .. count - 1, each by whichever thread is free. Matrix products within are single-threaded whatever the number
// of threads: in a parallel region of several, or with one thread in all.
template <class Scratch, class Task>
void for_each_task(const Plan& plan, int64_t count, std::vector<Clock>& clocks, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, static_cast<int64_t>(clocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      Clock& clock = clocks[worker];
      clock.lap(kWaiting);
      if (next >= count) continue;
      Scratch scratch(plan);
      for (int64_t i; (i = next++) < count;) task(i, scratch, clock);
    }
  });
}

at::Tensor statistics(const HardNegatives& hard, const std::vector<RowResult>& rows) {
  std::vector<double> mean;
  const auto add = [&](auto value) {
    double sum = 0;
    for (const RowResult& row : rows) sum += static_cast<double>(value(row));
    mean.push_back(sum / static_cast<double>(rows.size()));
    return mean.back();
  };
  add([](const RowResult& r) { return r.rank < 1; });
  add([](const RowResult& r) { return r.rank < 5; });
  add([](const RowResult& r) { return r.positive_similarity; });
  add([](const RowResult& r) { return r.mass_positive; });
  add([](const RowResult& r) { return r.mass_queue; });
  double synthetic = 0;
  for (int kind = 0; kind < kKinds; ++kind)
    if (hard.count[kind]) synthetic += add([kind](const RowResult& r) { return r.mass[kind]; });
  if (hard.total()) {
    mean.push_back(synthetic);
    add([](const RowResult& r) { return r.hard_similarity; });
  }
  return at::tensor(mean, at::kFloat);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> infonce(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& queue, const HardNegatives& hard, double temperature,
    uint64_t seed, uint32_t step, uint32_t row_offset, int64_t* phases) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  std::vector<Clock> clocks(std::max<int64_t>(at::get_num_threads(), 1), Clock(phases));
  const Plan plan(q, k, queue, hard, temperature);
  Partials partials(plan);
  clocks[0].lap(kSimilarity);
  const auto pass_task = [&](int64_t task, PassScratch& scratch, Clock& clock) {
    pass(plan, task / plan.splits, task % plan.splits, scratch, partials, clock);
  };
  for_each_task<PassScratch>(plan, plan.row_tiles * plan.splits, clocks, pass_task);

  const Settings settings{hard, plan.queue.const_data_ptr(), row_type(plan.queue), static_cast<int>(plan.dim),
                          static_cast<int>(plan.batch), temperature, seed, step};
  at::Tensor gradient = at::empty({plan.batch, plan.dim}, at::kFloat);
  std::vector<RowResult> rows(plan.batch);
  for_each_task<FinishScratch>(plan, plan.batch, clocks, [&](int64_t b, FinishScratch& scratch, Clock& clock) {
    rows[b] = finish(plan, settings, b, row_offset, scratch, partials, gradient.mutable_data_ptr<float>(), clock);
  });
  clocks[0].lap(kWaiting);

  at::Tensor rank = at::empty({plan.batch}, at::kLong), rank_all = at::empty({plan.batch}, at::kLong);
  double loss = 0;
  for (int64_t b = 0; b < plan.batch; ++b) {
    loss += rows[b].loss;
    rank.mutable_data_ptr<int64_t>()[b] = rows[b].rank;
    rank_all.mutable_data_ptr<int64_t>()[b] = rows[b].rank_all;
  }
  at::Tensor stats = statistics(hard, rows);
  clocks[0].lap(kFinish);
  for (Clock& clock : clocks) {
    clock.lap(kWaiting);
    for (int phase = 0; phases && phase < kPhases; ++phase)
      __atomic_fetch_add(phases + phase, clock.nanoseconds(phase), __ATOMIC_RELAXED);
  }
  return {at::scalar_tensor(loss / static_cast<double>(plan.batch), at::kFloat), gradient, rank, rank_all, stats};
}

}  // namespace synco::cpu
