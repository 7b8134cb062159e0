// The only CUDA header that kernels include: all inline PTX, `<<<>>>` and `__shared__` of the project are in here.
//
// nvcc gets CUDA. g++ with -DSYNCO_HOST_SIMT gets the same names from tests/simt, where each CUDA thread is a fiber and
// the same kernel source runs, and is checked, on a CPU. What that asks of kernels:
//   - warp collectives take the full mask, in uniform control flow; lanes that meet in memory meet in __syncwarp;
//   - no thread spins: blocks meet in grid_sync, and then the launch is cooperative;
//   - where two places must round alike, write fmaf;
//   - the arrays of a SharedArena die when the block opens its next one, which takes a barrier in between.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef SYNCO_HOST_SIMT
#include "cuda_on_cpu.h"
#else
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// cudaError_t of launching `kernel`; the second with all its blocks alive at once, for those that meet. A kernel with
// commas goes in parentheses: SYNCO_LAUNCH((infonce<128, 4>), grid, block, shared_bytes, stream, arguments...)
#define SYNCO_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::synco::launch<false>(#kernel, (kernel), dim3(grid), dim3(block), (shared_bytes), (stream), __VA_ARGS__)
#define SYNCO_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  ::synco::launch<true>(#kernel, (kernel), dim3(grid), dim3(block), (shared_bytes), (stream), __VA_ARGS__)

namespace synco {

// Where an array of n T's, carved from shared memory of which `offset` bytes are taken, ends. Hosts add up with it what
// SharedArena::take will need.
template <class T, unsigned alignment = 16>
__host__ __device__ constexpr unsigned shared_end(unsigned offset, unsigned n) {
  static_assert(alignment >= alignof(T) && alignment <= 128 && (alignment & (alignment - 1)) == 0, "a power of two");
  return (offset + alignment - 1) / alignment * alignment + n * static_cast<unsigned>(sizeof(T));
}

#ifdef SYNCO_HOST_SIMT

// All blocks are alive at once here in any case.
template <bool cooperative, class... Parameters, class... Arguments>
cudaError_t launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, const Arguments&... arguments) {
  return ::simt::launch(name, kernel, grid, block, shared_bytes, static_cast<Parameters>(arguments)...);
}

inline void grid_sync(SIMT_SITE) { ::simt::grid_barrier(SIMT_HERE); }

class SharedArena {
 public:
  explicit SharedArena(SIMT_SITE) { ::simt::open_arena(SIMT_HERE); }

  template <class T, unsigned alignment = 16>
  T* take(unsigned n, SIMT_SITE) {
    const unsigned begin = shared_end<T, alignment>(offset_, 0);
    offset_ = shared_end<T, alignment>(offset_, n);
    return static_cast<T*>(::simt::shared_array(begin, offset_ - begin, SIMT_HERE));
  }

 private:
  unsigned offset_ = 0;
};

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  ::simt::mma(d, a, b, SIMT_HERE);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_SITE) { ::simt::ldmatrix(r, row, false, SIMT_HERE); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, SIMT_SITE) {
  ::simt::ldmatrix(r, row, true, SIMT_HERE);
}

inline void cp_async16(void* shared, const void* global, bool valid, SIMT_SITE) {
  ::simt::copy_issue({shared, valid ? global : nullptr}, SIMT_HERE);
}
inline void cp_async_commit(SIMT_SITE) { ::simt::copy_commit(SIMT_HERE); }
template <int N>
void cp_async_wait() {
  ::simt::copy_wait(N);
}

template <class T>
T load_global(const T* p, SIMT_SITE) {
  ::simt::global_load(p, sizeof(T), SIMT_HERE);
  return *p;
}
template <class T>
T load_global_cg(const T* p, SIMT_SITE) {
  ::simt::global_load(p, sizeof(T), SIMT_HERE);
  return *p;
}
template <class T>
void store_global(T* p, ::simt::Same<T> v, SIMT_SITE) {
  ::simt::global_store(p, sizeof(T), SIMT_HERE);
  *p = v;
}

inline uint32_t cycles() { return ++::simt::self->cycles; }
inline void add_global(int64_t* p, int64_t v, SIMT_SITE) {
  ::simt::global_store(p, sizeof(int64_t), SIMT_HERE);
  *p += v;
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.f : y;  // a NaN stays one
}

inline void sine_cosine_pi(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(x * 3.14159265358979323846));
  *cosine = static_cast<float>(std::cos(x * 3.14159265358979323846));
}

#else  // nvcc

template <bool cooperative, class... Parameters, class... Arguments>
cudaError_t launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// All threads of the grid meet; what they wrote to global memory before is visible to load_global_cg after.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// Carves the launch's dynamic shared memory into arrays: the same calls in every thread of a block.
class SharedArena {
 public:
  template <class T, unsigned alignment = 16>
  __device__ __forceinline__ T* take(unsigned n) {
    extern __shared__ __align__(128) unsigned char synco_shared_memory[];
    const unsigned begin = shared_end<T, alignment>(offset_, 0);
    offset_ = shared_end<T, alignment>(offset_, n);
    return reinterpret_cast<T*>(synco_shared_memory + begin);
  }

