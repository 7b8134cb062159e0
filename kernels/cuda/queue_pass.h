// Matrix phase: flash-attention's forward with keys = values = queue.
//
// A block takes a row tile of queries against a split of the queue. From each tile of similarities S = q Q^T, while it
// is in registers: the sum of weights w = 2^(S log2e / t), the rank of the positive, S in float16 for selection (only
// if there is one), and O += w Q with w as float16 operand. Never materialised: S in float32, w, logits.
#pragma once

#include "common.h"

namespace synco::cuda {

// Tiles lie in shared memory as rows of 16-byte chunks, permuted so that 8 rows' chunks of one column fall into
// different banks, which is what ldmatrix reads.
template <int dim>
__device__ __forceinline__ half* chunk_at(half* tile, int row, int chunk) {
  return tile + row * dim + ((chunk ^ (row & 7)) * 8);
}

// The float16 operand w must neither overflow nor vanish. Where exponents stay within +-14 no scale is needed; else each
// row is scaled by 2^-exponent, and the exponent grows when a weight would pass 2^15.
constexpr float kFixedRange = 14.f;
constexpr float kGrowAbove = 15.f, kGrowTo = 12.f;

// One thread's share of a warp's 16 queries: rows lane / 4 and lane / 4 + 8.
template <int dim>
struct Sums {
  float pull[dim / 8][4];  // fragments of O, times 2^-exponent
  float weight[2];         // sums of w, times 2^-exponent
  float exponent[2];       // whole numbers
  int rank[2];
};

template <int dim>
__device__ __forceinline__ void load_tile(const Arguments& a, half* tile, int first_row) {
  constexpr int chunks = dim / 8;
#pragma unroll 1  // here and below: unrolled, the addresses would take registers that the sums need
  for (int i = static_cast<int>(threadIdx.x); i < Tile<dim>::columns * chunks; i += kThreads) {
    const int row = i / chunks, chunk = i % chunks;
    const bool valid = first_row + row < a.queue_rows;
    const size_t from = static_cast<size_t>(valid ? first_row + row : 0) * dim + chunk * 8;
    cp_async16(chunk_at<dim>(tile, row, chunk), a.queue + from, valid);
  }
}

// The precision contract: q is rounded once to the queue's dtype. Queries beyond the batch are zeros.
template <int dim>
__device__ __forceinline__ void load_queries(const Arguments& a, half* tile, int first_row, int end_row) {
  constexpr int kAtOnce = 4;  // chunks of a thread that are under way together
  static_assert(kTileRows * dim / 8 % (kAtOnce * kThreads) == 0, "");
  with_element(a.q_type, [&](auto type) {
#pragma unroll 1
    for (int start = static_cast<int>(threadIdx.x); start < kTileRows * dim / 8; start += kAtOnce * kThreads) {
      float q[kAtOnce][8];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = start + j * kThreads, row = min(first_row + i / (dim / 8), end_row - 1);
        load_elements<type.value>(a.q, static_cast<size_t>(row) * dim + i % (dim / 8) * 8, q[j]);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = start + j * kThreads, row = i / (dim / 8);
        const bool exists = first_row + row < end_row;
        const uint4 chunk = make_uint4(pack(q[j][0], q[j][1]), pack(q[j][2], q[j][3]), pack(q[j][4], q[j][5]),
                                       pack(q[j][6], q[j][7]));
        *reinterpret_cast<uint4*>(chunk_at<dim>(tile, row, i % (dim / 8))) = exists ? chunk : make_uint4(0, 0, 0, 0);
      }
    }
  });
}

// q . k of a warp's 16 queries, those of each lane's rows to each lane. A row beyond the batch repeats the last one's k;
// nothing of it is stored.
template <int dim>
__device__ __forceinline__ void multiply_keys(const Arguments& a, half* queries, int first_row, int end_row,
                                              float (&positive)[2]) {
  constexpr int kShare = dim / 32;
  const int first = lane_id() * kShare;
  with_element(a.k_type, [&](auto type) {
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      float k[8][kShare];
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int row = min(first_row + low * 8 + r, end_row - 1);
        load_elements<type.value>(a.k, static_cast<size_t>(row) * dim + first, k[r]);
      }
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const half* from = chunk_at<dim>(queries, warp_id() * 16 + low * 8 + r, first / 8) + first % 8;
        float q[kShare];
#pragma unroll
        for (int j = 0; j < kShare; ++j) q[j] = __half2float(from[j]);
        const float similarity = positive_similarity(q, k[r]);
        if (lane_id() / 4 == r) positive[low] = similarity;
      }
    }
  });
}

