// Exact selection of a query's hard set from its float16 similarities, by one block.
//
// They are first narrowed to candidates (candidates.h). A radix search finds the n-th largest float16 key; what is above
// it is above it in float32 too. Those equal to it are told apart, when not all of them are taken, by their float32 dot
// products, which are computed again (a second radix search), and what is equal still by the lower queue row. The hard
// set comes out in ascending queue rows.
#pragma once

#include "candidates.h"
#include "synco/order.h"

namespace synco::cuda {

// The float32 key of q . n for queue row `row`, by a warp, in one order wherever it is called.
template <int dim>
__device__ __forceinline__ uint32_t dot_key(const Arguments& a, const float* query, int row) {
  float sum = 0.f;
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(a.queue + static_cast<size_t>(row) * dim);
#pragma unroll
  for (int i = lane_id(); i < dim / 2; i += 32) {
    const float2 n = unpack(load_global(pairs + i));
    sum = fmaf(query[2 * i], n.x, fmaf(query[2 * i + 1], n.y, sum));
  }
  return order_key(sum_over<32>(sum));
}

// Calls visit(lane, element, float32 key) for each similarity among 32 chunks whose float16 key is `tied`; the whole warp
// computes each key and makes each call. `first` is the chunk of lane 0.
template <int dim, class Visit>
__device__ __forceinline__ void visit_ties(const Arguments& a, const Similarities& s, const float* query,
                                           const uint4& chunk, bool exists, int first, int tied, const Visit& visit) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    unsigned lanes = __ballot_sync(kAllLanes, exists && half_key(element_bits(chunk, i)) == tied);
    while (lanes) {
      const int lane = __ffs(static_cast<int>(lanes)) - 1;
      lanes &= lanes - 1;
      // With NaN among the similarities, what lies beyond the queue may be tied.
      visit(lane, i, dot_key<dim>(a, query, min(s.row((first + lane) * 8 + i), a.queue_rows - 1)));
    }
  }
}

// What belongs to the hard set: float16 keys above `half_bound`; of those equal to it all, or else those whose float32
// key is above `bound`, and the first `equal` of those equal to that too.
struct Threshold {
  int half_bound;
  bool all_tied;
  uint32_t bound;
  int equal;
};

// The radix search among the float32 keys of the tied.
template <int dim>
__device__ __forceinline__ void split_ties(const Arguments& a, const Similarities& s, const SelectionShared& shared,
                                           int room, Threshold& threshold) {
  const Segment segment = warp_segment(s.chunks);
  uint32_t prefix = 0;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift == 10 ? 0 : -1) {
    const int bits = shift ? 11 : 10;
    for (int first = segment.begin; first < segment.end; first += 32) {
      const bool exists = first + lane_id() < segment.end;
      const uint4 chunk = exists ? s.load(first + lane_id()) : make_uint4(0, 0, 0, 0);
      visit_ties<dim>(a, s, shared.query, chunk, exists, first, threshold.half_bound, [&](int, int, uint32_t key) {
        const bool inside = shift == 21 || key >> (shift + bits) == prefix;
        if (inside && lane_id() == 0) atomicAdd(shared.histogram + (key >> shift & ((1u << bits) - 1u)), 1);
      });
    }
    const Found found = find_bin(shared, room);
    prefix = prefix << bits | static_cast<uint32_t>(found.bin);
    room -= found.above;
  }
  threshold.bound = prefix;
  threshold.equal = room;
}

template <int dim>
__device__ __forceinline__ Threshold find_threshold(const Arguments& a, const Similarities& s,
                                                    const SelectionShared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < s.chunks; i += kThreads) {
    const uint4 chunk = s.load(i);
#pragma unroll
    for (int e = 0; e < 8; ++e) atomicAdd(shared.histogram + (half_key(element_bits(chunk, e)) >> 5), 1);
  }
  const Found high = find_bin(shared, a.hard.n_hard);
  for (int i = thread; i < s.chunks; i += kThreads) {
    const uint4 chunk = s.load(i);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int key = half_key(element_bits(chunk, e));
      if (key >> 5 == high.bin) atomicAdd(shared.histogram + (key & 31), 1);
    }
  }
  const Found low = find_bin(shared, a.hard.n_hard - high.above);
  const int room = a.hard.n_hard - high.above - low.above;
  Threshold threshold{high.bin << 5 | low.bin, room == low.inside, 0, 0};
  if (!threshold.all_tied) split_ties<dim>(a, s, shared, room, threshold);
  return threshold;
}

