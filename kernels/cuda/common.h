// Small things that the phases of the kernel share.
#pragma once

#include <type_traits>

#include "gpu.h"
#include "infonce.h"

namespace synco::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x & 31); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

__device__ __forceinline__ float load_element(const void* p, Element type, size_t i) {
  if (type == Element::kFloat) return load_global(static_cast<const float*>(p) + i);
  if (type == Element::kHalf) return __half2float(load_global(static_cast<const half*>(p) + i));
  return __uint_as_float(static_cast<uint32_t>(load_global(static_cast<const uint16_t*>(p) + i)) << 16);
}

// The precision contract: q is rounded once to the queue's dtype.
__device__ __forceinline__ half load_query(const Arguments& a, size_t i) {
  if (a.q_type == Element::kHalf) return load_global(static_cast<const half*>(a.q) + i);
  return __float2half_rn(load_element(a.q, a.q_type, i));
}

// A block's time by phase, of which its thread 0 keeps account without asking the others. Off, it is nothing.
template <bool on>
struct Clock {
  int64_t* phases = nullptr;  // (kPhases)
  uint32_t last = 0;

  __device__ __forceinline__ explicit Clock(const Arguments& a) {
    if constexpr (on) {
      phases = a.phases + static_cast<size_t>(blockIdx.x) * kPhases;
      last = cycles();
    }
  }
  // What has passed since the last lap was this phase.
  __device__ __forceinline__ void lap(Phase phase) {
    if constexpr (on) {
      if (threadIdx.x != 0) return;
      const uint32_t now = cycles();
      add_global(phases + phase, static_cast<int64_t>(now - last));
      last = now;
    }
  }
};

// Sum over 2, 4, ... 32 neighbouring lanes, the same bits in each.
template <int lanes>
__device__ __forceinline__ float sum_over(float v) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

__device__ __forceinline__ float2 unpack(uint32_t pair) {
  const half low = __ushort_as_half(static_cast<unsigned short>(pair));
  const half high = __ushort_as_half(static_cast<unsigned short>(pair >> 16));
  return make_float2(__half2float(low), __half2float(high));
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// Calls f with the element type as a constant: what it does then has no branch, so that its loads are under way together.
template <class F>
__device__ __forceinline__ void with_element(Element type, const F& f) {
  if (type == Element::kFloat) f(std::integral_constant<Element, Element::kFloat>{});
  else if (type == Element::kHalf) f(std::integral_constant<Element, Element::kHalf>{});
  else f(std::integral_constant<Element, Element::kBFloat16>{});
}

template <Element type>
__device__ __forceinline__ float2 unpack_elements(uint32_t pair) {
  if constexpr (type == Element::kHalf) return unpack(pair);
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// n = 2, 4 or 8 neighbouring elements, aligned to their size, in accesses of up to 16 bytes.
template <Element type, int n>
__device__ __forceinline__ void load_elements(const void* p, size_t i, float (&to)[n]) {
  constexpr int bytes = n * (type == Element::kFloat ? 4 : 2), words = bytes / 4, each = words < 4 ? words : 4;
  using Word = std::conditional_t<each == 4, uint4, std::conditional_t<each == 2, uint64_t, uint32_t>>;
  const Word* from = reinterpret_cast<const Word*>(static_cast<const unsigned char*>(p) + i / n * bytes);
  uint32_t word[words];
#pragma unroll
  for (int w = 0; w < words; w += each) {
    const Word loaded = load_global(from + w / each);
    memcpy(word + w, &loaded, sizeof loaded);
  }
#pragma unroll
  for (int w = 0; w < words; ++w) {
    if constexpr (type == Element::kFloat) {
      to[w] = __uint_as_float(word[w]);
    } else {
      const float2 pair = unpack_elements<type>(word[w]);
      to[2 * w] = pair.x;
      to[2 * w + 1] = pair.y;
    }
  }
}

// q . k from the lanes' shares, in one order wherever it is called. All lanes get it.
template <int n>
__device__ __forceinline__ float positive_similarity(const float (&q)[n], const float (&k)[n]) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < n; ++j) sum = fmaf(q[j], k[j], sum);
  return sum_over<32>(sum);
}

}  // namespace synco::cuda
