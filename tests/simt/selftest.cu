// Each primitive of the gateway, but for float16 (selftest_half.cu), against plain loops and the formulas of the PTX ISA.
// With g++ this tests the emulator; the same file built by nvcc and run on a GPU tests that the emulator and the hardware
// mean the same.
//   nvcc -std=c++17 -arch=native -I kernels/cuda tests/simt/selftest.cu -o selftest && ./selftest
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "on_device.h"

using namespace synco;

namespace {

constexpr unsigned FULL = 0xffffffffu;
// ---- mma: elements by the formulas of PTX ISA 9.7.14, "Matrix Fragments for mma.m16n8k16"
__global__ void multiply(const half* a, const half* b, float* d) {
  const int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
  half ea[8], eb[4];
  float c[4];
  for (int i = 0; i < 8; i++) {
    const int row = i < 2 || (i >= 4 && i < 6) ? g : g + 8, column = t * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    ea[i] = load_global(&a[row * 16 + column]);
  }
  for (int i = 0; i < 4; i++) eb[i] = load_global(&b[(t * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + g]);
  for (int i = 0; i < 4; i++) c[i] = load_global(&d[(i < 2 ? g : g + 8) * 8 + t * 2 + (i & 1)]);
  uint32_t ra[4], rb[2];
  memcpy(ra, ea, sizeof ra);
  memcpy(rb, eb, sizeof rb);
  mma_m16n8k16(c, ra, rb);
  mma_m16n8k16(c, ra, rb);
  for (int i = 0; i < 4; i++) store_global(&d[(i < 2 ? g : g + 8) * 8 + t * 2 + (i & 1)], c[i]);
}

// Integers and their halves: every product and sum is exact in float, whatever the order.
void test_mma() {
  std::vector<half> a(16 * 16), b(16 * 8);
  std::vector<float> fa(a.size()), fb(b.size()), c(16 * 8);
  for (size_t i = 0; i < a.size(); i++) a[i] = __float2half_rn(fa[i] = static_cast<float>(random_byte()) / 2);
  for (size_t i = 0; i < b.size(); i++) b[i] = __float2half_rn(fb[i] = static_cast<float>(random_byte()));
  for (float& v : c) v = static_cast<float>(random_byte());
  const OnDevice<half> on_a(a), on_b(b);
  const OnDevice<float> on_d(c);
  RUN(multiply, 1, 32, 0, on_a, on_b, on_d);
  const std::vector<float> d = on_d.values();
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++) {
      float want = c[row * 8 + column];
      for (int k = 0; k < 16; k++) want += 2 * fa[row * 16 + k] * fb[k * 8 + column];
      EXPECT(d[row * 8 + column] == want, "(%d, %d): %g, not %g", row, column, d[row * 8 + column], want);
    }
}

// ---- ldmatrix
__global__ void load_matrices(uint32_t* out) {
  SharedArena arena;
  uint4* rows = arena.take<uint4>(32);
  uint16_t* elements = reinterpret_cast<uint16_t*>(rows);
  for (unsigned i = threadIdx.x; i < 256; i += 32) elements[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t r[4], transposed[4];
  ldmatrix_x4(r, &rows[threadIdx.x]);
  ldmatrix_x4_transposed(transposed, &rows[threadIdx.x]);
  for (int i = 0; i < 4; i++) {
    store_global(&out[threadIdx.x * 8 + i], r[i]);
    store_global(&out[threadIdx.x * 8 + 4 + i], transposed[i]);
  }
}

void test_ldmatrix() {
  const OnDevice<uint32_t> out(256);
  RUN(load_matrices, 1, 32, 512, out);
  const std::vector<uint32_t> v = out.values();
  for (uint32_t lane = 0; lane < 32; lane++)
    for (uint32_t i = 0; i < 4; i++) {
      const uint32_t g = lane / 4, t = 2 * (lane % 4), e = i * 64 + g * 8 + t, f = i * 64 + t * 8 + g;
      EXPECT(v[lane * 8 + i] == (e | (e + 1) << 16), "lane %u register %u", lane, i);
      EXPECT(v[lane * 8 + 4 + i] == (f | (f + 8) << 16), "transposed, lane %u register %u", lane, i);
    }
}

// ---- Shared memory, cp.async
__global__ void stage(const uint4* in, uint4* out, int n) {
  const unsigned i = threadIdx.x, threads = blockDim.x;
  SharedArena arena;
  uint4* stages[2] = {arena.take<uint4>(threads), arena.take<uint4, 128>(threads)};
  for (int s = 0; s < 2; s++) {
    const int from = s * static_cast<int>(threads) + static_cast<int>(i);
    cp_async16(&stages[s][i], &in[from < n ? from : 0], from < n);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  store_global(&out[i], stages[0][threads - 1 - i]);
  cp_async_wait<0>();
  __syncthreads();
  store_global(&out[threads + i], stages[1][threads - 1 - i]);
}

void test_cp_async() {
  const unsigned threads = 96, n = 150;
  std::vector<uint4> in(n);
  for (uint32_t i = 0; i < n; i++) in[i] = {i + 1, i + 1000, ~i, i * i};
  const OnDevice<uint4> on_in(in), on_out(2 * threads);
  RUN(stage, 1, threads, 2 * threads * 16, on_in, on_out, static_cast<int>(n));
  const std::vector<uint4> out = on_out.values();
  for (unsigned i = 0; i < 2 * threads; i++) {
    const unsigned from = i / threads * threads + (threads - 1 - i % threads);
    const uint4 want = from < n ? in[from] : uint4{0, 0, 0, 0};
    EXPECT(!memcmp(&out[i], &want, sizeof want), "vector %u", i);
  }
}

__global__ void carve(unsigned* out) {
  SharedArena arena;
  char* first = arena.take<char>(5);
  float* second = arena.take<float>(3);
  double* third = arena.take<double, 128>(2);
  if (threadIdx.x == 0) {
    store_global(&out[0], static_cast<unsigned>(reinterpret_cast<uintptr_t>(second) % 16));
    store_global(&out[1], static_cast<unsigned>(reinterpret_cast<uintptr_t>(third) % 128));
    first[0] = 1, second[0] = 2, third[0] = 3;
    store_global(&out[2], static_cast<unsigned>(first[0] + second[0] + third[0]));
  }
  for (unsigned round = 0; round < 3; round++) {  // each takes the former one's memory
    __syncthreads();
    SharedArena again;
    unsigned* sums = again.take<unsigned>(2);
    if (threadIdx.x < 2) sums[threadIdx.x] = round;
    __syncthreads();
    atomicAdd(&sums[0], threadIdx.x);
    atomicAdd(reinterpret_cast<int*>(&sums[1]), -1);
    __syncthreads();
    if (threadIdx.x < 2) store_global(&out[3 + 2 * round + threadIdx.x], sums[threadIdx.x]);
  }
}

void test_shared() {
  static_assert(shared_end<float>(shared_end<char>(0, 5), 3) == 28, "16-byte steps");
  static_assert(shared_end<double, 128>(28, 2) == 144, "128-byte steps");
  const OnDevice<unsigned> out(9);
  RUN(carve, 1, 64, 144, out);
  const unsigned less = static_cast<unsigned>(-64), want[] = {0, 0, 6, 2016, less, 2017, less + 1, 2018, less + 2};
  const std::vector<unsigned> v = out.values();
  for (int i = 0; i < 9; i++) EXPECT(v[i] == want[i], "value %d: %u", i, v[i]);
}

// ---- Collectives
constexpr int COLLECTIVES = 14;
__global__ void meet(int* out) {
  const int lane = threadIdx.x & 31;
  const int v[COLLECTIVES] = {
      __shfl_sync(FULL, lane * 3, 5),
      __shfl_sync(FULL, lane, lane + 1, 8),
      __shfl_xor_sync(FULL, lane, 9),
      __shfl_up_sync(FULL, lane, 2),
      __shfl_up_sync(FULL, lane, 3, 8),
      __shfl_down_sync(FULL, lane, 3, 8),
      static_cast<int>(__shfl_xor_sync(FULL, static_cast<double>(lane), 1) * 2),
      static_cast<int>(__ballot_sync(FULL, lane % 3 == 0)),
      __any_sync(FULL, lane == 31),
      __any_sync(FULL, lane > 31),
      static_cast<int>(__reduce_add_sync(FULL, static_cast<unsigned>(lane))),
      __syncthreads_count(lane < 7),
      __syncthreads_or(threadIdx.x == 127),
      __syncthreads_or(threadIdx.x == 128),
  };
  for (int i = 0; i < COLLECTIVES; i++) store_global(&out[threadIdx.x * COLLECTIVES + i], v[i]);
}

void test_collectives() {
  const OnDevice<int> out(128 * COLLECTIVES);
  RUN(meet, 1, 128, 0, out);
  const std::vector<int> v = out.values();
  for (int i = 0; i < 128; i++) {
    const int l = i & 31, in_8 = l & 7;
    const int want[COLLECTIVES] = {15, (l & ~7) | ((l + 1) & 7), l ^ 9, l >= 2 ? l - 2 : l, in_8 >= 3 ? l - 3 : l,
                                   in_8 < 5 ? l + 3 : l, (l ^ 1) * 2, 0x49249249, 1, 0, 496, 28, 1, 0};
    for (int j = 0; j < COLLECTIVES; j++)
      EXPECT(v[i * COLLECTIVES + j] == want[j], "collective %d, thread %d: %d", j, i, v[i * COLLECTIVES + j]);
  }
}

// Each thread reads what a thread of another block wrote before the barrier.
__global__ void rotate(unsigned* a, unsigned* b) {
  const unsigned n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int step = 0; step < 5; step++) {
    const unsigned* from = step & 1 ? b : a;
    store_global(step & 1 ? &a[i] : &b[i], load_global_cg(&from[(i + 37) % n]) + 1);
    grid_sync();
  }
}

void test_grid_sync() {
  const unsigned n = 8 * 96;
  std::vector<unsigned> values(n);
  for (unsigned i = 0; i < n; i++) values[i] = i * 7;
  const OnDevice<unsigned> a(values), b(n);
  RUN(rotate, 8, 96, 0, a, b);
  const std::vector<unsigned> v = b.values();
  for (unsigned i = 0; i < n; i++) EXPECT(v[i] == values[(i + 5 * 37) % n] + 5, "element %u: %u", i, v[i]);
}

// ---- Global accesses of every size
template <class T>
__global__ void copy_in_three_hops(const T* in, T* a, T* out) {
  const unsigned i = threadIdx.x;
  store_global(&a[i], load_global(&in[i]));
  grid_sync();
  store_global(&out[i], load_global_cg(&a[i]));
}

template <class T>
void test_access(const char* type) {
  std::vector<unsigned char> bytes(32 * sizeof(T));
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random_byte());
  std::vector<T> in(32);
  memcpy(static_cast<void*>(in.data()), bytes.data(), bytes.size());
  const OnDevice<T> on_in(in), a(32), on_out(32);
  RUN(copy_in_three_hops<T>, 1, 32, 0, on_in, a, on_out);
  EXPECT(!memcmp(on_out.values().data(), bytes.data(), bytes.size()), "%s", type);
}

void test_accesses() {
  test_access<int8_t>("int8_t");
  test_access<uint16_t>("uint16_t");
  test_access<half>("half");
  test_access<half2>("half2");
  test_access<int>("int");
  test_access<float2>("float2");
  test_access<int64_t>("int64_t");
  test_access<uint4>("uint4");
  test_access<float4>("float4");
}

// ---- Scalars
__global__ void powers_of_two(const float* in, float* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) store_global(&out[i], exp2_approx(load_global(&in[i])));
}

