// A thread's time by phase.
#pragma once

#include <chrono>
#include <cstdint>

#include "synco/clones.h"
#include "synco/phases.h"

namespace synco::cpu {

class alignas(64) Clock {  // a cache line is one thread's
 public:
  explicit Clock(bool on) : last_(on ? now() : kOff) {}

  // What has passed since the last lap was this phase. Not worth its 25 ns for less than a row of a tile.
  SYNCO_INLINE void lap(Phase phase) {
    if (last_ != kOff) add(phase);
  }

  int64_t nanoseconds(int phase) const { return sum_[phase]; }

 private:
  static constexpr int64_t kOff = -1;

  static int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

  __attribute__((noinline)) void add(Phase phase) {
    const int64_t time = now();
    sum_[phase] += time - last_;
    last_ = time;
  }

  int64_t last_, sum_[kPhases] = {};
};

}  // namespace synco::cpu