// Which of a lane's 8 elements are in the hard set for sure, and which are equal to the bound: bit by bit.
struct Membership {
  unsigned sure, equal;
};
template <int dim>
__device__ __forceinline__ Membership membership(const Arguments& a, const Similarities& s, const Threshold& threshold,
                                                 const float* query, const uint4& chunk, bool exists, int first) {
  Membership m{0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int key = half_key(element_bits(chunk, i));
    const bool sure = key > threshold.half_bound || (key == threshold.half_bound && threshold.all_tied);
    m.sure |= static_cast<unsigned>(exists && sure) << i;
  }
  if (!threshold.all_tied)
    visit_ties<dim>(a, s, query, chunk, exists, first, threshold.half_bound, [&](int lane, int i, uint32_t key) {
      if (lane != lane_id()) return;
      m.sure |= static_cast<unsigned>(key > threshold.bound) << i;
      m.equal |= static_cast<unsigned>(key == threshold.bound) << i;
    });
  return m;
}

// How many are before this lane's first element, in the segments before and in this one.
struct Before {
  int sure, equal;
};

// Write the hard set in ascending queue rows. Returns this thread's share of the sum of its similarities.
template <int dim>
__device__ __forceinline__ float write_hard_set(const Arguments& a, const Similarities& s,
                                                const SelectionShared& shared, const Threshold& threshold) {
  const Segment segment = warp_segment(s.chunks);
  int sure = 0, equal = 0;
  for (int first = segment.begin; first < segment.end; first += 32) {
    const bool exists = first + lane_id() < segment.end;
    const uint4 chunk = exists ? s.load(first + lane_id()) : make_uint4(0, 0, 0, 0);
    const Membership m = membership<dim>(a, s, threshold, shared.query, chunk, exists, first);
    sure += __popc(m.sure);
    equal += __popc(m.equal);
  }
  // Lanes of a warp are not in the order of elements here, warps are: what is before a warp is before all its lanes.
  const int warp_sure = __reduce_add_sync(kAllLanes, sure), warp_equal = __reduce_add_sync(kAllLanes, equal);
  Before before;
  before.sure = block_scan(lane_id() == 31 ? warp_sure : 0, shared.scan).before;
  before.equal = block_scan(lane_id() == 31 ? warp_equal : 0, shared.scan).before;

  float sum = 0.f;
  for (int first = segment.begin; first < segment.end; first += 32) {
    const bool exists = first + lane_id() < segment.end;
    const uint4 chunk = exists ? s.load(first + lane_id()) : make_uint4(0, 0, 0, 0);
    const Membership m = membership<dim>(a, s, threshold, shared.query, chunk, exists, first);
    const Scanned lanes_sure = warp_scan_small(static_cast<unsigned>(__popc(m.sure)));
    const Scanned lanes_equal = warp_scan_small(static_cast<unsigned>(__popc(m.equal)));
    Before lane{before.sure + lanes_sure.before, before.equal + lanes_equal.before};
    before = {before.sure + lanes_sure.total, before.equal + lanes_equal.total};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool is_equal = m.equal >> i & 1u, taken = (m.sure >> i & 1u) || (is_equal && lane.equal < threshold.equal);
      if (taken) {
        const int place = lane.sure + min(lane.equal, threshold.equal);
        // With NaN among the similarities, what lies beyond the queue may be taken.
        shared.hard_set[place] = min(s.row((first + lane_id()) * 8 + i), a.queue_rows - 1);
        sum += __half2float(__ushort_as_half(static_cast<unsigned short>(element_bits(chunk, i))));
      }
      lane.sure += m.sure >> i & 1u;
      lane.equal += is_equal;
    }
  }
  __syncthreads();
  return sum;
}

}  // namespace synco::cuda
