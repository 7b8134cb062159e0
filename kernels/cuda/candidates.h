// A query's similarities: brought in, and narrowed to the few that can be in its hard set, by one block.
#pragma once

#include "common.h"

namespace synco::cuda {

constexpr int kBins = 2048;  // of a histogram: 11 bits of a key at a time

struct SelectionShared {
  uint4* row;             // the similarities, if Plan::keep_row
  uint4* candidates;      // (max_candidates / 8) those that narrow() left
  int* candidate_rows;    // (max_candidates)
  int* histogram;         // (kBins), all 0 between its uses
  int* scan;              // (kWarps)
  float* query;           // (dim)
  int* hard_set;          // (n_hard) queue rows
};

// Room for what narrow() leaves; more than twice the hard set is left only where many similarities tie.
inline __host__ __device__ constexpr int max_candidates(int n_hard) {
  return n_hard == 0 ? 0 : n_hard < 256 ? 512 : (2 * n_hard + 7) / 8 * 8;
}

// Orders like the float16 of these bits; -0 and 0 get one key.
__device__ __forceinline__ int half_key(uint32_t bits) {
  if (bits == 0x8000u) bits = 0;
  return static_cast<int>(bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u);
}

__device__ __forceinline__ uint32_t element_bits(const uint4& chunk, int i) {
  const uint32_t pair = i < 4 ? (i < 2 ? chunk.x : chunk.y) : (i < 6 ? chunk.z : chunk.w);
  return i & 1 ? pair >> 16 : pair & 0xffffu;
}

// Similarities of a query in ascending queue rows, 8 to a chunk; what fills up the last chunks is -inf.
struct Similarities {
  const uint4* global;
  const uint4* shared;  // the same where they are in shared memory, else null
  const int* rows;      // the queue row of each; null where element i is row i
  int chunks;

  __device__ __forceinline__ uint4 load(int i) const { return shared ? shared[i] : load_global_cg(global + i); }
  __device__ __forceinline__ int row(int element) const { return rows ? rows[element] : element; }
};

// Sum over the block of `value`, and of the values of the threads before: one value of each thread. Two barriers.
struct Scanned {
  int before, total;
};
__device__ __forceinline__ Scanned block_scan(int value, int* scratch) {
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane_id() >= offset) sum += other;
  }
  if (lane_id() == 31) scratch[warp_id()] = sum;
  __syncthreads();
  int before = sum - value, total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp_id()) before += scratch[w];
    total += scratch[w];
  }
  __syncthreads();
  return {before, total};
}

// The same within a warp for values below 16, four votes in place of a chain of shuffles.
__device__ __forceinline__ Scanned warp_scan_small(unsigned value) {
  const unsigned lanes_before = (1u << lane_id()) - 1u;
  Scanned sum{0, 0};
#pragma unroll
  for (int bit = 0; bit < 4; ++bit) {
    const unsigned votes = __ballot_sync(kAllLanes, value >> bit & 1u);
    sum.before += __popc(votes & lanes_before) << bit;
    sum.total += __popc(votes) << bit;
  }
  return sum;
}

struct Found {
  int bin, above, inside;  // the bin that holds the n-th largest; how many lie in the bins above, and in it
};

// Look down a complete histogram, and clear it. Barriers on both sides are inside.
__device__ __forceinline__ Found find_bin(const SelectionShared& shared, int n) {
  constexpr int kEach = kBins / kThreads;
  const int first = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;  // thread 0 has the highest bins
  __syncthreads();
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += shared.histogram[first - i];
  int above = block_scan(sum, shared.scan).before;
  if (above < n && n <= above + sum) {
    int bin = first;
    while (above + shared.histogram[bin] < n) above += shared.histogram[bin--];
    shared.scan[0] = bin;
    shared.scan[1] = above;
    shared.scan[2] = shared.histogram[bin];
  }
  __syncthreads();
  const Found found{shared.scan[0], shared.scan[1], shared.scan[2]};
#pragma unroll
  for (int i = 0; i < kEach; ++i) shared.histogram[first - i] = 0;
  __syncthreads();
  return found;
}

// The chunks of a row that a warp looks at, in order, 32 at a time: [begin, end), the same for its lanes.
struct Segment {
  int begin, end;
};
__device__ __forceinline__ Segment warp_segment(int chunks) {
  const int rounds = (chunks + 32 * kWarps - 1) / (32 * kWarps);
  const int begin = min(warp_id() * rounds * 32, chunks);
  return {begin, min(begin + rounds * 32, chunks)};
}

__device__ __forceinline__ half2 half_pair(uint32_t bits) {
  half2 pair;
  memcpy(&pair, &bits, sizeof pair);
  return pair;
}

