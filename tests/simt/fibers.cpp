// Fibers, and which of them runs next.
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include "runtime.h"

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

// Saves the registers that a callee must save, and no signal mask: that would be a system call.
extern "C" void simt_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.type simt_switch,@function
.globl simt_switch
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size simt_switch,.-simt_switch
)");

namespace simt {

Thread* self = nullptr;
Fiber host;
Schedule schedule;

uint64_t Schedule::random() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

namespace {

constexpr size_t kPage = 4096;
std::vector<Fiber*>& pool = *new std::vector<Fiber*>;  // never destroyed: LeakSanitizer would report the fibers
Ring<Block*> ready_blocks;
TSAN(char start_clock; char end_clock; void* neutral;)

void read_schedule() {
  const char* text = getenv("SIMT_SCHED");
  if (!text) return;
  static const struct {
    const char* name;
    Order order;
  } orders[] = {{"fwd", Order::forward}, {"rev", Order::reverse}, {"rand", Order::random}, {"greedy", Order::greedy}};
  const size_t length = strcspn(text, ":");
  const auto* found = std::find_if(std::begin(orders), std::end(orders), [&](const auto& o) {
    return strlen(o.name) == length && !strncmp(o.name, text, length);
  });
  if (found == std::end(orders)) fail({"SIMT_SCHED", 0}, "fwd, rev, rand:N or greedy:N, got %s", text);
  const uint64_t seed = text[length] ? strtoull(text + length + 1, nullptr, 10) : 0;
  schedule = {found->order, seed * 0x9e3779b97f4a7c15u + 1};
}

void on_alarm(int) { fail({"SIMT_TIMEOUT", 0}, "the time is up"); }

size_t stack_bytes() {
  if (const char* text = getenv("SIMT_STACK_KB")) return std::max(16, atoi(text)) * size_t{1024};
#if defined(SIMT_ASAN)
  return 256 << 10;
#elif defined(SIMT_TSAN)
  return 128 << 10;
#else
  return 64 << 10;
#endif
}

void set_up() {
  static bool done = false;
  if (done) return;
  done = true;
  read_schedule();
  pthread_attr_t attributes;
  void* stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &host.stack_bytes);
  pthread_attr_destroy(&attributes);
  host.stack = static_cast<char*>(stack);
  TSAN(host.tsan_fiber = __tsan_get_current_fiber(); neutral = __tsan_create_fiber(0);)
  if (const char* seconds = getenv("SIMT_TIMEOUT")) {
    TSAN(if (false)) signal(SIGALRM, on_alarm);  // TSan holds signals back until a system call: let this one kill
    alarm(static_cast<unsigned>(atoi(seconds)));
  }
}

void grow_pool(size_t threads) {
  if (pool.size() >= threads) return;
  const size_t more = threads - pool.size(), bytes = stack_bytes();
  const size_t pitch = bytes + kPage;  // an odd number of pages: equal frames must not all share a cache set
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, more * pitch, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) fail({"mmap", 0}, "no room for %zu stacks of %zu bytes", more, bytes);
  for (size_t i = 0; i < more; i++) {
    Fiber* fiber = new Fiber;
    fiber->stack = static_cast<char*>(memory) + i * pitch;
    fiber->stack_bytes = bytes;
    // A page that faults under the stack, as long as the kernel allows so many mappings. (TSan: see renew.)
    TSAN(if (false)) if (threads < 16384) mprotect(fiber->stack, kPage, PROT_NONE);
    pool.push_back(fiber);
  }
}

void fiber_main();

// The frame that simt_switch will pop: six registers and the address to return to.
void prepare(Context& context, char* stack_top) {
  void** p = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack_top) & ~uintptr_t{15});
  *--p = nullptr;
  *--p = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; i++) *--p = nullptr;
  context.stack_pointer = p;
}

