// For host code that runs kernels, on a GPU or in the emulator: arrays on the device, and assertions that go on.
#pragma once

#include <cstdio>
#include <cstring>
#include <vector>

#include "gpu.h"

inline int failures = 0;

#define EXPECT(condition, ...)                                            \
  do {                                                                    \
    if (!(condition) && failures++ < 20) {                                \
      printf("FAILED %s:%d: %s: ", __FILE__, __LINE__, #condition);       \
      printf(__VA_ARGS__);                                                \
      putchar('\n');                                                      \
    }                                                                     \
  } while (false)
#define EXPECT_SUCCESS(call)                                              \
  do {                                                                    \
    const cudaError_t error = (call);                                     \
    EXPECT(error == cudaSuccess, "%s", cudaGetErrorString(error));        \
  } while (false)
#define RUN(kernel, grid, block, shared_bytes, ...)                                                    \
  do {                                                                                                 \
    EXPECT_SUCCESS(SYNCO_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, nullptr, __VA_ARGS__)); \
    EXPECT_SUCCESS(cudaDeviceSynchronize());                                                           \
  } while (false)

template <class T>
class OnDevice {
 public:
  explicit OnDevice(size_t size) : size_(size) { EXPECT_SUCCESS(cudaMalloc(&p_, size_ * sizeof(T))); }
  explicit OnDevice(const std::vector<T>& values) : OnDevice(values.size()) {
    EXPECT_SUCCESS(cudaMemcpy(p_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(p_); }
  operator T*() const { return p_; }
  std::vector<T> values() const {
    std::vector<T> v(size_);
    EXPECT_SUCCESS(cudaMemcpy(v.data(), p_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
  }

 private:
  T* p_ = nullptr;
  size_t size_;
};

inline int random_byte() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<int>(state >> 24) - 128;
}

template <class T, class U>
T bit_cast(U u) {
  static_assert(sizeof(T) == sizeof(U), "the same bits");
  T t;
  memcpy(&t, &u, sizeof t);
  return t;
}
