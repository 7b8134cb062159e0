// Shared and global memory, and the copies between them. What nobody wrote is all ones: NaN, whatever the float type.
#include <map>

#include "runtime.h"

namespace simt {

namespace {

// Around an array that ASan does not watch lie bytes that nothing may write.
#if defined(SIMT_ASAN)
constexpr size_t kRedZone = 0;
#else
constexpr size_t kRedZone = 256;
#endif
constexpr size_t kAlignment = 256;

// Filled by an instruction of its own: no sanitizer takes it for an access of the kernel.
void fill_with_nan(void* p, size_t bytes) { asm volatile("rep stosb" : "+D"(p), "+c"(bytes) : "a"(0xff) : "memory"); }

char* allocate_with_red_zones(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, kAlignment, bytes + 2 * kRedZone)) return nullptr;
  fill_with_nan(p, bytes + 2 * kRedZone);
  return static_cast<char*>(p);
}

bool red_zones_intact(const char* data, size_t bytes) {
  for (size_t i = 1; i <= kRedZone; i++)
    if (data[-static_cast<ptrdiff_t>(i)] != '\xff' || data[bytes + i - 1] != '\xff') return false;
  return true;
}

void set_readable([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool readable) {
#if defined(SIMT_ASAN)
  readable ? __asan_unpoison_memory_region(p, bytes) : __asan_poison_memory_region(p, bytes);
#endif
}

// ---- Shared memory: each array is an allocation of its own, so that running off its end is seen.
TSAN(char allocation_clock;)  // an allocation comes before every use

void allocate_shared(void* array) {
  SharedArray& a = *static_cast<SharedArray*>(array);
  a.allocation = allocate_with_red_zones(a.bytes);
  TSAN(__tsan_release(&allocation_clock));
}

void add_shared(Block& block, size_t offset, size_t bytes, Site site) {
  if (block.shared.size() == block.shared.capacity()) fail(site, "more than %zu shared arrays", block.shared.size());
  SharedArray array{offset, bytes, block.arenas, nullptr, nullptr};
#if defined(SIMT_TSAN)
  on_neutral_fiber(allocate_shared, &array);
#else
  allocate_shared(&array);
#endif
  if (!array.allocation) fail(site, "no memory for a shared array of %zu bytes", bytes);
  array.data = array.allocation + kRedZone;
  block.shared.push_back(array);
}

void retire_shared(Block& block) {
  for (SharedArray& array : block.shared) {
    fill_with_nan(array.data, array.bytes);
    set_readable(array.data, array.bytes, false);
  }
}

// ---- Global memory: what cudaMalloc gave, readable on the host inside cudaMemcpy only.
std::map<const char*, size_t> allocations;
struct {
  const char* begin;
  size_t bytes;
} latest;  // the allocation of the last access

bool in_device_memory(const void* pointer, size_t bytes) {
  const char* p = static_cast<const char*>(pointer);
  const auto inside = [&] { return p >= latest.begin && p + bytes <= latest.begin + latest.bytes; };
  if (inside()) return true;
  auto found = allocations.upper_bound(p);
  if (found == allocations.begin()) return false;
  --found;
  latest = {found->first, found->second};
  return inside();
}

void check_global(const char* what, const void* p, size_t bytes, Site site) {
  if (bytes > 16 || bytes & (bytes - 1)) fail(site, "%s: %zu bytes; an access is of 1, 2, 4, 8 or 16", what, bytes);
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(site, "%s: %p is not aligned to its %zu bytes", what, p, bytes);
  if (!in_device_memory(p, bytes)) fail(site, "%s: %zu bytes at %p are outside of every cudaMalloc", what, bytes, p);
}

void set_device_memory_readable(bool readable) {
  for (const auto& [begin, bytes] : allocations) set_readable(begin, bytes, readable);
}

void check_red_zones() {
  for (const auto& [begin, bytes] : allocations)
    if (!red_zones_intact(begin, bytes))
      fail({current.name, 0}, "written outside of global memory: next to an allocation of %zu bytes", bytes);
}

}  // namespace

// The first thread to come ends the life of the older arrays. All must come after the same barrier, and a barrier after
// the last time: else one writes the new arrays, which on the device is the same memory, while another reads the old.
void open_arena(Site site) {
  Fiber* fiber = running();
  Block& block = *fiber->home;
  const unsigned round = block.barrier.meeting.round;
  const bool first = fiber->arenas == block.arenas;
  if (first && block.arenas && round == block.arena_round)
    fail(site, "no barrier between two SharedArenas: the second takes the first one's memory");
  if (!first && (fiber->arenas + 1 != block.arenas || round != block.arena_round))
    fail(site, "a SharedArena is opened by some threads before a barrier and by others after it");
  fiber->arenas++;
  if (!first) return;
  block.arenas++, block.arena_round = round;
  retire_shared(block);
}