void test_exp2() {
  std::vector<float> in{0.f, -0.f, 1.f, -126.f, -126.5f, -149.f, -1000.f, 127.f, 128.f, INFINITY, -INFINITY, NAN};
  for (int i = 0; i < 2000; i++) in.push_back(static_cast<float>(256 * random_byte() + random_byte()) / 256);
  const OnDevice<float> on_in(in), on_out(in.size());
  RUN(powers_of_two, 1, 32, 0, on_in, on_out, static_cast<int>(in.size()));
  const std::vector<float> out = on_out.values();
  for (size_t i = 0; i < in.size(); i++) {
    const double exact = exp2(static_cast<double>(in[i]));
    const double want = exact < 0x1p-126 ? 0 : exact;
    // The PTX ISA promises 2^-22.5 of the result; a rounding to infinity or to the least normal number is exact here.
    const bool good = std::isnan(want) ? std::isnan(out[i]) : out[i] == want || fabs(out[i] - want) <= want * 0x1p-22;
    EXPECT(good || (std::isinf(out[i]) && want >= 0x1p128), "2^%g is %g", in[i], out[i]);
  }
}

__global__ void scalars(uint32_t* out, uint32_t a, float f) {
  const uint32_t v[] = {static_cast<uint32_t>(__popc(a)),
                        static_cast<uint32_t>(__clz(static_cast<int>(a >> 5))),
                        static_cast<uint32_t>(__clz(0)),
                        static_cast<uint32_t>(__ffs(static_cast<int>(a << 3))),
                        static_cast<uint32_t>(__ffs(0)),
                        __umulhi(a, 0xd2511f53u),
                        __float_as_uint(f),
                        static_cast<uint32_t>(__float_as_int(-f)),
                        static_cast<uint32_t>(__uint_as_float(0x40400000u)),
                        static_cast<uint32_t>(__int_as_float(0x40800000)),
                        static_cast<uint32_t>(max(static_cast<int>(a), 7) + min(2, 3)),
                        __float_as_uint(fmaf(f, f, -1.f)),
                        __float_as_uint(__fmaf_rn(f, f, -1.f))};
  for (unsigned i = 0; i < sizeof v / sizeof *v; i++) store_global(&out[i], v[i]);
}

