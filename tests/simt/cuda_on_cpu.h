// CUDA for g++: what kernels/cuda/gpu.h includes instead of CUDA's headers, so that kernels run on a CPU.
//
// Each CUDA thread is a fiber; all of them run on one thread of the CPU, in an order that SIMT_SCHED picks:
//   fwd (default), rev    threads and blocks in turn, or the other way round
//   rand:N                a thread picked at random at every switch
//   greedy:N              warps in random order, each run as far as it gets
// SIMT_TIMEOUT=seconds ends a program that hangs, SIMT_STACK_KB sets the stack of a thread. TSan takes about 1 ms and
// 1 MB for each CUDA thread of a launch, and 8000 at most: give it few blocks (device().multiprocessors).
//
// What a kernel does wrong ends the program with exit code 70 and a line on stderr that begins with "simt:". Memory
// that nobody wrote is all ones, which reads as NaN. Accesses to memory are made in this header and not in the
// runtime: this header is compiled with the kernel's sanitizers and the runtime (the .cpp files) with none, so that
// TSan and ASan see what the kernel does and not how the emulator does it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "half_on_cpu.h"

// ---- Keywords. Not __shared__, which SharedArena stands for, and not __noinline__, which libstdc++ uses itself.
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)

// ---- Vector types
#define SIMT_VECTORS(T, name)                                              \
  struct __attribute__((may_alias, aligned(2 * sizeof(T)))) name##2 {      \
    T x, y;                                                                \
  };                                                                       \
  struct __attribute__((may_alias, aligned(4 * sizeof(T)))) name##4 {      \
    T x, y, z, w;                                                          \
  };                                                                       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }               \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
#undef SIMT_VECTORS
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline float2 __half22float2(half2 h) { return {__half2float(h.x), __half2float(h.y)}; }

// ---- Runtime API of the host
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
using cudaStream_t = void*;

namespace simt {

struct Site {  // the kernel's line that called a primitive
  const char* file;
  int line;
};
// Two scalar parameters: g++ 12 gives the header's own line to the builtins inside a braced default Site{...}.
#define SIMT_SITE const char *simt_file = __builtin_FILE(), int simt_line = __builtin_LINE()
#define SIMT_HERE \
  ::simt::Site { simt_file, simt_line }

[[noreturn]] void fail(Site, const char* format, ...) __attribute__((format(printf, 2, 3)));

template <class T>
struct Identity {
  using type = T;
};
template <class T>
using Same = typename Identity<T>::type;  // a parameter that takes no part in deduction

// ---- For harnesses: what a launch did, and on which device
struct Counters {
  uint64_t mma, ldmatrix;                          // instructions, one a warp
  uint64_t cp_async_bytes;                         // read; zero fills do not count
  uint64_t global_load_bytes, global_store_bytes;  // by load_global, load_global_cg, store_global
  uint64_t blocks_with_mma;                        // blocks that executed one or more
  uint64_t block_barriers, grid_barriers;          // passed by a block (a grid_sync has one in each); by the grid
};
Counters last_launch();

struct Device {  // an H200 unless a harness changes it
  int multiprocessors = 132;
  int shared_per_block = 227 << 10, shared_per_multiprocessor = 228 << 10;
  int threads_per_multiprocessor = 2048;
};
Device& device();

// ---- The running thread
struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
  uint32_t cycles = ~2u;  // how often it has read the clock, from near where that wraps: an exact count for tests
};
extern Thread* self;

// ---- Blocks and warps
enum class Vote : uint8_t { none, count, any };
int block_barrier(Vote, int predicate, Site);
void grid_barrier(Site);

enum class Collective : uint8_t {
  sync,
  shuffle,
  shuffle_xor,
  shuffle_up,
  shuffle_down,
  ballot,
  any,
  add,
  mma,
  ldmatrix,
  ldmatrix_transposed,
};
uint64_t collective(Collective, unsigned mask, uint64_t value, int argument, int width, Site);
void mma(float* d, const uint32_t* a, const uint32_t* b, Site);
void exchange_matrices(uint32_t* r, const uint4* row, bool transposed, Site);

inline void ldmatrix(uint32_t* r, const void* row, bool transposed, Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail(site, "ldmatrix: row address %p is not 16-byte aligned", row);
  const uint4 elements = *static_cast<const uint4*>(row);
  exchange_matrices(r, &elements, transposed, site);
}

template <class T>
uint64_t to_word(T v) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "lanes exchange 64 bits at most");
  uint64_t word = 0;
  std::memcpy(&word, &v, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T v;
  std::memcpy(&v, &word, sizeof(T));
  return v;
}

// ---- Memory
void open_arena(Site);
void* shared_array(size_t offset, size_t bytes, Site);
void global_load(const void*, unsigned bytes, Site);  // checks and counts; the caller makes the access
void global_store(const void*, unsigned bytes, Site);

