// Where threads meet: the collectives of a warp, the barriers of a block and of the grid.
#include "runtime.h"

namespace simt {

namespace {

const char* name(Collective kind) {
  static const char* const names[] = {"__syncwarp", "__shfl_sync", "__shfl_xor_sync", "__shfl_up_sync",
                                      "__shfl_down_sync", "__ballot_sync", "__any_sync", "__reduce_add_sync",
                                      "mma", "ldmatrix", "ldmatrix transposed"};
  return names[static_cast<int>(kind)];
}

template <class F>
void for_each_lane(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(static_cast<unsigned>(__builtin_ctz(mask)));
}

half low(uint32_t pair) { return {static_cast<uint16_t>(pair)}; }
half high(uint32_t pair) { return {static_cast<uint16_t>(pair >> 16)}; }

// ---- mma. With g = lane / 4 and t = lane % 4, a register holds two neighbours along k (PTX ISA, mma.m16n8k16):
//   a[i]: row g + 8 (i % 2), columns 2t + 8 (i / 2)..   b[i]: rows 2t + 8 i.., column g
//   d[i]: row g + 8 (i / 2), column 2t + i % 2
// Products of halves are exact in double, where the sum is made too. Hardware sums in float and rounds more often.
void multiply(Warp& warp) {
  half a[16 * 16], b[16 * 8];
  for (unsigned lane = 0; lane < 32; lane++) {
    const unsigned g = lane / 4, t = lane % 4;
    const Lane& l = warp.lanes[lane];
    for (unsigned i = 0; i < 4; i++) {
      half* pair = &a[(g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2)];
      pair[0] = low(l.a[i]), pair[1] = high(l.a[i]);
    }
    for (unsigned i = 0; i < 2; i++) {
      half* pair = &b[(2 * t + 8 * i) * 8 + g];
      pair[0] = low(l.b[i]), pair[8] = high(l.b[i]);
    }
  }
  double left[16 * 16], right[16 * 8];
  for (int i = 0; i < 16 * 16; i++) left[i] = __half2float(a[i]);
  for (int i = 0; i < 16 * 8; i++) right[i] = __half2float(b[i]);
  for (unsigned row = 0; row < 16; row++) {
    double sum[8] = {};
    for (unsigned k = 0; k < 16; k++)
      for (unsigned column = 0; column < 8; column++) sum[column] += left[row * 16 + k] * right[k * 8 + column];
    for (unsigned column = 0; column < 8; column++) {
      float& d = warp.lanes[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2];
      d = static_cast<float>(d + sum[column]);
    }
  }
}

// ---- ldmatrix: lane 8 i + j brought row j of matrix i.
void exchange(Warp& warp, bool transposed) {
  const auto row = [&](unsigned i, unsigned j) { return reinterpret_cast<const uint32_t*>(warp.lanes[8 * i + j].row); };
  const auto element = [&](unsigned i, unsigned r, unsigned c) { return row(i, r)[c / 2] >> 16 * (c % 2) & 0xffffu; };
  for (unsigned lane = 0; lane < 32; lane++) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; i++)
      warp.lanes[lane].r[i] = transposed ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16 : row(i, g)[t];
  }
}

unsigned source(const Warp& warp, unsigned lane) {
  const int l = static_cast<int>(lane), argument = warp.lanes[lane].argument, width = warp.lanes[lane].width;
  const int first = l & ~(width - 1), end = first + width;
  int from = l;
  if (warp.kind == Collective::shuffle) from = first | (argument & (width - 1));
  if (warp.kind == Collective::shuffle_xor) from = l ^ argument;
  if (warp.kind == Collective::shuffle_up) from = l - argument;
  if (warp.kind == Collective::shuffle_down) from = l + argument;
  if (from >= end || (warp.kind == Collective::shuffle_up && from < first)) from = l;  // out of range: keep one's own
  if (!(warp.live >> from & 1))
    fail(warp.site, "%s: lane %u reads lane %d, which has ended", name(warp.kind), lane, from);
  return static_cast<unsigned>(from);
}

void shuffle(Warp& warp) {
  for_each_lane(warp.live, [&](unsigned lane) { warp.lanes[lane].out = warp.lanes[source(warp, lane)].in; });
}

void reduce(Warp& warp) {
  uint64_t result = 0;
  for_each_lane(warp.live, [&](unsigned lane) {
    const uint64_t in = warp.lanes[lane].in;
    if (warp.kind == Collective::ballot) result |= uint64_t{in != 0} << lane;
    if (warp.kind == Collective::any) result |= in != 0;
    if (warp.kind == Collective::add) result = static_cast<uint32_t>(result + in);
  });
  for_each_lane(warp.live, [&](unsigned lane) { warp.lanes[lane].out = result; });
}

void complete(Warp& warp) {
  switch (warp.kind) {
    case Collective::sync: break;
    case Collective::mma:
      multiply(warp);
      current.counters.mma++;
      break;
    case Collective::ldmatrix:
    case Collective::ldmatrix_transposed:
      exchange(warp, warp.kind == Collective::ldmatrix_transposed);
      current.counters.ldmatrix++;
      break;
    case Collective::ballot:
    case Collective::any:
    case Collective::add: reduce(warp); break;
    default: shuffle(warp);
  }
  warp.arrived = 0;
  warp.meeting.round++;
}

