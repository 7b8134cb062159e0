// A small correct kernel, and the mistakes that the emulator must catch: `planted NAME` makes the mistake of that name,
// `planted none` none, and without a name they are listed. Ends with 0 if the result is right, and with 3 and "wrong
// result" if not.
#include <cstdio>
#include <cstring>
#include <vector>

#include "gpu.h"

using namespace synco;

namespace {

constexpr unsigned FULL = 0xffffffffu, THREADS = 64, BLOCKS = 3;
constexpr int TILES = 4;
constexpr unsigned STAGES_END = shared_end<uint4, 128>(0, 2 * THREADS);
constexpr unsigned SHARED = shared_end<unsigned>(shared_end<unsigned>(STAGES_END, THREADS), 1);

#define BUGS(X)                                                                                             \
  X(none) X(no_barrier_after_wait) X(no_wait) X(no_barrier_before_reuse) X(no_syncwarp) X(no_atomic)        \
  X(no_grid_sync) X(no_zeroing) X(block_misses_grid_sync) X(shared_write_past_end) X(shared_read_past_end)  \
  X(global_write_past_end) X(global_store_past_end) X(shuffle_in_branch) X(shuffle_with_partial_mask)       \
  X(barrier_in_branch) X(mma_in_branch) X(misaligned_row) X(misaligned_load) X(load_from_host)              \
  X(copies_left_at_exit) X(second_arena_without_barrier) X(array_of_former_arena) X(signed_overflow)        \
  X(endless_loop) X(host_reads_device) X(too_many_blocks) X(shared_not_allowed) X(shared_not_launched_with)

#define ENUMERATOR(name) name,
#define NAME(name) #name,
enum Bug { BUGS(ENUMERATOR) };
const char* const names[] = {BUGS(NAME)};

struct Parameters {
  const uint4* tiles;  // TILES of THREADS vectors
  unsigned *partials, *out;
  const unsigned* host;
  Bug bug;
};

// The mistakes that take a statement more than the correct kernel; the others leave one out.
__device__ void misbehave(const Parameters& p, uint4* stages, unsigned* scratch) {
  const unsigned thread = threadIdx.x, lane = thread % 32;
  uint32_t r[4] = {};
  switch (p.bug) {
    case shared_write_past_end: scratch[thread + 1] = 0; break;
    case shared_read_past_end: scratch[thread] = stages[2 * thread + 2].x; break;
    case global_write_past_end: p.out[blockIdx.x * THREADS + thread + 1] = 0; break;
    case global_store_past_end: store_global(&p.out[blockIdx.x * THREADS + thread + 1], 0u); break;
    case shuffle_in_branch: if (lane < 16) __shfl_xor_sync(FULL, thread, 1); break;
    case shuffle_with_partial_mask: if (lane < 16) __shfl_xor_sync(0xffff, thread, 1); break;
    case barrier_in_branch: if (thread < 32) __syncthreads(); break;
    case misaligned_row: ldmatrix_x4(r, reinterpret_cast<char*>(stages) + 8 * lane); break;
    case misaligned_load: load_global(reinterpret_cast<const uint4*>(p.out + 1)); break;
    case load_from_host: load_global(p.host); break;
    case second_arena_without_barrier: SharedArena().take<unsigned>(1); break;
    case endless_loop: for (volatile bool go_on = true; go_on;) {} break;
    case mma_in_branch:
      if (lane < 16) {
        float d[4] = {};
        mma_m16n8k16(d, r, {0, 0});
      }
      break;
    case signed_overflow: {
      volatile int large = 0x7fffffff;
      scratch[thread] = static_cast<unsigned>(large + static_cast<int>(blockDim.x));
      break;
    }
    default: break;
  }
}

__device__ unsigned sum_tiles(const Parameters& p, uint4* stages) {
  const unsigned thread = threadIdx.x;
  const auto fetch = [&](int tile) {
    if (tile < TILES) cp_async16(&stages[tile % 2 * THREADS + thread], &p.tiles[tile * THREADS + thread], true);
    cp_async_commit();
  };
  unsigned sum = 0;
  fetch(0);
  for (int tile = 0; tile < TILES; tile++) {
    fetch(tile + 1);
    if (p.bug != no_wait) cp_async_wait<1>();
    if (p.bug != no_barrier_after_wait) __syncthreads();
    sum += stages[tile % 2 * THREADS + (thread + 33) % THREADS].y;
    if (p.bug != no_barrier_before_reuse) __syncthreads();
  }
  if (p.bug == copies_left_at_exit) cp_async16(&stages[thread], &p.tiles[thread], true);
  cp_async_wait<0>();
  return sum;
}

__device__ unsigned total_of_former_arena(const unsigned* total) {
  __syncthreads();
  SharedArena next;
  next.take<unsigned>(THREADS);
  return *total;
}

__global__ void add_up(const Parameters p) {
  const unsigned thread = threadIdx.x, block = blockIdx.x;
  SharedArena arena;
  uint4* stages = arena.take<uint4, 128>(2 * THREADS);
  unsigned* scratch = arena.take<unsigned>(THREADS);
  unsigned* total = arena.take<unsigned>(1);
  if (p.bug == shared_not_launched_with) arena.take<unsigned>(1);
  misbehave(p, stages, scratch);
  if (thread == 0 && p.bug != no_zeroing) *total = 0;

  unsigned sum = sum_tiles(p, stages);
  scratch[thread] = sum;
  if (p.bug != no_syncwarp) __syncwarp();
  sum += scratch[thread ^ 1];
  if (p.bug == no_atomic) *total += sum;
  else atomicAdd(total, sum);
  __syncthreads();
  if (thread == 0) store_global(&p.partials[block], *total + block);
  const unsigned expected = p.bug == array_of_former_arena ? total_of_former_arena(total) + (block + 1) % BLOCKS : 0;

  if (p.bug == block_misses_grid_sync && block == 1) return;
  if (p.bug != no_grid_sync) grid_sync();
  const unsigned other = load_global_cg(&p.partials[(block + 1) % BLOCKS]);
  store_global(&p.out[block * THREADS + thread], p.bug == array_of_former_arena ? expected : other);
}

unsigned word(unsigned i) { return i * 2654435761u >> 8; }

#define CHECK(call)                                                                            \
  if (const cudaError_t error = (call)) {                                                      \
    fprintf(stderr, "line %d: %s: %s\n", __LINE__, #call, cudaGetErrorString(error));          \
    return 2;                                                                                  \
  }

int add_up_on_device(Bug bug) {
  std::vector<uint4> tiles(TILES * THREADS);
  unsigned sum = 0;
  for (unsigned i = 0; i < tiles.size(); i++) {
    tiles[i] = {i, word(i), 0, i};
    sum += 2 * word(i);
  }
  uint4* on_tiles;
  unsigned *partials, *on_out;
  std::vector<unsigned> out(BLOCKS * THREADS);
  CHECK(cudaMalloc(&on_tiles, tiles.size() * sizeof(uint4)));
  CHECK(cudaMalloc(&partials, BLOCKS * sizeof(unsigned)));
  CHECK(cudaMalloc(&on_out, out.size() * sizeof(unsigned)));
  CHECK(cudaMemcpy(on_tiles, tiles.data(), tiles.size() * sizeof(uint4), cudaMemcpyHostToDevice));

  const Parameters p{on_tiles, partials, on_out, out.data(), bug};
  const unsigned shared = bug == shared_not_allowed ? 60000 : SHARED, grid = bug == too_many_blocks ? 100000 : BLOCKS;
  CHECK(SYNCO_LAUNCH_COOPERATIVE(add_up, grid, THREADS, shared, nullptr, p));
  CHECK(cudaDeviceSynchronize());
  if (bug == host_reads_device) printf("%u\n", on_out[0]);

  CHECK(cudaMemcpy(out.data(), on_out, out.size() * sizeof(unsigned), cudaMemcpyDeviceToHost));
  CHECK(cudaFree(on_tiles));
  CHECK(cudaFree(partials));
  CHECK(cudaFree(on_out));
  for (unsigned i = 0; i < out.size(); i++)
    if (out[i] != sum + (i / THREADS + 1) % BLOCKS) {
      fprintf(stderr, "wrong result\n");
      return 3;
    }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  int bug = 0;
  for (const char* name : names) {
    if (count == 2 && !strcmp(arguments[1], name)) return add_up_on_device(static_cast<Bug>(bug));
    bug++;
  }
  for (const char* name : names) printf("%s\n", name);
  return 4;
}
