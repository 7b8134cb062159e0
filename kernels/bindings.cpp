// The compiled backends as one op for each kind of device. Shapes, dtypes and values were checked in Python
// (synco_fast/ops): this op is not for calling directly.

#include <torch/library.h>

#include "cpu/infonce.h"

namespace {

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

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> infonce_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& queue, const at::Tensor& step, at::IntArrayRef counts,
    at::ArrayRef<double> strengths, bool extrapolate_from_negative, double temperature, int64_t seed,
    int64_t row_offset) {
  return synco::cpu::infonce(q, k, queue, hard_negatives(counts, strengths, extrapolate_from_negative), temperature,
                             static_cast<uint64_t>(seed), static_cast<uint32_t>(step.item<int64_t>()),
                             static_cast<uint32_t>(row_offset));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(synco_fast, library) {
  library.def(
      "infonce_compiled(Tensor q, Tensor k, Tensor queue, Tensor step, int[] counts, float[] strengths, "
      "bool extrapolate_from_negative, float temperature, int seed, int row_offset) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(synco_fast, CPU, library) { library.impl("infonce_compiled", &infonce_cpu); }