#if defined(SIMT_TSAN)
// TSan gets a new thread for each CUDA thread, or it would know of the last launch's writes; a new mapping clears what
// TSan remembers of the stack.
void renew(Fiber& fiber) {
  __tsan_switch_to_fiber(neutral, __tsan_switch_to_fiber_no_sync);
  mmap(fiber.stack, fiber.stack_bytes, PROT_READ | PROT_WRITE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  fiber.tsan_fiber = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(host.tsan_fiber, __tsan_switch_to_fiber_no_sync);
}
#endif

void switch_to(Fiber* to, bool for_good = false) {
  Fiber* from = running();
  if (to == from) return;
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from->asan_stack, to->stack, to->stack_bytes);
#endif
  (void)for_good;
  self = to;
  TSAN(__tsan_switch_to_fiber(to->tsan_fiber, __tsan_switch_to_fiber_no_sync));
  simt_switch(&from->context.stack_pointer, to->context.stack_pointer);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from->asan_stack, nullptr, nullptr);
#endif
}

template <class T>
void shuffle_front(Ring<T>& ring) {
  std::swap(ring[0], ring[schedule.random() % ring.size()]);
}

// A block stays in front until none of its threads can run: its stacks and shared memory are what the caches hold. At
// random it gives way now and then; at every switch, the large problems would take minutes.
Fiber* next() {
  const bool random = schedule.order == Order::random;
  while (!ready_blocks.empty()) {
    if (random && schedule.random() % 256 == 0) shuffle_front(ready_blocks);
    Block& block = *ready_blocks[0];
    if (block.ready.empty()) {
      block.queued = false;
      ready_blocks.pop_front();
      continue;
    }
    if (random) shuffle_front(block.ready);
    return schedule.order == Order::greedy ? block.ready.pop_back() : block.ready.pop_front();
  }
  return &host;
}

void fiber_main() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  TSAN(__tsan_acquire(&start_clock));
  current.body(current.arguments);
  check_copies_waited();
  Fiber* fiber = running();
  fiber->wait = Wait::ended;
  current.live--;
  leave_meetings(fiber);
  TSAN(__tsan_release(&end_clock));
  switch_to(next(), true);
  __builtin_unreachable();
}

void start_fiber(Fiber& fiber, Block& block, unsigned i, dim3 grid, dim3 size) {
  static_cast<Thread&>(fiber) = {{i % size.x, i / size.x % size.y, i / size.x / size.y}, block.index, size, grid};
  fiber.home = &block;
  fiber.warp = &block.warps[i / 32];
  fiber.lane = i % 32;
  fiber.warp->live |= 1u << fiber.lane;
  fiber.arenas = 0;
  fiber.asan_stack = nullptr;
  fiber.copies.issued = fiber.copies.done = fiber.copies.committed = fiber.copies.waited = 0;
  TSAN(renew(fiber));
  // Staggered, for the caches again: within a warp the frames begin in different lines.
  prepare(fiber.context, fiber.stack + fiber.stack_bytes - i % 32 * 128);
  block.fibers[i] = &fiber;
}

void start_block(Block& block, size_t number, size_t threads, dim3 grid, dim3 size) {
  block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
  block.live = threads;
  block.fibers.resize(threads);
  block.warps.resize((threads + 31) / 32);
  block.ready.reset(threads);
  block.shared.reserve(64);
  for (size_t w = 0; w < block.warps.size(); w++) block.warps[w].fibers = &block.fibers[w * 32];
  for (size_t i = 0; i < threads; i++) start_fiber(*pool[number * threads + i], block, i, grid, size);
}

// 0, 1, ... in the order that the schedule starts with.
std::vector<size_t> starting_order(size_t n, bool shuffled) {
  std::vector<size_t> order(n);
  for (size_t i = 0; i < n; i++) {
    order[i] = schedule.order == Order::reverse ? n - 1 - i : i;
    if (shuffled) std::swap(order[i], order[schedule.random() % (i + 1)]);
  }
  return order;
}

