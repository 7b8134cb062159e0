// Views on a GPU: what the host passes to the kernel, and how the work is laid out.
#pragma once

#ifdef SYNCO_HOST_SIMT
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "synco/view.h"

namespace synco::augment {

// T is float, or uint16_t for the bits of a half.
template <class T>
struct Item {
  View view;             // inside its image
  int width;             // of the image, pixels
  const uint8_t* image;  // (height, width, 3)
  T* out;                // (size, size, 3)
};

struct Plan {
  int views, size;       // size: height and width of each, pixels
  int taps;              // that a footprint may have
  unsigned blocks;
  size_t words;          // of a block's share of the workspace, 4 bytes each
  size_t workspace_bytes() const { return blocks * words * sizeof(uint32_t); }
};

// items: on the host. processors: multiprocessors of the device.
template <class T>
Plan plan_views(const Item<T>* items, int n, int size, int processors);

// One launch. Returns its error, if any. All are on the device; values: (3, 256), what each pixel value of each channel
// becomes; workspace: Plan::workspace_bytes, aligned to 4.
template <class T>
cudaError_t make_views(const Item<T>* items, const T* values, uint32_t* workspace, const Plan& plan, cudaStream_t stream);

}  // namespace synco::augment