void wake_lanes(Warp& warp, const Fiber* except) {
  for (unsigned i = 0; i < 32; i++) {
    const unsigned lane = schedule.order == Order::reverse ? 31 - i : i;
    if (warp.live >> lane & 1 && warp.fibers[lane] != except) wake(warp.fibers[lane]);
  }
}

// The running lane is at a collective, and fills its Lane next.
Lane& arrive(Collective kind, Site site) {
  Warp& warp = *running()->warp;
  if (!warp.arrived) {
    warp.kind = kind, warp.site = site;
  } else if (kind != warp.kind || !same(site, warp.site)) {
    fail(site, "warp divergence: this lane is in %s, others are in %s at %s:%d", name(kind), name(warp.kind),
         warp.site.file, warp.site.line);
  }
  warp.arrived |= 1u << running()->lane;
  return warp.lanes[running()->lane];
}

void meet() {
  Fiber* fiber = running();
  Warp& warp = *fiber->warp;
  if (warp.arrived != warp.live) return wait_for(Wait::warp, warp.site);
  complete(warp);
  wake_lanes(warp, fiber);
}

void need_whole_warp(Collective kind, Site site) {
  const uint32_t live = running()->warp->live;
  if (live != ~0u) fail(site, "%s without all 32 lanes (alive: %08x)", name(kind), live);
}

void finish(Barrier& barrier) {
  barrier.result[barrier.meeting.round & 1] = barrier.votes;
  barrier.arrived = 0, barrier.votes = 0;
  barrier.meeting.round++;
}

void wake_waiting(const Block& block, Wait what) {
  const size_t n = block.fibers.size();
  for (size_t i = 0; i < n; i++) {
    Fiber* fiber = block.fibers[schedule.order == Order::reverse ? n - 1 - i : i];
    if (fiber->wait == what) wake(fiber);
  }
}

void finish_block_barrier(Block& block) {
  finish(block.barrier);
  wake_waiting(block, Wait::block);
  current.counters.block_barriers++;
}

void finish_grid_barrier() {
  finish(current.grid_barrier);
  current.counters.grid_barriers++;
  const size_t n = current.blocks.size();
  for (size_t i = 0; i < n; i++)
    wake_waiting(current.blocks[schedule.order == Order::reverse ? n - 1 - i : i], Wait::grid);
}

}  // namespace

uint64_t collective(Collective kind, unsigned mask, uint64_t value, int argument, int width, Site site) {
  if (mask != ~0u) fail(site, "%s: only the full mask is supported, got %08x", name(kind), mask);
  if (width < 1 || width > 32 || (width & (width - 1))) fail(site, "%s: width %d", name(kind), width);
  // Of the collectives, only __syncwarp orders memory.
  [[maybe_unused]] char* clock = kind == Collective::sync ? running()->warp->meeting.now() : nullptr;
  TSAN(if (clock) __tsan_release(clock));
  Lane& lane = arrive(kind, site);
  lane.in = value, lane.argument = argument, lane.width = width;
  meet();
  TSAN(if (clock) __tsan_acquire(clock));
  return lane.out;
}

void mma(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  need_whole_warp(Collective::mma, site);
  Block& block = *running()->home;
  if (!block.used_mma) block.used_mma = true, current.counters.blocks_with_mma++;
  Lane& lane = arrive(Collective::mma, site);
  lane.a = a, lane.b = b, lane.d = d;
  meet();
}

void exchange_matrices(uint32_t* r, const uint4* row, bool transposed, Site site) {
  const Collective kind = transposed ? Collective::ldmatrix_transposed : Collective::ldmatrix;
  need_whole_warp(kind, site);
  Lane& lane = arrive(kind, site);
  lane.row = row, lane.r = r;
  meet();
}


int block_barrier(Vote vote, int predicate, Site site) {
  Block& block = *running()->home;
  Barrier& barrier = block.barrier;
  if (!barrier.arrived) barrier.site = site;
  if (!same(barrier.site, site))
    fail(site, "barrier divergence: other threads of the block wait at %s:%d", barrier.site.file, barrier.site.line);
  [[maybe_unused]] char* clock = barrier.meeting.now();
  const int* result = &barrier.result[barrier.meeting.round & 1];
  TSAN(__tsan_release(clock));
  if (vote == Vote::count) barrier.votes += predicate != 0;
  if (vote == Vote::any) barrier.votes |= predicate != 0;
  if (++barrier.arrived == block.live) {
    finish_block_barrier(block);
  } else {
    wait_for(Wait::block, site);
  }
  TSAN(__tsan_acquire(clock));
  return *result;
}

void grid_barrier(Site site) {
  block_barrier(Vote::none, 0, site);
  Barrier& barrier = current.grid_barrier;
  [[maybe_unused]] char* clock = barrier.meeting.now();
  TSAN(__tsan_release(clock));
  if (++barrier.arrived == current.threads) {  // a thread that has ended is missed, as on the device
    finish_grid_barrier();
  } else {
    wait_for(Wait::grid, site);
  }
  TSAN(__tsan_acquire(clock));
}

// A thread ends: those who wait for it wait no more.
void leave_meetings(Fiber* fiber) {
  Warp& warp = *fiber->warp;
  Block& block = *fiber->home;
  warp.live &= ~(1u << fiber->lane);
  block.live--;
  if (warp.arrived && warp.arrived == warp.live) {
    complete(warp);
    wake_lanes(warp, nullptr);
  }
  if (block.live && block.barrier.arrived == block.live) finish_block_barrier(block);
}

}  // namespace simt