void queue_blocks(Launch& launch) {
  const bool greedy = schedule.order == Order::greedy, random = schedule.order == Order::random;
  for (size_t b : starting_order(launch.blocks.size(), greedy || random)) {
    Block& block = launch.blocks[b];
    const size_t threads = block.fibers.size();
    for (size_t w : starting_order(block.warps.size(), greedy))
      for (size_t i = 0; i < std::min<size_t>(32, threads - w * 32); i++)
        wake(block.fibers[schedule.order == Order::reverse ? std::min(w * 32 + 32, threads) - 1 - i : w * 32 + i]);
  }
}

void print_waiting(const Block& block, size_t from, size_t to) {
  static const char* const names[] = {"can run", "wait for their warp", "wait for their block", "wait for the grid",
                                      "ended"};
  const Fiber& first = *block.fibers[from];
  fprintf(stderr, "  %zu threads from (%u,%u,%u) of block (%u,%u,%u) %s", to - from, first.thread.x, first.thread.y,
          first.thread.z, block.index.x, block.index.y, block.index.z, names[static_cast<int>(first.wait)]);
  if (first.wait == Wait::ended) fprintf(stderr, "\n");
  else fprintf(stderr, " at %s:%d\n", first.wait_site.file, first.wait_site.line);
}

[[noreturn]] void report_deadlock(const Launch& launch) {
  fprintf(stderr, "simt: DEADLOCK in kernel %s: no thread can run\n", launch.name);
  const auto alike = [](const Fiber& a, const Fiber& b) {
    return a.wait == b.wait && (a.wait == Wait::ended || same(a.wait_site, b.wait_site));
  };
  const auto waits = [](const Block& block) { return block.live != 0; };
  const Block& block = *std::find_if(launch.blocks.begin(), launch.blocks.end(), waits);  // one says it all
  size_t from = 0;
  for (size_t i = 1; i <= block.fibers.size(); i++) {
    if (i < block.fibers.size() && alike(*block.fibers[from], *block.fibers[i])) continue;
    print_waiting(block, from, i);
    from = i;
  }
  _exit(70);
}

}  // namespace

void wake(Fiber* fiber) {
  Block* block = fiber->home;
  fiber->wait = Wait::none;
  block->ready.push(fiber);
  if (!block->queued) block->queued = true, ready_blocks.push(block);
}

void wait_for(Wait what, Site site) {
  Fiber* fiber = running();
  fiber->wait = what, fiber->wait_site = site;
  switch_to(next());
}

#if defined(SIMT_TSAN)
// To TSan, malloc and memset are accesses by the calling thread. The neutral fiber belongs to no CUDA thread.
void on_neutral_fiber(void (*work)(void*), void* argument) {
  __tsan_switch_to_fiber(neutral, __tsan_switch_to_fiber_no_sync);
  work(argument);
  __tsan_switch_to_fiber(running()->tsan_fiber, __tsan_switch_to_fiber_no_sync);
}
#endif

void start_fibers(Launch& launch, dim3 grid, dim3 block) {
  set_up();
  const size_t threads = size_t{block.x} * block.y * block.z;
  launch.threads = launch.live = launch.blocks.size() * threads;
  TSAN(if (launch.live > 8000) fail({launch.name, 0}, "%zu threads: TSan takes 8000", launch.live);)
  grow_pool(launch.live);
  self = &host;
  ready_blocks.reset(launch.blocks.size());
  for (size_t i = 0; i < launch.blocks.size(); i++) start_block(launch.blocks[i], i, threads, grid, block);
  queue_blocks(launch);
  TSAN(__tsan_release(&start_clock));
}

void run_fibers(Launch& launch) {
  switch_to(next());
  if (launch.live) report_deadlock(launch);
  TSAN(__tsan_acquire(&end_clock));
  TSAN(for (Block& block : launch.blocks) for (Fiber* fiber : block.fibers) __tsan_destroy_fiber(fiber->tsan_fiber);)
  self = nullptr;
}

}  // namespace simt
