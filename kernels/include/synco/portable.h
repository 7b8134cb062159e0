// What lets one source serve g++, nvcc and the CPU emulator of tests/simt.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SYNCO_BOTH __host__ __device__ __forceinline__
#else
#define SYNCO_BOTH inline __attribute__((always_inline))
#endif