template <int dim>
__device__ __forceinline__ void load_query_fragment(half* queries, int step, uint32_t (&fragment)[4]) {
  const int matrix = lane_id() / 8, row = warp_id() * 16 + (matrix & 1) * 8 + lane_id() % 8;
  ldmatrix_x4(fragment, chunk_at<dim>(queries, row, step * 2 + (matrix >> 1)));
}

// S (16 x columns) of a warp's queries with a tile.
template <int dim>
__device__ __forceinline__ void multiply_queries(half* queries, const uint32_t (&kept)[dim / 16][4], half* tile,
                                                 float (&s)[Tile<dim>::columns / 8][4]) {
  const int matrix = lane_id() / 8;
#pragma unroll
  for (int n = 0; n < Tile<dim>::columns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
#pragma unroll
  for (int step = 0; step < dim / 16; ++step) {
    uint32_t q[4];
    if constexpr (Tile<dim>::queries_in_registers) {
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = kept[step][i];
    } else {
      load_query_fragment<dim>(queries, step, q);
    }
#pragma unroll
    for (int n = 0; n < Tile<dim>::columns / 8; n += 2) {
      uint32_t rows[4];
      ldmatrix_x4(rows, chunk_at<dim>(tile, n * 8 + (matrix >> 1) * 8 + lane_id() % 8, step * 2 + (matrix & 1)));
      mma_m16n8k16(s[n], q, {rows[0], rows[1]});
      mma_m16n8k16(s[n + 1], q, {rows[2], rows[3]});
    }
  }
}

// O += w Q, with w in the registers where S was.
template <int dim>
__device__ __forceinline__ void multiply_weights(const float (&w)[Tile<dim>::columns / 8][4], half* tile,
                                                 float (&pull)[dim / 8][4]) {
  const int matrix = lane_id() / 8;
#pragma unroll
  for (int step = 0; step < Tile<dim>::columns / 16; ++step) {
    const float(&low)[4] = w[2 * step];
    const float(&high)[4] = w[2 * step + 1];
    const uint32_t a[4] = {pack(low[0], low[1]), pack(low[2], low[3]), pack(high[0], high[1]), pack(high[2], high[3])};
#pragma unroll
    for (int n = 0; n < dim / 8; n += 2) {
      uint32_t rows[4];
      ldmatrix_x4_transposed(rows,
                             chunk_at<dim>(tile, step * 16 + (matrix & 1) * 8 + lane_id() % 8, n + (matrix >> 1)));
      mma_m16n8k16(pull[n], a, {rows[0], rows[1]});
      mma_m16n8k16(pull[n + 1], a, {rows[2], rows[3]});
    }
  }
}

// Raise a row's exponent where a weight of this tile would pass 2^kGrowAbove, and rescale what was summed before.
template <int dim>
__device__ __forceinline__ void grow_exponents(const float (&s)[Tile<dim>::columns / 8][4], int left,
                                               float log2e_over_t, Sums<dim>& sums) {
  const int column = lane_id() % 4 * 2;
#pragma unroll
  for (int low = 0; low < 2; ++low) {
    float most = -2.f;
#pragma unroll
    for (int n = 0; n < Tile<dim>::columns / 8; ++n) {
      if (n * 8 + column < left) most = fmaxf(most, s[n][2 * low]);
      if (n * 8 + column + 1 < left) most = fmaxf(most, s[n][2 * low + 1]);
    }
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
    const float top = ceilf(most * log2e_over_t);
    if (top - sums.exponent[low] > kGrowAbove) {
      const float factor = exp2_approx(sums.exponent[low] - (top - kGrowTo));
      sums.exponent[low] = top - kGrowTo;
      sums.weight[low] *= factor;
#pragma unroll
      for (int n = 0; n < dim / 8; ++n) {
        sums.pull[n][2 * low] *= factor;
        sums.pull[n][2 * low + 1] *= factor;
      }
    }
  }
}

// S to weights in place, with their sum and the rank. `left` queue rows of the tile exist.
template <int dim>
__device__ __forceinline__ void weigh(float (&s)[Tile<dim>::columns / 8][4], int left, const float (&positive)[2],
                                      float log2e_over_t, Sums<dim>& sums) {
  const int column = lane_id() % 4 * 2;
#pragma unroll
  for (int n = 0; n < Tile<dim>::columns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i / 2;
      const bool exists = n * 8 + column + i % 2 < left;
      sums.rank[row] += exists && s[n][i] >= positive[row];
      const float w = exp2_approx(fmaf(s[n][i], log2e_over_t, -sums.exponent[row]));
      s[n][i] = exists ? w : 0.f;
      sums.weight[row] += s[n][i];
    }
  }
}

