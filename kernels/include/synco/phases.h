// What the time inside a call is divided into: the C++ side of synco_fast/ops/phases.py, in its order.
#pragma once

#include "synco/negatives.h"

namespace synco {

enum Phase : int {
  kSimilarity,  // S = q Q^T, with rounding, loading, widening and packing of its operands
  kWeights,     // w = exp(S / t), its sum, rank
  kGradient,    // O += w Q
  kSelection,   // candidates in the matrix phase, exact top N in the row phase
  kDraws,
  kParents,     // cpu: drawn rows brought, and added to the gradient; cuda does this within the kinds
  kSyntheses,   // each kind by itself, in the order of Kind
  kFinish = kSyntheses + kKinds,  // splits added up, loss, gradient, ranks, statistics
  kWaiting,     // cpu: a thread without a task; cuda: a block in a barrier of the grid
  kPhases
};

SYNCO_BOTH Phase phase_of(int kind) { return static_cast<Phase>(kSyntheses + kind); }

}  // namespace synco
