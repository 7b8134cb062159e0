// The `cpu` backend of synco_fast::infonce.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "synco/negatives.h"

namespace synco::cpu {

// q, k: (B, D), any float. queue: (K, D) float32, float16 or bfloat16. temperature >= 0.02.
// Returns loss (), gradient with respect to q (B, D), rank (B), rank_all (B), statistics in the order of
// synco_fast.ops.result.stat_names. phases: null, or (kPhases) nanoseconds, to which this call's are added.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> infonce(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& queue, const HardNegatives& hard, double temperature,
    uint64_t seed, uint32_t step, uint32_t row_offset, int64_t* phases);

}  // namespace synco::cpu
