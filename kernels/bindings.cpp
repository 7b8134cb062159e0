// The compiled backends as one op for each kind of device. Shapes, dtypes and values were checked in Python
// (synco_fast/ops): this op is not for calling directly.

#include <torch/library.h>

#include <mutex>
#include <optional>

#include "cpu/infonce.h"
#include "synco/phases.h"

#ifdef SYNCO_WITH_CUDA
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/infonce.h"
#endif

namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

synco::HardNegatives hard_negatives(at::IntArrayRef counts, at::ArrayRef<double> strengths,
                                    bool extrapolate_from_negative) {
  TORCH_CHECK(counts.size() == 1 + synco::kKinds && strengths.size() == 6, "infonce_compiled: ", counts.size(),
              " counts and ", strengths.size(), " strengths, expected 7 and 6");
  synco::HardNegatives hard{};
  hard.n_hard = static_cast<int>(counts[0]);
  for (int kind = 0; kind < synco::kKinds; ++kind) hard.count[kind] = static_cast<int>(counts[1 + kind]);
  hard.alpha_max = static_cast<float>(strengths[0]);
  hard.beta_width = static_cast<float>(strengths[1] - 1.0);
  hard.gamma_max = static_cast<float>(strengths[2]);
  hard.sigma = static_cast<float>(strengths[3]);
  hard.delta = static_cast<float>(strengths[4]);
  hard.eta = static_cast<float>(strengths[5]);
  hard.extrapolate_from_negative = extrapolate_from_negative;
  return hard;
}

// What synco_fast/ops/phases.py has calls add their phases to, (slots, kPhases) int64; undefined: nothing is measured.
std::mutex recording;
at::Tensor recorded;

void record_phases(const std::optional<at::Tensor>& ticks) {
  TORCH_CHECK(!ticks || ticks->size(1) == synco::kPhases, "record_phases: expected ", synco::kPhases, " phases");
  const std::lock_guard<std::mutex> lock(recording);
  recorded = ticks.value_or(at::Tensor());
}

// Undefined where nothing is measured on that device. A slot is a block's, or all threads' of a CPU.
at::Tensor phases_of_call(at::Device device, int64_t slots) {
  const std::lock_guard<std::mutex> lock(recording);
  if (!recorded.defined() || recorded.device() != device) return {};
  TORCH_CHECK(recorded.size(0) == slots, "record_phases: expected ", slots, " slots");
  return recorded;
}

int64_t* pointer(const at::Tensor& phases) { return phases.defined() ? phases.mutable_data_ptr<int64_t>() : nullptr; }

Result infonce_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& queue, const at::Tensor& step,
                   at::IntArrayRef counts, at::ArrayRef<double> strengths, bool extrapolate_from_negative,
                   double temperature, int64_t seed, int64_t row_offset) {
  const at::Tensor phases = phases_of_call(q.device(), 1);
  return synco::cpu::infonce(q, k, queue, hard_negatives(counts, strengths, extrapolate_from_negative), temperature,
                             static_cast<uint64_t>(seed), static_cast<uint32_t>(step.item<int64_t>()),
                             static_cast<uint32_t>(row_offset), pointer(phases));
}

#ifdef SYNCO_WITH_CUDA
// Rows of elements the kernel can load, each aligned to the 16 bytes of its widest access.
at::Tensor aligned_rows(const at::Tensor& tensor) {
  const at::Tensor rows = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : rows.clone();
}

synco::cuda::Element element(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kHalf) return synco::cuda::Element::kHalf;
  return tensor.scalar_type() == at::kBFloat16 ? synco::cuda::Element::kBFloat16 : synco::cuda::Element::kFloat;
}

// float64 is not worth a path of its own: it becomes float32.
at::Tensor element_rows(const at::Tensor& tensor) {
  return aligned_rows(tensor.scalar_type() == at::kDouble ? tensor.to(at::kFloat) : tensor);
}