struct Copy {  // a cp.async of 16 bytes; zeros where there is no source
  void* shared;
  const void* global;
};
void copy_queue(const Copy&, Site);
bool copy_next(int keep, Copy*);  // the oldest copy of all but the `keep` latest groups
void copy_commit(Site);

// Hardware may write the destination at any time between issue and wait. So it is garbage from the issue on (who reads
// the old contents gets NaN, and TSan sees a write) and holds the data only after the wait.
inline void copy_issue(const Copy& copy, Site site) {
  copy_queue(copy, site);
  *static_cast<uint4*>(copy.shared) = {~0u, ~0u, ~0u, ~0u};
}
inline void copy_wait(int keep) {
  Copy copy;
  while (copy_next(keep, &copy))
    *static_cast<uint4*>(copy.shared) = copy.global ? *static_cast<const uint4*>(copy.global) : uint4{0, 0, 0, 0};
}

// ---- Launches
using Body = void (*)(const void* arguments);
cudaError_t run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body, const void*);

template <class... P>
cudaError_t launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Same<P>... p) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } const call{kernel, std::tuple<P...>(p...)};
  const Body body = [](const void* c) {
    std::apply(static_cast<const Call*>(c)->kernel, static_cast<const Call*>(c)->arguments);
  };
  return run(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, body, &call);
}

cudaError_t allocate(void**, size_t bytes);
cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t shared_bytes);
cudaError_t allow_shared(const void* kernel, int bytes);

}  // namespace simt

#define threadIdx (::simt::self->thread)
#define blockIdx (::simt::self->block)
#define blockDim (::simt::self->block_size)
#define gridDim (::simt::self->grid_size)

inline void __syncthreads(SIMT_SITE) { ::simt::block_barrier(::simt::Vote::none, 0, SIMT_HERE); }
inline int __syncthreads_count(int p, SIMT_SITE) { return ::simt::block_barrier(::simt::Vote::count, p, SIMT_HERE); }
inline int __syncthreads_or(int p, SIMT_SITE) { return ::simt::block_barrier(::simt::Vote::any, p, SIMT_HERE); }

// ---- Warp collectives
#define SIMT_COLLECTIVE(kind, value, argument, width) \
  ::simt::collective(::simt::Collective::kind, mask, ::simt::to_word(value), static_cast<int>(argument), width, \
                     SIMT_HERE)
#define SIMT_SHUFFLE(name, kind, Argument)                                   \
  template <class T>                                                         \
  T name(unsigned mask, T v, Argument argument, int width = 32, SIMT_SITE) { \
    return ::simt::from_word<T>(SIMT_COLLECTIVE(kind, v, argument, width));  \
  }
SIMT_SHUFFLE(__shfl_sync, shuffle, int)
SIMT_SHUFFLE(__shfl_xor_sync, shuffle_xor, int)
SIMT_SHUFFLE(__shfl_up_sync, shuffle_up, unsigned)
SIMT_SHUFFLE(__shfl_down_sync, shuffle_down, unsigned)
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) { SIMT_COLLECTIVE(sync, 0, 0, 32); }
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_SITE) {
  return static_cast<unsigned>(SIMT_COLLECTIVE(ballot, p, 0, 32));
}
inline int __any_sync(unsigned mask, int p, SIMT_SITE) { return static_cast<int>(SIMT_COLLECTIVE(any, p, 0, 32)); }
inline unsigned __reduce_add_sync(unsigned mask, unsigned v, SIMT_SITE) {
  return static_cast<unsigned>(SIMT_COLLECTIVE(add, v, 0, 32));
}
inline int __reduce_add_sync(unsigned mask, int v, SIMT_SITE) {
  return static_cast<int>(SIMT_COLLECTIVE(add, v, 0, 32));
}
#undef SIMT_COLLECTIVE
#undef SIMT_SHUFFLE

// ---- Atomics: on integers, whose sums no order of the threads can change
inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }

// ---- Scalars
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __float_as_uint(float f) { return ::simt::float_bits(f); }
inline int __float_as_int(float f) { return static_cast<int>(::simt::float_bits(f)); }
inline float __uint_as_float(unsigned u) { return ::simt::bits_float(u); }
inline float __int_as_float(int i) { return ::simt::bits_float(static_cast<unsigned>(i)); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
using std::max;
using std::min;

// ---- The host's functions
cudaError_t cudaFree(void*);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind);
cudaError_t cudaMemset(void*, int value, size_t bytes);
cudaError_t cudaGetLastError();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
const char* cudaGetErrorString(cudaError_t);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }  // a launch returns when it is done
template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  return ::simt::allocate(reinterpret_cast<void**>(p), bytes);
}
template <class K>
cudaError_t cudaFuncSetAttribute(K* kernel, cudaFuncAttribute, int value) {
  return ::simt::allow_shared(reinterpret_cast<const void*>(kernel), value);
}
template <class K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K* kernel, int threads, size_t shared_bytes) {
  return ::simt::occupancy(blocks, reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}
