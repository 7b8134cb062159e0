// What the emulator's source files share; kernels and harnesses do not see it.
//
// The runtime is compiled without sanitizers. It tells them what they cannot see: SIMT_ASAN and SIMT_TSAN say which one
// the kernels have. On a kernel's fiber it must not call memset, memcpy or malloc, which TSan intercepts and would
// take for the kernel's own accesses.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda_on_cpu.h"

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(SIMT_TSAN)
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>
#endif
#if defined(SIMT_TSAN)
#define TSAN(statement) statement
#else
#define TSAN(statement)
#endif

namespace simt {

struct Block;
struct Fiber;

template <class T>
class Ring {  // a queue of fixed capacity
 public:
  void reset(size_t capacity) { slots_.assign(capacity, T()), head_ = size_ = 0; }
  bool empty() const { return !size_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return slots_[wrap(head_ + i)]; }
  void push(T v) { slots_[wrap(head_ + size_++)] = v; }
  T pop_front() {
    const T v = slots_[head_];
    head_ = wrap(head_ + 1), size_--;
    return v;
  }
  T pop_back() { return slots_[wrap(head_ + --size_)]; }

 private:
  size_t wrap(size_t i) const { return i < slots_.size() ? i : i - slots_.size(); }
  std::vector<T> slots_;
  size_t head_ = 0, size_ = 0;
};

// What TSan takes for the mutex of a meeting: arrivals release, departures acquire. Two, used in turn: a thread may
// arrive at the next meeting before another has left this one.
struct Meeting {
  unsigned round = 0;
  char clock[2];
  char* now() { return &clock[round & 1]; }
};

enum class Wait : uint8_t { none, warp, block, grid, ended };

struct Lane {  // what one lane brings to a collective and gets from it; the pointers lead into its stack
  uint64_t in, out;
  int argument, width;
  const uint32_t *a, *b;
  const uint4* row;
  uint32_t* r;
  float* d;
};

struct Warp {
  uint32_t live = 0, arrived = 0;
  Collective kind{};
  Site site{};
  Meeting meeting;
  Fiber** fibers = nullptr;
  Lane lanes[32];
};

struct Barrier {
  size_t arrived = 0;
  int votes = 0, result[2];
  Site site{};
  Meeting meeting;
};

struct SharedArray {
  size_t offset, bytes;
  unsigned arena;  // of the block's arenas, the latest that this array was taken from
  char *allocation, *data;
};

struct Block {
  uint3 index{};
  size_t live = 0;
  bool queued = false, used_mma = false;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  Ring<Fiber*> ready;
  Barrier barrier;
  unsigned arenas = 0, arena_round = 0;  // SharedArenas so far, and the round of the barrier when the latest came
  std::vector<SharedArray> shared;
};

struct CopyQueue {  // plain arrays: see above
  static constexpr unsigned max_copies = 128, max_groups = 16;
  Copy copies[max_copies];
  unsigned issued = 0, done = 0;
  unsigned groups[max_groups];  // the value of `issued` at each commit
  unsigned committed = 0, waited = 0;
};

struct Context {
  void* stack_pointer = nullptr;
};

struct Fiber : Thread {
  Context context;
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
  Block* home = nullptr;
  Warp* warp = nullptr;
  unsigned lane = 0, arenas = 0;
  Wait wait = Wait::none;
  Site wait_site{};
  CopyQueue copies;
};

struct Launch {
  const char* name = nullptr;
  Body body = nullptr;
  const void* arguments = nullptr;
  size_t shared_bytes = 0;
  std::vector<Block> blocks;
  Barrier grid_barrier;
  size_t threads = 0, live = 0;  // in all; those that have not ended
  Counters counters{};
};
extern Launch current;

enum class Order : uint8_t { forward, reverse, random, greedy };
struct Schedule {
  Order order = Order::forward;
  uint64_t state = 1;
  uint64_t random();
};
extern Schedule schedule;
inline bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

// fibers.cpp
inline Fiber* running() { return static_cast<Fiber*>(self); }
extern Fiber host;
void start_fibers(Launch&, dim3 grid, dim3 block);
void run_fibers(Launch&);
void wake(Fiber*);
void wait_for(Wait, Site);
TSAN(void on_neutral_fiber(void (*)(void*), void*);)

// collectives.cpp
void leave_meetings(Fiber*);

// memory.cpp
void check_copies_waited();
void release_shared(Block&);
void enter_device_memory();
void leave_device_memory();

}  // namespace simt
