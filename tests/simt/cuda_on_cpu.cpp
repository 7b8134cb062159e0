// Launches, and what the runtime says about the device and about mistakes.
#include <stdarg.h>
#include <unistd.h>

#include <map>

#include "runtime.h"

namespace simt {

Launch current;

namespace {

cudaError_t latest_error = cudaSuccess;
std::map<const void*, size_t> allowed_shared;  // cudaFuncSetAttribute
constexpr size_t kSharedByDefault = 48 << 10, kSharedOverhead = 1 << 10;

// What the device refuses comes back as its error code; the reason is what the device does not tell.
cudaError_t refuse(cudaError_t error, const char* name, const char* format, size_t a, size_t b) {
  fprintf(stderr, "simt: launch of %s refused: ", name);
  fprintf(stderr, format, a, b);
  fputc('\n', stderr);
  return latest_error = error;
}

cudaError_t check_launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const size_t blocks = size_t{grid.x} * grid.y * grid.z, threads = size_t{block.x} * block.y * block.z;
  if (!blocks || !threads || threads > 1024)
    return refuse(cudaErrorInvalidConfiguration, name, "%zu blocks of %zu threads", blocks, threads);
  const auto found = allowed_shared.find(kernel);
  const size_t allowed = found == allowed_shared.end() ? kSharedByDefault : std::max(kSharedByDefault, found->second);
  if (shared_bytes > allowed)
    return refuse(cudaErrorInvalidValue, name, "%zu bytes of shared memory, %zu allowed by cudaFuncSetAttribute",
                  shared_bytes, allowed);
  int together = 0;
  occupancy(&together, kernel, static_cast<int>(threads), shared_bytes);
  const size_t room = static_cast<size_t>(together) * static_cast<size_t>(device().multiprocessors);
  if (blocks > room)
    return refuse(cudaErrorCooperativeLaunchTooLarge, name, "%zu blocks, %zu fit on the device at once", blocks, room);
  return cudaSuccess;
}

}  // namespace

Device& device() {
  static Device device;
  return device;
}

Counters last_launch() { return current.counters; }

void fail(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "simt: ERROR at %s:%d: ", site.file, site.line);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (self && self != &host)
    fprintf(stderr, " [kernel %s, block (%u,%u,%u), thread (%u,%u,%u)]", current.name, self->block.x, self->block.y,
            self->block.z, self->thread.x, self->thread.y, self->thread.z);
  fputc('\n', stderr);
#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
  __sanitizer_print_stack_trace();
#endif
  _exit(70);
}

cudaError_t run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body,
                const void* arguments) {
  const cudaError_t error = check_launch(name, kernel, grid, block, shared_bytes);
  if (error != cudaSuccess) return error;
  current = Launch{};
  current.name = name, current.body = body, current.arguments = arguments, current.shared_bytes = shared_bytes;
  current.blocks = std::vector<Block>(size_t{grid.x} * grid.y * grid.z);
  enter_device_memory();
  start_fibers(current, grid, block);
  run_fibers(current);
  for (Block& b : current.blocks) release_shared(b);
  current.blocks.clear();
  leave_device_memory();
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, const void*, int threads, size_t shared_bytes) {
  const Device& d = device();
  const int shared = static_cast<int>(shared_bytes + kSharedOverhead);
  *blocks = std::min(d.threads_per_multiprocessor / ((threads + 31) / 32 * 32), d.shared_per_multiprocessor / shared);
  return cudaSuccess;
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > device().shared_per_block) return latest_error = cudaErrorInvalidValue;
  allowed_shared[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

}  // namespace simt

cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::latest_error;
  simt::latest_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
  }
  return "unknown error";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const simt::Device& d = simt::device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = d.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_per_multiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_per_block; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