void test_scalars() {
  const float f = 1.f + 0x1p-20f;
  const uint32_t a = 0x80000001u, fused = bit_cast<uint32_t>(static_cast<float>(double{f} * f - 1));
  const uint32_t high = static_cast<uint32_t>(uint64_t{a} * 0xd2511f53u >> 32);
  const uint32_t want[] = {2, 5, 32, 4, 0, high, bit_cast<uint32_t>(f), bit_cast<uint32_t>(-f), 3, 4, 9, fused, fused};
  const OnDevice<uint32_t> out(13);
  RUN(scalars, 1, 1, 0, out, a, f);
  const std::vector<uint32_t> v = out.values();
  for (int i = 0; i < 13; i++) EXPECT(v[i] == want[i], "scalar %d: %x, not %x", i, v[i], want[i]);
}

// ---- Launches
__global__ void where(uint32_t* out) {
  const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const uint32_t i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  store_global(&out[i], i);
}

void test_launches() {
  const OnDevice<uint32_t> out(2 * 3 * 2 * 40);
  RUN(where, dim3(2, 3, 2), dim3(5, 4, 2), 0, out);
  const std::vector<uint32_t> v = out.values();
  for (uint32_t i = 0; i < v.size(); i++) EXPECT(v[i] == i, "thread %u", i);

  int limit = 0;
  EXPECT_SUCCESS(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  const size_t most = static_cast<size_t>(limit);
  EXPECT(SYNCO_LAUNCH_COOPERATIVE(stage, 1, 32, most, nullptr, nullptr, nullptr, 0) != cudaSuccess, "not allowed yet");
  EXPECT(cudaGetLastError() != cudaSuccess && cudaGetLastError() == cudaSuccess, "an error is reported once");
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  EXPECT(cudaFuncSetAttribute(stage, attribute, limit + 1) != cudaSuccess, "too much");
  cudaGetLastError();
  EXPECT_SUCCESS(cudaFuncSetAttribute(stage, attribute, limit));
  int blocks = 0, multiprocessors = 0;
  EXPECT_SUCCESS(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, stage, 32, most));
  EXPECT(blocks == 1, "%d", blocks);
  EXPECT_SUCCESS(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  const OnDevice<uint4> in(64), staged(64);
  EXPECT(SYNCO_LAUNCH_COOPERATIVE(stage, multiprocessors + 1, 32, most, nullptr, in, staged, 64) ==
             cudaErrorCooperativeLaunchTooLarge,
         "more blocks than fit");
  cudaGetLastError();
  RUN(stage, 1, 32, most, in, staged, 64);
}

#ifdef SYNCO_HOST_SIMT
void test_counters() {
  const OnDevice<half> a(256), b(128);
  const OnDevice<float> d(128);
  RUN(multiply, 1, 32, 0, a, b, d);
  simt::Counters c = simt::last_launch();
  EXPECT(c.mma == 2 && c.blocks_with_mma == 1 && c.ldmatrix == 0, "%ld mma", static_cast<long>(c.mma));
  EXPECT(c.global_load_bytes == 32 * (8 + 4) * 2 + 512 && c.global_store_bytes == 512, "a and b, and d both ways");
  const OnDevice<uint4> in(150), out(192);
  RUN(stage, 1, 96, 192 * 16, in, out, 150);
  c = simt::last_launch();
  EXPECT(c.mma == 0 && c.blocks_with_mma == 0 && c.block_barriers == 2 && c.grid_barriers == 0, "counters start at 0");
  EXPECT(c.cp_async_bytes == 150 * 16 && c.global_store_bytes == 192 * 16, "zero fills are no reads");
  const OnDevice<unsigned> x(192), y(192);
  RUN(rotate, 2, 96, 0, x, y);
  c = simt::last_launch();
  EXPECT(c.grid_barriers == 5 && c.block_barriers == 10, "%ld barriers", static_cast<long>(c.grid_barriers));
  const OnDevice<uint32_t> matrices(256);
  RUN(load_matrices, 1, 32, 512, matrices);
  EXPECT(simt::last_launch().ldmatrix == 2, "ldmatrix");
}
#endif

}  // namespace

int main() {
  test_mma();
  test_ldmatrix();
  test_cp_async();
  test_shared();
  test_collectives();
  test_grid_sync();
  test_accesses();
  test_exp2();
  test_scalars();
  test_launches();
#ifdef SYNCO_HOST_SIMT
  test_counters();
#endif
  printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
  return failures != 0;
}
