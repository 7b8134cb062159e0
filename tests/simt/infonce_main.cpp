// Runs the CUDA backend on the CPU: infonce_main INPUT OUTPUT reads a Header and q, k and the queue, and writes loss,
// gradient, statistics, rank, rank_all and, if clocked, phases. The plan and what the launch executed go to stdout as one line of JSON.

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "infonce.h"

namespace {

struct Header {
  int64_t batch, queue_rows, dim, q_type, k_type, seed, step, row_offset, processors, shared_bytes, n_hard;
  int64_t count[synco::kKinds];
  int64_t extrapolate_from_negative, clocked;
  double strengths[6], temperature;  // alpha_max, beta_max, gamma_max, sigma, delta, eta
};

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "infonce_main: %s\n", what);
  std::exit(2);
}

// A device array, filled from a file; or, without one, left as cudaMalloc leaves it.
template <class T>
T* device_array(size_t n, std::FILE* file = nullptr) {
  T* p = nullptr;
  check(cudaMalloc(reinterpret_cast<void**>(&p), n * sizeof(T)) == cudaSuccess, "cudaMalloc");
  if (file) {
    std::vector<T> values(n);
    check(std::fread(values.data(), sizeof(T), n, file) == n, "the input is too short");
    check(cudaMemcpy(p, values.data(), n * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess, "cudaMemcpy");
  }
  return p;
}

template <class T>
void write(std::FILE* file, const T* device, size_t n) {
  std::vector<T> values(n);
  check(cudaMemcpy(values.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess, "cudaMemcpy");
  check(std::fwrite(values.data(), sizeof(T), n, file) == n, "cannot write the output");
}

unsigned char* element_array(int64_t type, size_t n, std::FILE* file) {
  return device_array<unsigned char>(n * (type == 0 ? 4 : 2), file);
}

void print(const char* name, uint64_t value) { std::printf(", \"%s\": %" PRIu64, name, value); }

}  // namespace

int main(int, char** arguments) {
  std::FILE* input = std::fopen(arguments[1], "rb");
  check(input, "cannot open the input");
  Header h;
  check(std::fread(&h, sizeof h, 1, input) == 1, "the input is too short");
  const size_t size = static_cast<size_t>(h.batch) * h.dim;

  synco::cuda::Arguments a{};
  a.batch = static_cast<int>(h.batch);
  a.queue_rows = static_cast<int>(h.queue_rows);
  a.q_type = static_cast<synco::cuda::Element>(h.q_type);
  a.k_type = static_cast<synco::cuda::Element>(h.k_type);
  a.hard.n_hard = static_cast<int>(h.n_hard);
  for (int kind = 0; kind < synco::kKinds; ++kind) a.hard.count[kind] = static_cast<int>(h.count[kind]);
  a.hard.alpha_max = static_cast<float>(h.strengths[0]);
  a.hard.beta_width = static_cast<float>(h.strengths[1] - 1.0);
  a.hard.gamma_max = static_cast<float>(h.strengths[2]);
  a.hard.sigma = static_cast<float>(h.strengths[3]);
  a.hard.delta = static_cast<float>(h.strengths[4]);
  a.hard.eta = static_cast<float>(h.strengths[5]);
  a.hard.extrapolate_from_negative = h.extrapolate_from_negative != 0;
  a.temperature = static_cast<float>(h.temperature);
  a.seed = static_cast<uint64_t>(h.seed);
  a.row_offset = static_cast<uint32_t>(h.row_offset);
  a.q = element_array(h.q_type, size, input);
  a.k = element_array(h.k_type, size, input);
  a.queue = reinterpret_cast<half*>(device_array<uint16_t>(static_cast<size_t>(h.queue_rows) * h.dim, input));
  std::fclose(input);
  int64_t* step = device_array<int64_t>(1);
  cudaMemcpy(step, &h.step, sizeof h.step, cudaMemcpyHostToDevice);
  a.step = step;
  a.loss = device_array<float>(1);
  a.gradient = device_array<float>(size);
  a.stats = device_array<float>(synco::cuda::kRowStats);
  a.rank = device_array<int64_t>(static_cast<size_t>(h.batch));
  a.rank_all = device_array<int64_t>(static_cast<size_t>(h.batch));

  const synco::cuda::Device device{static_cast<int>(h.processors), static_cast<int>(h.shared_bytes)};
  const synco::cuda::Plan plan =
      synco::cuda::make_plan(a.batch, a.queue_rows, static_cast<int>(h.dim), a.hard, device);
  check(plan.bytes <= synco::cuda::kWorkspaceLimit, "the workspace is larger than its limit");
  a.workspace = device_array<unsigned char>(plan.bytes);
  const size_t phases = h.clocked ? plan.blocks * static_cast<size_t>(synco::kPhases) : 0;
  if (phases) {
    a.phases = device_array<int64_t>(phases);
    cudaMemset(a.phases, 0, phases * sizeof(int64_t));
  }
  // As a launch before might have left it: similarities of 1.06, above all there are.
  const std::vector<unsigned char> used(plan.bytes, 0x3c);
  check(cudaMemcpy(a.workspace, used.data(), used.size(), cudaMemcpyHostToDevice) == cudaSuccess, "cudaMemcpy");
  check(synco::cuda::infonce(a, plan, static_cast<int>(h.dim), nullptr) == cudaSuccess, "the launch failed");
  check(cudaDeviceSynchronize() == cudaSuccess, "cudaDeviceSynchronize");

  std::FILE* output = std::fopen(arguments[2], "wb");
  check(output, "cannot open the output");
  write(output, a.loss, 1);
  write(output, a.gradient, size);
  write(output, a.stats, synco::cuda::kRowStats);
  write(output, a.rank, static_cast<size_t>(h.batch));
  write(output, a.rank_all, static_cast<size_t>(h.batch));
  if (phases) write(output, a.phases, phases);
  std::fclose(output);

  std::printf("{\"workspace\": %zu", plan.bytes);
  print("rows_per_pass", static_cast<uint64_t>(plan.rows_per_pass));
  print("splits", static_cast<uint64_t>(plan.splits));
  print("keep_row", plan.keep_row);
#ifdef SYNCO_HOST_SIMT
  const simt::Counters counters = simt::last_launch();
  print("mma", counters.mma);
  print("cp_async_bytes", counters.cp_async_bytes);
  print("global_load_bytes", counters.global_load_bytes);
  print("global_store_bytes", counters.global_store_bytes);
  print("blocks_with_mma", counters.blocks_with_mma);
  print("grid_barriers", counters.grid_barriers);
#endif
  std::puts("}");
  return 0;
}
