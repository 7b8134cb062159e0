// float16 of the gateway against its definition, over every half. As selftest.cu, this tests the emulator when built by
// g++, and that the hardware means the same when built by nvcc and run on a GPU:
//   nvcc -std=c++17 -arch=native -I kernels/cuda tests/simt/selftest_half.cu -o selftest_half && ./selftest_half
#include <cmath>
#include <cstdio>
#include <vector>

#include "on_device.h"

using namespace synco;

namespace {

__global__ void round_to_half(const float* in, uint16_t* out, uint16_t* out_pairs, unsigned n) {
  for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
    const float f = load_global(&in[i]);
    store_global(&out[i], __half_as_ushort(__float2half_rn(f)));
    const half2 pair = __floats2half2_rn(-f, f);
    store_global(&out_pairs[2 * i], __half_as_ushort(pair.x));
    store_global(&out_pairs[2 * i + 1], __half_as_ushort(pair.y));
  }
}
__global__ void widen(uint32_t* out) {
  for (unsigned i = threadIdx.x; i < 65536; i += blockDim.x) {
    const half h = __ushort_as_half(static_cast<unsigned short>(i));
    const float2 pair = __half22float2(half2{h, h});
    store_global(&out[i], __float_as_uint(i & 1 ? pair.y : __half2float(h)));
  }
}

double half_value(uint32_t bits) {  // an infinity is 2^16, beyond all finite ones
  const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
  const double magnitude = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Every half; and around every midpoint of neighbours the two floats next to it and the midpoint itself.
void test_half() {
  const OnDevice<uint32_t> wide(65536);
  RUN(widen, 1, 256, 0, wide);
  const std::vector<uint32_t> floats = wide.values();
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const float f = bit_cast<float>(floats[bits]);
    if ((bits & 0x7fff) > 0x7c00) EXPECT(std::isnan(f), "%04x is a NaN", bits);
    else if ((bits & 0x7fff) == 0x7c00) EXPECT(std::isinf(f) && (f < 0) == (bits >> 15), "%04x is infinite", bits);
    else EXPECT(f == half_value(bits) && std::signbit(f) == (bits >> 15 == 1), "%04x is %g", bits, f);
  }

  std::vector<float> in{NAN, INFINITY, -INFINITY, 65519.99f, 65520.f, 1e30f, -1e30f, 1e-30f, -0.f, 1e-42f};
  std::vector<uint32_t> want{0x7fff, 0x7c00, 0xfc00, 0x7bff, 0x7c00, 0x7c00, 0xfc00, 0, 0x8000, 0};
  for (uint32_t bits = 0; bits < 0x7bff; bits++) {
    const float middle = static_cast<float>((half_value(bits) + half_value(bits + 1)) / 2);
    for (const float f : {nextafterf(middle, 0), middle, nextafterf(middle, INFINITY)}) in.push_back(f);
    for (const uint32_t h : {bits, bits + (bits & 1), bits + 1}) want.push_back(h);
  }
  const unsigned n = static_cast<unsigned>(in.size());
  const OnDevice<float> on_in(in);
  const OnDevice<uint16_t> on_out(n), on_pairs(2 * n);
  RUN(round_to_half, 1, 256, 0, on_in, on_out, on_pairs, n);
  const std::vector<uint16_t> out = on_out.values(), pairs = on_pairs.values();
  for (unsigned i = 0; i < n; i++) {
    const uint32_t negative = std::isnan(in[i]) ? want[i] : want[i] ^ 0x8000;
    EXPECT(out[i] == want[i], "%.9g became %04x, not %04x", in[i], out[i], want[i]);
    EXPECT(pairs[2 * i] == negative && pairs[2 * i + 1] == want[i], "a pair of %.9g", in[i]);
  }
}

__device__ half2 half_pair(uint32_t bits) {
  const half low = __ushort_as_half(static_cast<unsigned short>(bits));
  return half2{low, __ushort_as_half(static_cast<unsigned short>(bits >> 16))};
}

// out: for each half, paired with another one, the larger of each with b (in pairs), and the mask of a >= b.
__global__ void compare(uint32_t b, uint32_t* most, uint32_t* mask) {
  for (uint32_t i = threadIdx.x; i < 65536; i += blockDim.x) {
    const half2 pair = half_pair(i | (i * 40503u) << 16), other = half_pair(b);
    const half2 larger = __hmax2(pair, other);
    store_global(&most[i], __half_as_ushort(larger.x) | static_cast<uint32_t>(__half_as_ushort(larger.y)) << 16);
    store_global(&mask[i], __hge2_mask(pair, other));
  }
}

bool is_nan(uint32_t bits) { return (bits & 0x7fff) > 0x7c00; }

// The larger, a number rather than a NaN, 0 rather than -0; and whether a >= b, false with a NaN.
void check_comparison(uint32_t a, uint32_t b, uint32_t most, uint32_t mask) {
  const bool reached = !is_nan(a) && !is_nan(b) && half_value(a) >= half_value(b);
  EXPECT(mask == (reached ? 0xffffu : 0u), "%04x >= %04x", a, b);
  uint32_t larger = reached ? a : b;
  if (is_nan(a)) larger = is_nan(b) ? 0x7fff : b;
  else if (is_nan(b)) larger = a;
  else if (half_value(a) == 0 && half_value(b) == 0) larger = a & b;
  EXPECT(most == larger, "of %04x and %04x the larger is not %04x", a, b, most);
}

void test_comparisons() {
  const OnDevice<uint32_t> on_most(65536), on_mask(65536);
  for (const uint32_t b : {0x0000u, 0x8000u, 0x0001u, 0x8001u, 0x2fffu, 0xb000u, 0x3c00u, 0x7c00u, 0xfc00u, 0x7fffu}) {
    RUN(compare, 1, 256, 0, b | (b ^ 0x8000u) << 16, on_most, on_mask);
    const std::vector<uint32_t> most = on_most.values(), mask = on_mask.values();
    for (uint32_t i = 0; i < 65536; i++) {
      check_comparison(i, b, most[i] & 0xffff, mask[i] & 0xffff);
      check_comparison(i * 40503u & 0xffff, b ^ 0x8000u, most[i] >> 16, mask[i] >> 16);
    }
  }
}

}  // namespace

int main() {
  test_half();
  test_comparisons();
  printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
  return failures != 0;
}