void* shared_array(size_t offset, size_t bytes, Site site) {
  Block& block = *running()->home;
  if (offset + bytes > current.shared_bytes)
    fail(site, "shared memory: %zu bytes taken, %zu launched with", offset + bytes, current.shared_bytes);
  const auto same_place = [&](const SharedArray& a) { return a.offset == offset && a.bytes == bytes; };
  auto array = std::find_if(block.shared.begin(), block.shared.end(), same_place);
  if (array == block.shared.end()) {
    add_shared(block, offset, bytes, site);
    array = block.shared.end() - 1;
  } else if (array->arena != block.arenas) {
    array->arena = block.arenas;
    set_readable(array->data, bytes, true);
  }
  TSAN(__tsan_acquire(&allocation_clock));
  return array->data;
}

void release_shared(Block& block) {
  for (SharedArray& array : block.shared) {
    if (!red_zones_intact(array.data, array.bytes))
      fail({current.name, 0}, "block (%u,%u,%u) wrote outside a shared array of %zu bytes at offset %zu", block.index.x,
           block.index.y, block.index.z, array.bytes, array.offset);
    set_readable(array.data, array.bytes, true);
    free(array.allocation);
  }
}

void global_load(const void* p, unsigned bytes, Site site) {
  check_global("load", p, bytes, site);
  current.counters.global_load_bytes += bytes;
}

void global_store(const void* p, unsigned bytes, Site site) {
  check_global("store", p, bytes, site);
  current.counters.global_store_bytes += bytes;
}

// ---- cp.async
void copy_queue(const Copy& copy, Site site) {
  CopyQueue& q = running()->copies;
  if (reinterpret_cast<uintptr_t>(copy.shared) % 16) fail(site, "cp.async: %p is not 16-byte aligned", copy.shared);
  if (copy.global) {
    check_global("cp.async", copy.global, 16, site);
    current.counters.cp_async_bytes += 16;
  }
  const unsigned under_way = q.issued - q.done;
  if (under_way == CopyQueue::max_copies) fail(site, "%u copies of one thread are under way", under_way);
  q.copies[q.issued++ % CopyQueue::max_copies] = copy;
}

void copy_commit(Site site) {
  CopyQueue& q = running()->copies;
  const unsigned under_way = q.committed - q.waited;
  if (under_way == CopyQueue::max_groups) fail(site, "%u groups of one thread are under way", under_way);
  q.groups[q.committed++ % CopyQueue::max_groups] = q.issued;
}

bool copy_next(int keep, Copy* copy) {
  CopyQueue& q = running()->copies;
  for (; q.committed - q.waited > static_cast<unsigned>(keep); q.waited++) {
    if (q.done != q.groups[q.waited % CopyQueue::max_groups]) {
      *copy = q.copies[q.done++ % CopyQueue::max_copies];
      return true;
    }
  }
  return false;
}

void check_copies_waited() {
  const CopyQueue& q = running()->copies;
  if (q.issued != q.done) fail({current.name, 0}, "a thread ends with %u cp.async copies under way", q.issued - q.done);
}

// ---- The host's side
void enter_device_memory() { set_device_memory_readable(true); }

void leave_device_memory() {
  check_red_zones();
  set_device_memory_readable(false);
}

cudaError_t allocate(void** p, size_t bytes) {
  char* allocation = allocate_with_red_zones(bytes);
  if (!allocation) return cudaErrorMemoryAllocation;
  *p = allocation + kRedZone;
  allocations[allocation + kRedZone] = bytes;
  set_readable(*p, bytes, false);
  return cudaSuccess;
}

}  // namespace simt

cudaError_t cudaFree(void* p) {
  using namespace simt;
  if (!p) return cudaSuccess;
  const auto found = allocations.find(static_cast<char*>(p));
  if (found == allocations.end()) fail({"cudaFree", 0}, "%p did not come from cudaMalloc", p);
  check_red_zones();
  set_readable(p, found->second, true);
  allocations.erase(found);
  latest = {};
  free(static_cast<char*>(p) - kRedZone);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  using namespace simt;
  if (kind != cudaMemcpyDeviceToHost && !in_device_memory(to, bytes)) return cudaErrorInvalidValue;
  if (kind != cudaMemcpyHostToDevice && !in_device_memory(from, bytes)) return cudaErrorInvalidValue;
  enter_device_memory();
  memcpy(to, from, bytes);
  leave_device_memory();
  return cudaSuccess;
}

cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  using namespace simt;
  if (!in_device_memory(p, bytes)) return cudaErrorInvalidValue;
  enter_device_memory();
  memset(p, value, bytes);
  leave_device_memory();
  return cudaSuccess;
}