// The warp's S as float16 to the workspace: through shared memory, so that each row leaves in whole 16-byte chunks. What
// lies beyond the queue becomes -inf, which selection never takes.
template <int dim>
__device__ __forceinline__ void store_similarity(const float (&s)[Tile<dim>::columns / 8][4], int left, half* staging,
                                                 half* to, int row_stride, int rows) {
  constexpr int columns = Tile<dim>::columns, stride = columns + 8;
  const int row = lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
  for (int n = 0; n < columns / 8; ++n) {
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      const float first = n * 8 + column < left ? s[n][2 * low] : -INFINITY;
      const float second = n * 8 + column + 1 < left ? s[n][2 * low + 1] : -INFINITY;
      const half2 pair = __floats2half2_rn(first, second);
      *reinterpret_cast<half2*>(staging + (row + 8 * low) * stride + n * 8 + column) = pair;
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int i = lane_id(); i < 16 * columns / 8; i += 32) {
    const int r = i / (columns / 8), chunk = i % (columns / 8);
    if (r < rows) {
      const uint4 part = *reinterpret_cast<const uint4*>(staging + r * stride + chunk * 8);
      store_global(reinterpret_cast<uint4*>(to + static_cast<size_t>(r) * row_stride + chunk * 8), part);
    }
  }
  __syncwarp();
}

// Sums of one unit of work to the workspace, freed of their scale.
template <int dim>
__device__ __forceinline__ void store_sums(const Arguments& a, const Plan& p, const Sums<dim>& sums, int split,
                                           int tile_row, int rows) {
#pragma unroll
  for (int low = 0; low < 2; ++low) {
    const int row = tile_row + lane_id() / 4 + 8 * low;
    const float scale = exp2_approx(sums.exponent[low]);
    const float weight = sum_over<4>(sums.weight[low]) * scale;
    int rank = sums.rank[low];
    rank += __shfl_xor_sync(kAllLanes, rank, 1);
    rank += __shfl_xor_sync(kAllLanes, rank, 2);
    if (row >= rows) continue;
    const size_t slot = static_cast<size_t>(split) * p.rows_per_pass + row;
    float* pull = reinterpret_cast<float*>(a.workspace + p.pull) + slot * dim;
#pragma unroll
    for (int n = 0; n < dim / 8; ++n)
      store_global(reinterpret_cast<float2*>(pull + n * 8 + lane_id() % 4 * 2),
                   make_float2(sums.pull[n][2 * low] * scale, sums.pull[n][2 * low + 1] * scale));
    if (lane_id() % 4 == 0) {
      store_global(reinterpret_cast<float*>(a.workspace + p.weight) + slot, weight);
      store_global(reinterpret_cast<int*>(a.workspace + p.rank) + slot, rank);
    }
  }
}

struct PassShared {
  half *queries, *tiles, *staging;
};

template <int dim>
__host__ __device__ constexpr unsigned pass_shared_bytes() {
  unsigned end = shared_end<half, 128>(0, kTileRows * dim);
  end = shared_end<half, 128>(end, Tile<dim>::stages * Tile<dim>::columns * dim);
  return shared_end<half>(end, kWarps * 16 * (Tile<dim>::columns + 8));
}

// Splits differ by at most one tile, so that every block has work.
__device__ __forceinline__ int first_tile(int split, int queue_tiles, int splits) {
  return static_cast<int>(static_cast<int64_t>(split) * queue_tiles / splits);
}