 private:
  unsigned offset_ = 0;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// d += a b for a warp: a 16 x 16 and b 16 x 8 in float16, d 16 x 8 in float32. With g = lane / 4 and t = lane % 4, and
// the lower column (of a) or row (of b) in a register's lower half:
//   a: (g, 2t..)  (g + 8, 2t..)  (g, 2t + 8..)  (g + 8, 2t + 8..)     b: (2t.., g)  (2t + 8.., g)
//   d: (g, 2t)  (g, 2t + 1)  (g + 8, 2t)  (g + 8, 2t + 1)
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + j passes the address of row j of matrix i (16 bytes, aligned) and
// gets in r[i] the elements (lane / 4, 2 (lane % 4)) and its right neighbour; transposed: those of the transpose.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory in the background, both aligned; zeros, and no read, where not valid.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the N latest groups of this thread are under way; other threads' copies take a barrier more.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

namespace detail {
template <class T>
struct Identity {
  using type = T;
};
template <class T, class U>
__device__ __forceinline__ T bit_cast(U u) {
  static_assert(sizeof(T) == sizeof(U), "an access is of 1, 2, 4, 8 or 16 bytes");
  T t;
  memcpy(&t, &u, sizeof(T));
  return t;
}
}  // namespace detail

// One access to global memory of 1, 2, 4, 8 or 16 bytes, aligned to its size. load_global is for what no other block
// writes during the launch; load_global_cg goes past L1 and reads what other blocks wrote before the last grid_sync.
#define SYNCO_DEFINE_LOAD(name, opcode)                                                          \
  template <class T>                                                                             \
  __device__ __forceinline__ T name(const T* p) {                                                \
    if constexpr (sizeof(T) == 16) {                                                             \
      uint4 w;                                                                                   \
      asm volatile(opcode ".v4.u32 {%0,%1,%2,%3}, [%4];"                                         \
                   : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)                                  \
                   : "l"(p)                                                                      \
                   : "memory");                                                                  \
      return detail::bit_cast<T>(w);                                                             \
    } else if constexpr (sizeof(T) == 8) {                                                       \
      uint64_t w;                                                                                \
      asm volatile(opcode ".u64 %0, [%1];" : "=l"(w) : "l"(p) : "memory");                       \
      return detail::bit_cast<T>(w);                                                             \
    } else if constexpr (sizeof(T) == 4) {                                                       \
      uint32_t w;                                                                                \
      asm volatile(opcode ".u32 %0, [%1];" : "=r"(w) : "l"(p) : "memory");                       \
      return detail::bit_cast<T>(w);                                                             \
    } else if constexpr (sizeof(T) == 2) {                                                       \
      uint16_t w;                                                                                \
      asm volatile(opcode ".u16 %0, [%1];" : "=h"(w) : "l"(p) : "memory");                       \
      return detail::bit_cast<T>(w);                                                             \
    } else {                                                                                     \
      uint32_t w;                                                                                \
      asm volatile(opcode ".u8 %0, [%1];" : "=r"(w) : "l"(p) : "memory");                        \
      return detail::bit_cast<T>(static_cast<uint8_t>(w));                                       \
    }                                                                                            \
  }
SYNCO_DEFINE_LOAD(load_global, "ld.global")
SYNCO_DEFINE_LOAD(load_global_cg, "ld.global.cg")
#undef SYNCO_DEFINE_LOAD

template <class T>
__device__ __forceinline__ void store_global(T* p, typename detail::Identity<T>::type v) {
  if constexpr (sizeof(T) == 16) {
    const uint4 w = detail::bit_cast<uint4>(v);
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.global.u64 [%0], %1;" ::"l"(p), "l"(detail::bit_cast<uint64_t>(v)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(detail::bit_cast<uint32_t>(v)) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(detail::bit_cast<uint16_t>(v)) : "memory");
  } else {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(p), "r"(uint32_t{detail::bit_cast<uint8_t>(v)}) : "memory");
  }
}

// The multiprocessor's clock, which wraps. What was begun before, such as a load or a product, may still be under way.
__device__ __forceinline__ uint32_t cycles() {
  uint32_t now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}
// For places that only one thread of the launch adds to: it need not wait for the sum, as a load and a store would.
__device__ __forceinline__ void add_global(int64_t* p, int64_t v) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

// 2^x to 2 ulp; results below the least normal float are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of pi x.
__device__ __forceinline__ void sine_cosine_pi(float x, float* sine, float* cosine) { sincospif(x, sine, cosine); }

#endif

}  // namespace synco
