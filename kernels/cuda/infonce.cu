// The one kernel: similarity, selection, six syntheses, InfoNCE, gradient, rank and statistics in one launch.
//
//   matrix phase (queue_pass.h)   blocks = row tiles x splits of the queue
//   --- grid barrier ---
//   row phase (finish.h)          a block to a query: selection.h, synthesis.h
//   --- grid barrier ---          queries beyond the workspace: again from the top
//   means over the batch
//
// What it fuses: both matrix products, exp, exact top-n, draws, closed forms, softmax sum, gradient. What it never
// materialises: float32 similarities, weights, softmax, synthetic vectors, logits. In the workspace (at most 64 MiB):
// float16 similarities of a pass (only when something is selected) and each split's sums.
// Deterministic: no float atomics; every sum has a fixed order.

#include "infonce.h"

#include <algorithm>

#include "finish.h"
#include "queue_pass.h"

namespace synco::cuda {

template <int dim, bool clocked>
__global__ void __launch_bounds__(kThreads, 1) infonce_kernel(const Arguments a, const Plan p) {
  Clock<clocked> clock(a);
  for (int first_row = 0; first_row < a.batch; first_row += p.rows_per_pass) {
    const int rows = min(p.rows_per_pass, a.batch - first_row);
    if (first_row) grid_sync();  // the workspace may still be read
    clock.lap(kWaiting);
    queue_pass<dim>(a, p, first_row, rows, clock);
    grid_sync();
    clock.lap(kWaiting);
    finish_rows<dim>(a, p, first_row, rows, clock);
  }
  grid_sync();
  clock.lap(kWaiting);
  if (blockIdx.x == 0) finish_batch(a, p);
  clock.lap(kFinish);
}

namespace {

int divide_up(int a, int b) { return (a + b - 1) / b; }

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

int tile_columns(int dim) { return dim == 256 ? Tile<256>::columns : Tile<128>::columns; }

unsigned matrix_shared_bytes(int dim) {
  return dim == 64 ? pass_shared_bytes<64>() : dim == 128 ? pass_shared_bytes<128>() : pass_shared_bytes<256>();
}

template <int dim>
cudaError_t launch(const Arguments& arguments, const Plan& plan, cudaStream_t stream) {
  // One without clocks has its own registers.
  const auto kernel = arguments.phases ? infonce_kernel<dim, true> : infonce_kernel<dim, false>;
  // Always the same, so that it does not matter whose launch comes between this and the next line.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_limit);
  if (error != cudaSuccess) return error;
  return SYNCO_LAUNCH_COOPERATIVE(kernel, plan.blocks, kThreads, plan.shared_bytes, stream, arguments, plan);
}

}  // namespace

Plan make_plan(int batch, int queue_rows, int dim, const HardNegatives& hard, const Device& device) {
  Plan p{};
  p.blocks = static_cast<unsigned>(device.processors);
  p.shared_limit = device.shared_bytes;
  p.row_stride = divide_up(queue_rows, tile_columns(dim)) * tile_columns(dim);  // all of it is written
  const size_t sums_limit = static_cast<size_t>(device.processors) * kTileRows * (dim + 2) * sizeof(float);
  const size_t stats_bytes = static_cast<size_t>(batch) * kRowStats * sizeof(float);
  int rows = std::min(batch, device.processors * kTileRows);
  if (hard.n_hard) {
    const size_t row_bytes = static_cast<size_t>(p.row_stride) * sizeof(half);
    const size_t left = kWorkspaceLimit - std::min(kWorkspaceLimit, sums_limit + stats_bytes + 5 * 256);
    rows = static_cast<int>(std::min<size_t>(rows, std::max<size_t>(left / row_bytes, 1)));
    if (rows < batch && rows > kTileRows) rows = rows / kTileRows * kTileRows;
  }
  p.rows_per_pass = rows;
  p.row_tiles = divide_up(rows, kTileRows);
  const int queue_tiles = divide_up(queue_rows, tile_columns(dim));
  p.splits = std::min(queue_tiles, device.processors / p.row_tiles);

  const size_t slots = static_cast<size_t>(p.splits) * rows;
  p.similarity = 0;
  p.pull = aligned(hard.n_hard ? static_cast<size_t>(rows) * p.row_stride * sizeof(half) : 0);
  p.weight = p.pull + aligned(slots * dim * sizeof(float));
  p.rank = p.weight + aligned(slots * sizeof(float));
  p.stats = p.rank + aligned(slots * sizeof(int));
  p.bytes = p.stats + aligned(stats_bytes);

  const int chunks = p.row_stride / 8;
  const unsigned kept = finish_shared_bytes(dim, hard.n_hard, chunks);
  p.keep_row = hard.n_hard && kept <= static_cast<unsigned>(device.shared_bytes);
  p.shared_bytes = std::max(matrix_shared_bytes(dim), p.keep_row ? kept : finish_shared_bytes(dim, hard.n_hard, 0));
  return p;
}

cudaError_t infonce(const Arguments& arguments, const Plan& plan, int dim, cudaStream_t stream) {
  if (dim == 64) return launch<64>(arguments, plan, stream);
  if (dim == 128) return launch<128>(arguments, plan, stream);
  if (dim == 256) return launch<256>(arguments, plan, stream);
  return cudaErrorInvalidValue;
}

}  // namespace synco::cuda