__device__ __forceinline__ int largest_key(const uint4& chunk) {
  const half2 most = __hmax2(__hmax2(half_pair(chunk.x), half_pair(chunk.y)),
                             __hmax2(half_pair(chunk.z), half_pair(chunk.w)));
  uint32_t bits;
  memcpy(&bits, &most, sizeof bits);
  return max(half_key(bits & 0xffffu), half_key(bits >> 16));
}

// Which of a chunk's 8 elements are at least `bound`, bit by bit; NaN is not.
__device__ __forceinline__ unsigned at_least(const uint4& chunk, half2 bound) {
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  unsigned mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned reached = __hge2_mask(half_pair(pairs[i]), bound);  // 0xffff for each half that does
    mask |= ((reached & 1u) | (reached >> 15 & 2u)) << (2 * i);
  }
  return mask;
}

// All similarities of a query.
__device__ __forceinline__ Similarities all_similarities(const Arguments& a, const Plan& p,
                                                         const SelectionShared& shared, int row) {
  const int chunks = p.row_stride / 8;
  const uint4* first = reinterpret_cast<const uint4*>(a.workspace + p.similarity) + static_cast<size_t>(row) * chunks;
  return {first, shared.row, nullptr, chunks};
}

// Start to copy them to shared memory, if Plan::keep_row: a thread the chunks thread, thread + kThreads, ...
__device__ __forceinline__ void bring_similarities(const Arguments& a, const Plan& p, const SelectionShared& shared,
                                                   int row) {
  if (!shared.row) return;
  const Similarities s = all_similarities(a, p, shared, row);
  for (int i = static_cast<int>(threadIdx.x); i < s.chunks; i += kThreads)
    cp_async16(shared.row + i, s.global + i, true);
  cp_async_commit();
}

// Of the chunks' largest elements take the n-th largest: n elements reach it, so what does not is not among the n
// largest. What does is written to shared memory, in order. A histogram of the chunks' largest takes an eighth of the
// atomic operations of one of all elements, and what comes after has little more than n elements to look at. Where
// there are fewer chunks than n, or the candidates do not fit, all similarities are returned. Barriers on both sides
// are inside. `all` was asked for by bring_similarities.
__device__ __forceinline__ Similarities narrow(const Arguments& a, const Similarities& all,
                                               const SelectionShared& shared) {
  const int n = a.hard.n_hard;
  cp_async_wait<0>();  // this thread's chunks have come; those of others, after a barrier
  if (all.chunks < n) {
    __syncthreads();
    return all;
  }
  for (int i = static_cast<int>(threadIdx.x); i < all.chunks; i += kThreads)
    atomicAdd(shared.histogram + (largest_key(all.load(i)) >> 5), 1);
  const uint32_t key = static_cast<uint32_t>(find_bin(shared, n).bin) << 5;  // the bin's lower end
  const uint32_t bits = key & 0x8000u ? key & 0x7fffu : ~key & 0xffffu;
  const half2 bound = half_pair(bits << 16 | bits);

  const Segment segment = warp_segment(all.chunks);
  int own = 0;
  for (int i = segment.begin + lane_id(); i < segment.end; i += 32) own += __popc(at_least(all.load(i), bound));
  const int of_warp = __reduce_add_sync(kAllLanes, own);
  const Scanned warps = block_scan(lane_id() == 31 ? of_warp : 0, shared.scan);
  if (warps.total < n || warps.total > max_candidates(n)) return all;

  half* candidates = reinterpret_cast<half*>(shared.candidates);
  int before = warps.before;
  for (int first = segment.begin; first < segment.end; first += 32) {
    const int i = first + lane_id();
    const uint4 chunk = i < segment.end ? all.load(i) : make_uint4(0, 0, 0, 0);
    unsigned mask = i < segment.end ? at_least(chunk, bound) : 0u;
    const Scanned lanes = warp_scan_small(static_cast<unsigned>(__popc(mask)));
    int place = before + lanes.before;
    before += lanes.total;
    for (; mask; mask &= mask - 1, ++place) {
      const int element = __ffs(static_cast<int>(mask)) - 1;
      candidates[place] = __ushort_as_half(static_cast<unsigned short>(element_bits(chunk, element)));
      shared.candidate_rows[place] = i * 8 + element;
    }
  }
  const int chunks = (warps.total + 7) / 8;
  for (int i = warps.total + static_cast<int>(threadIdx.x); i < chunks * 8; i += kThreads) {
    candidates[i] = __ushort_as_half(0xfc00);
    shared.candidate_rows[i] = 0;
  }
  __syncthreads();
  return {nullptr, shared.candidates, shared.candidate_rows, chunks};
}

}  // namespace synco::cuda