synco::cuda::Device current_device() {
  int device = 0;
  synco::cuda::Device found{};
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return found;
}

// The number of statistics that synco_fast.ops.result.stat_names has.
int64_t stat_count(const synco::HardNegatives& hard) {
  int64_t kinds = 0;
  for (int kind = 0; kind < synco::kKinds; ++kind) kinds += hard.count[kind] > 0;
  return kinds ? 5 + kinds + 2 : 5;
}

Result infonce_cuda(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& queue_, const at::Tensor& step,
                    at::IntArrayRef counts, at::ArrayRef<double> strengths, bool extrapolate_from_negative,
                    double temperature, int64_t seed, int64_t row_offset) {
  const c10::cuda::CUDAGuard guard(q_.device());
  const at::Tensor q = element_rows(q_), k = element_rows(k_), queue = aligned_rows(queue_);
  const int dim = static_cast<int>(q.size(1));
  const auto floats = q.options().dtype(at::kFloat), integers = q.options().dtype(at::kLong);

  synco::cuda::Arguments a{};
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.q_type = element(q);
  a.k_type = element(k);
  a.queue = static_cast<const half*>(queue.const_data_ptr());
  a.step = step.const_data_ptr<int64_t>();
  a.batch = static_cast<int>(q.size(0));
  a.queue_rows = static_cast<int>(queue.size(0));
  a.hard = hard_negatives(counts, strengths, extrapolate_from_negative);
  if (a.hard.total() == 0) a.hard.n_hard = 0;
  a.temperature = static_cast<float>(temperature);
  a.seed = static_cast<uint64_t>(seed);
  a.row_offset = static_cast<uint32_t>(row_offset);

  const synco::cuda::Plan plan = synco::cuda::make_plan(a.batch, a.queue_rows, dim, a.hard, current_device());
  const at::Tensor workspace = at::empty({static_cast<int64_t>(plan.bytes)}, q.options().dtype(at::kByte));
  const at::Tensor loss = at::empty({}, floats), gradient = at::empty(q.sizes(), floats);
  const at::Tensor rank = at::empty({q.size(0)}, integers), rank_all = at::empty({q.size(0)}, integers);
  const at::Tensor stats = at::empty({stat_count(a.hard)}, floats);
  a.workspace = workspace.mutable_data_ptr<uint8_t>();
  a.loss = loss.mutable_data_ptr<float>();
  a.gradient = gradient.mutable_data_ptr<float>();
  a.rank = rank.mutable_data_ptr<int64_t>();
  a.rank_all = rank_all.mutable_data_ptr<int64_t>();
  a.stats = stats.mutable_data_ptr<float>();
  const at::Tensor phases = phases_of_call(q.device(), plan.blocks);
  const bool captured = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  TORCH_CHECK(!phases.defined() || !captured, "infonce: phases cannot be recorded of a CUDA graph, whose replays would "
              "add to them for ever: capture it outside of record()");
  a.phases = pointer(phases);
  C10_CUDA_CHECK(synco::cuda::infonce(a, plan, dim, c10::cuda::getCurrentCUDAStream()));
  return {loss, gradient, rank, rank_all, stats};
}
#endif

bool compiled_with_cuda() {
#ifdef SYNCO_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(synco_fast, library) {
  library.def(
      "infonce_compiled(Tensor q, Tensor k, Tensor queue, Tensor step, int[] counts, float[] strengths, "
      "bool extrapolate_from_negative, float temperature, int seed, int row_offset) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("compiled_with_cuda() -> bool", &compiled_with_cuda);
  library.def("record_phases(Tensor? ticks) -> ()", &record_phases);
}

TORCH_LIBRARY_IMPL(synco_fast, CPU, library) { library.impl("infonce_compiled", &infonce_cpu); }

#ifdef SYNCO_WITH_CUDA
TORCH_LIBRARY_IMPL(synco_fast, CUDA, library) { library.impl("infonce_compiled", &infonce_cuda); }
#endif
