// Small things that the phases of the kernel share.
#pragma once

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

// q . k of one query by a warp, in one order wherever it is called. All lanes get it.
template <int dim>
__device__ __forceinline__ float positive_similarity(const Arguments& a, int row) {
  float sum = 0.f;
#pragma unroll
  for (int d = lane_id(); d < dim; d += 32) {
    const size_t i = static_cast<size_t>(row) * dim + d;
    sum = fmaf(__half2float(load_query(a, i)), load_element(a.k, a.k_type, i), sum);
  }
  return sum_over<32>(sum);
}

}  // namespace synco::cuda
