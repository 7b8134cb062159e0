// The `cuda` backend of synco_fast::infonce: what the host passes to the kernel, and how work is laid out.
#pragma once

#ifdef SYNCO_HOST_SIMT
#include "cuda_on_cpu.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#endif

#include "synco/phases.h"

namespace synco::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 16 * kWarps;             // queries of a row tile, 16 to a warp
constexpr size_t kWorkspaceLimit = size_t{64} << 20;  // bytes
constexpr int kRowStats = 16;                      // floats kept of each query: RowStat in finish.h

enum class Element : int { kFloat, kHalf, kBFloat16 };

// Queue rows of a tile, and tiles in flight, by width: what fits into 99 KiB with the queries beside it.
template <int dim>
struct Tile {
  static constexpr int columns = dim == 256 ? 16 : 64;
  static constexpr int stages = 3;
  // The queries stay in registers, unless their fragments and the sums (dim / 2 registers) would not fit together.
  static constexpr bool queries_in_registers = dim < 256;
};

// How the work is cut, and where in the workspace things lie. A function of shapes and device alone.
struct Plan {
  int rows_per_pass;      // queries whose similarities the workspace holds at a time
  int row_tiles, splits;  // of a pass: row_tiles x splits <= blocks units of work for the matrix phase
  int row_stride;         // of similarity, in elements
  bool keep_row;          // a row of similarities fits into shared memory
  unsigned blocks, shared_bytes;
  int shared_limit;       // Device::shared_bytes
  size_t similarity, pull, weight, rank, stats, bytes;  // offsets into the workspace, and its size
};

struct Arguments {
  const void *q, *k;      // (batch, dim) of element types
  Element q_type, k_type;
  const half* queue;      // (queue_rows, dim)
  const int64_t* step;    // on the device: a captured graph reads it anew
  int batch, queue_rows;
  HardNegatives hard;     // n_hard 0 when nothing is made
  float temperature;
  uint64_t seed;
  uint32_t row_offset;
  float *loss, *gradient, *stats;  // (), (batch, dim), in the order of synco_fast.ops.result.stat_names
  int64_t *rank, *rank_all;        // (batch)
  unsigned char* workspace;        // Plan::bytes, aligned to 256
  int64_t* phases;        // null, or (blocks, kPhases) cycles, to which this launch's are added
};

struct Device {
  int processors;        // streaming multiprocessors
  int shared_bytes;      // that a block may ask for
};

// dim is 64, 128 or 256; queue_rows >= n_hard.
Plan make_plan(int batch, int queue_rows, int dim, const HardNegatives& hard, const Device& device);

// One cooperative launch. Returns the launch's error, if any.
cudaError_t infonce(const Arguments& arguments, const Plan& plan, int dim, cudaStream_t stream);

}  // namespace synco::cuda