// One row tile against one split. Queries are those of the pass, from first_row of the batch on; `rows` of them.
template <int dim, class Clock>
__device__ __forceinline__ void pass_unit(const Arguments& a, const Plan& p, const PassShared& shared, int row_tile,
                                          int split, int first_row, int rows, Clock& clock) {
  using T = Tile<dim>;
  const float log2e_over_t = 1.4426950408889634f / a.temperature;
  const int warp_row = row_tile * kTileRows + warp_id() * 16;  // within the pass
  const int queue_tiles = (a.queue_rows + T::columns - 1) / T::columns;
  const int begin = first_tile(split, queue_tiles, p.splits), end = first_tile(split + 1, queue_tiles, p.splits);

  for (int stage = 0; stage < T::stages - 1; ++stage) {
    if (begin + stage < end) load_tile<dim>(a, shared.tiles + stage * T::columns * dim, (begin + stage) * T::columns);
    cp_async_commit();
  }
  load_queries<dim>(a, shared.queries, first_row + row_tile * kTileRows, first_row + rows);
  __syncthreads();
  float positive[2] = {0.f, 0.f};
  multiply_keys<dim>(a, shared.queries, first_row + warp_row, first_row + rows, positive);
  uint32_t kept[dim / 16][4] = {};
  if constexpr (T::queries_in_registers)
#pragma unroll
    for (int step = 0; step < dim / 16; ++step) load_query_fragment<dim>(shared.queries, step, kept[step]);

  Sums<dim> sums;
  const bool fixed = log2e_over_t <= kFixedRange;
#pragma unroll
  for (int low = 0; low < 2; ++low) {
    sums.weight[low] = 0.f;
    sums.exponent[low] = fixed ? 0.f : -1000.f;
    sums.rank[low] = 0;
  }
#pragma unroll
  for (int n = 0; n < dim / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.pull[n][i] = 0.f;

  for (int t = begin; t < end; ++t) {
    cp_async_wait<T::stages - 2>();
    __syncthreads();  // tile t has arrived for all, and nobody reads the stage that is filled next
    const int next = t + T::stages - 1;
    if (next < end) load_tile<dim>(a, shared.tiles + (next - begin) % T::stages * T::columns * dim, next * T::columns);
    cp_async_commit();

    half* tile = shared.tiles + (t - begin) % T::stages * T::columns * dim;
    const int left = a.queue_rows - t * T::columns;
    float s[T::columns / 8][4];
    multiply_queries<dim>(shared.queries, kept, tile, s);
    clock.lap(kSimilarity);
    if (a.hard.n_hard) {
      half* to = reinterpret_cast<half*>(a.workspace + p.similarity) + static_cast<size_t>(warp_row) * p.row_stride;
      store_similarity<dim>(s, left, shared.staging + warp_id() * 16 * (T::columns + 8), to + t * T::columns,
                            p.row_stride, rows - warp_row);
      clock.lap(kSelection);
    }
    if (!fixed) grow_exponents<dim>(s, left, log2e_over_t, sums);
    weigh<dim>(s, left, positive, log2e_over_t, sums);
    clock.lap(kWeights);
    multiply_weights<dim>(s, tile, sums.pull);
    clock.lap(kGradient);
  }
  cp_async_wait<0>();
  store_sums<dim>(a, p, sums, split, warp_row, rows);
  clock.lap(kFinish);
}

// All row tiles of a pass against the whole queue.
template <int dim, class Clock>
__device__ __forceinline__ void queue_pass(const Arguments& a, const Plan& p, int first_row, int rows, Clock& clock) {
  SharedArena arena;
  PassShared shared;
  shared.queries = arena.take<half, 128>(kTileRows * dim);
  shared.tiles = arena.take<half, 128>(Tile<dim>::stages * Tile<dim>::columns * dim);
  shared.staging = arena.take<half>(kWarps * 16 * (Tile<dim>::columns + 8));
  const int row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int unit = static_cast<int>(blockIdx.x);  // never more units than blocks: make_plan
  if (unit < row_tiles * p.splits)
    pass_unit<dim>(a, p, shared, unit % row_tiles, unit / row_tiles, first_row, rows, clock);
}

}  // namespace synco::cuda
