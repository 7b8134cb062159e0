// A view on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "synco/view.h"

namespace synco::augment {

// Memory that one thread uses again for the next view.
struct Scratch {
  std::vector<int> column_starts, column_weights, row_starts, row_weights;
  std::vector<uint8_t> group, rows, planes, padded;
};

// image: (height, width, 3), and `view` crops a part inside it. values: (3, 256), what each pixel value of each channel
// becomes: T is float, or uint16_t for the bits of a half. out: (size, size, 3).
template <class T>
void make_view(const uint8_t* image, int width, const View& view, int size, const T* values, T* out, Scratch& scratch);

}  // namespace synco::augment
