// Crop, antialiased bilinear resize, colour, blur, flip and normalisation of one view on one thread.
//
// The crop is read once, in place. Between resizing and output the view is three 8-bit planes, which stay in the second
// level cache from one pass to the next: the contrast needs the mean of a whole view, and so do not all passes fuse. No
// float image exists before the output.
#include "cpu.h"

#include <algorithm>

#include "synco/clones.h"

namespace synco::augment {

namespace {

constexpr int kRows = 4;    // resized along x together
constexpr int kPixel = 4;   // bytes: red, green, blue and one more, so that a pixel is a word
constexpr int kBlock = 64;  // bytes that fit the accumulators

struct Planes {
  uint8_t *r, *g, *b;
};

int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Footprints of output pixels [begin, begin + n): their first source pixels, and weights of as many taps as the widest has.
int prepare_weights(int input, int output, int begin, int n, std::vector<int>& starts, std::vector<int>& weights) {
  int taps = 0;
  for (int i = 0; i < n; ++i) taps = std::max(taps, footprint(begin + i, input, output).taps);
  starts.resize(n);
  weights.assign(static_cast<size_t>(n) * taps, 0);
  for (int i = 0; i < n; ++i) {
    const Footprint print = footprint(begin + i, input, output);
    // Further to the left where the taps of weight 0 behind the footprint would lie beyond the line.
    starts[i] = std::min(print.first, input - taps);
    int* const line = &weights[static_cast<size_t>(i) * taps + (print.first - starts[i])];
    for (int tap = 0; tap < print.taps; ++tap) line[tap] = resample_weight(print, tap);
  }
  return taps;
}

// kRows rows of the crop, interleaved pixel by pixel.
void interleave(const uint8_t* first, size_t pitch, int width, uint8_t* group) {
  for (int row = 0; row < kRows; ++row) {
    const uint8_t* source = first + row * pitch;
    uint8_t* target = group + row * kPixel;
    for (int x = 0; x < width - 1; ++x) memcpy(target + x * kRows * kPixel, source + 3 * x, kPixel);
    memcpy(target + (width - 1) * kRows * kPixel, source + 3 * (width - 1), 3);  // the fourth byte may not be there
  }
}

// group: kRows interleaved rows. rows: as many resized ones, each `stride` bytes.
SYNCO_CLONES void resize_rows(const uint8_t* group, const int* starts, const int* weights, int taps, int size,
                              uint8_t* rows, int stride) {
  constexpr int kLanes = kRows * kPixel;
  for (int x = 0; x < size; ++x) {
    int sums[kLanes] = {};
    const uint8_t* source = group + starts[x] * kLanes;
    for (int tap = 0; tap < taps; ++tap, source += kLanes) {
      const int weight = weights[x * taps + tap];
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += weight * source[lane];
    }
    uint8_t pixels[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) pixels[lane] = static_cast<uint8_t>(round_resampled(sums[lane]));
    for (int row = 0; row < kRows; ++row) memcpy(rows + row * stride + x * kPixel, pixels + row * kPixel, kPixel);
  }
}

// One row of the view from `taps` rows that were resized along x.
SYNCO_CLONES void resize_column(const uint8_t* rows, int stride, const int* weights, int taps, int size, Planes out) {
  constexpr int kPixels = kBlock / kPixel;
  for (int x = 0; x < size; x += kPixels) {
    int sums[kBlock] = {};
    const uint8_t* source = rows + x * kPixel;
    for (int tap = 0; tap < taps; ++tap, source += stride) {
      for (int i = 0; i < kBlock; ++i) sums[i] += weights[tap] * source[i];
    }
    uint8_t r[kPixels], g[kPixels], b[kPixels];
    for (int i = 0; i < kPixels; ++i) {
      r[i] = static_cast<uint8_t>(round_resampled(sums[kPixel * i]));
      g[i] = static_cast<uint8_t>(round_resampled(sums[kPixel * i + 1]));
      b[i] = static_cast<uint8_t>(round_resampled(sums[kPixel * i + 2]));
    }
    const int n = std::min(kPixels, size - x);
    memcpy(out.r + x, r, n);
    memcpy(out.g + x, g, n);
    memcpy(out.b + x, b, n);
  }
}

void crop_and_resize(const uint8_t* image, int width, const View& view, int size, Scratch& scratch, Planes out) {
  const int row_taps = prepare_weights(view.width, view.resized_width, view.window_left, size, scratch.column_starts,
                                       scratch.column_weights);
  const int taps = prepare_weights(view.height, view.resized_height, view.window_top, size, scratch.row_starts,
                                   scratch.row_weights);
  // The rows of the crop that the window needs, and as many more as fill the groups, if there are any.
  const int first = scratch.row_starts.front(), needed = scratch.row_starts.back() + taps - first;
  const size_t pitch = 3 * static_cast<size_t>(width);
  const uint8_t* const corner = image + (view.top + first) * pitch + 3 * static_cast<size_t>(view.left);
  const int stride = round_up(size * kPixel, kBlock);
  scratch.group.resize(static_cast<size_t>(view.width) * kRows * kPixel);
  scratch.rows.resize(static_cast<size_t>(needed) * stride);

  const bool few = needed < kRows;  // then a group is one row, again and again
  for (int y = 0; y < needed; y += few ? 1 : kRows) {
    const int start = few ? y : std::min(y, needed - kRows);
    interleave(corner + start * pitch, few ? 0 : pitch, view.width, scratch.group.data());
    resize_rows(scratch.group.data(), scratch.column_starts.data(), scratch.column_weights.data(), row_taps, size,
                &scratch.rows[static_cast<size_t>(start) * stride], few ? 0 : stride);
  }
  for (int y = 0; y < size; ++y) {
    const size_t row = static_cast<size_t>(y) * size;
    resize_column(&scratch.rows[static_cast<size_t>(scratch.row_starts[y] - first) * stride], stride,
                  &scratch.row_weights[static_cast<size_t>(y) * taps], taps, size,
                  {out.r + row, out.g + row, out.b + row});
  }
}

SYNCO_CLONES void blend_all(uint8_t* values, int n, int degenerate, float factor) {
  for (int i = 0; i < n; ++i) values[i] = static_cast<uint8_t>(blend(degenerate, values[i], factor));
}

SYNCO_CLONES uint64_t luma_sum(Planes view, int n) {
  uint64_t total = 0;
  for (int start = 0; start < n; start += 1 << 16) {
    uint32_t sum = 0;  // of at most 2^16 values below 2^8
    for (int i = start; i < std::min(n, start + (1 << 16)); ++i) sum += luma(view.r[i], view.g[i], view.b[i]);
    total += sum;
  }
  return total;
}

SYNCO_CLONES void saturate(Planes view, int n, float factor) {
  for (int i = 0; i < n; ++i) {
    const int r = view.r[i], g = view.g[i], b = view.b[i], grey = luma(r, g, b);
    view.r[i] = static_cast<uint8_t>(blend(grey, r, factor));
    view.g[i] = static_cast<uint8_t>(blend(grey, g, factor));
    view.b[i] = static_cast<uint8_t>(blend(grey, b, factor));
  }
}

SYNCO_CLONES void shift_hues(uint8_t* __restrict red, uint8_t* __restrict green, uint8_t* __restrict blue, int n,
                             int shift) {
  for (int i = 0; i < n; ++i) {
    int r = red[i], g = green[i], b = blue[i];
    shift_hue(r, g, b, shift);
    red[i] = static_cast<uint8_t>(r);
    green[i] = static_cast<uint8_t>(g);
    blue[i] = static_cast<uint8_t>(b);
  }
}

SYNCO_CLONES void lose_colour(Planes view, int n) {
  for (int i = 0; i < n; ++i) {
    view.r[i] = view.g[i] = view.b[i] = static_cast<uint8_t>(luma(view.r[i], view.g[i], view.b[i]));
  }
}

void change_colours(const View& view, Planes planes, int n) {
  for (const auto& step : view.steps) {
    switch (step.colour) {
      case kBrightness: blend_all(planes.r, 3 * n, 0, step.factor); break;
      case kContrast: blend_all(planes.r, 3 * n, mean_luma(luma_sum(planes, n), n), step.factor); break;
      case kSaturation: saturate(planes, n, step.factor); break;
      case kHue: shift_hues(planes.r, planes.g, planes.b, n, static_cast<int>(step.factor)); break;
      case kGrey: lose_colour(planes, n); break;
      default: break;
    }
  }
}

// One box filter over n values, whose neighbours are `step` apart and are there on both sides. With its radius known, sums
// stay in registers. They have 16 bits: the operator takes no radius beyond 127.
template <int known_radius>
SYNCO_INLINE void box_filter_inline(const uint8_t* in, uint8_t* out, int n, int step, int any_radius, uint32_t weight,
                                    uint32_t edge_weight) {
  const int radius = known_radius < 0 ? any_radius : known_radius;
  for (int start = 0; start < n; start += kBlock) {
    const uint8_t* const here = in + start;
    const uint8_t *const before = here - (radius + 1) * step, *const behind = here + (radius + 1) * step;
    uint16_t inside[kBlock], beyond[kBlock];
    for (int i = 0; i < kBlock; ++i) inside[i] = here[i];
    for (int k = 1; k <= radius; ++k) {
      for (int i = 0; i < kBlock; ++i) inside[i] += static_cast<uint16_t>(here[i - k * step] + here[i + k * step]);
    }
    for (int i = 0; i < kBlock; ++i) beyond[i] = static_cast<uint16_t>(before[i] + behind[i]);
    for (int i = 0; i < kBlock; ++i) {
      out[start + i] = static_cast<uint8_t>(box(inside[i], beyond[i], weight, edge_weight));
    }
  }
}

SYNCO_CLONES void box_filter(const uint8_t* in, uint8_t* out, int n, int step, int radius, uint32_t weight,
                             uint32_t edge_weight) {
  // A standard deviation of up to 2 pixels has radius 0 or 1.
  if (radius == 0) box_filter_inline<0>(in, out, n, step, radius, weight, edge_weight);
  else if (radius == 1) box_filter_inline<1>(in, out, n, step, radius, weight, edge_weight);
  else box_filter_inline<-1>(in, out, n, step, radius, weight, edge_weight);
}

// In place. A copy with a margin all around, in which the edge goes on, is filtered as one long line: rows through their
// margins, of which what comes out is overwritten.
void blur(uint8_t* plane, int size, const View& view, std::vector<uint8_t>& padded) {
  const int margin = view.blur_radius + 1, stride = size + 2 * margin;
  const size_t area = static_cast<size_t>(stride) * stride, slack = margin + kBlock;
  padded.resize(2 * (area + 2 * slack));
  uint8_t *in = padded.data() + slack, *out = in + area + 2 * slack;
  const auto row = [&](uint8_t* buffer, int y) { return buffer + static_cast<size_t>(y + margin) * stride; };

  for (int y = 0; y < size; ++y) memcpy(row(in, y) + margin, plane + static_cast<size_t>(y) * size, size);
  for (int pass = 0; pass < kBlurPasses; ++pass, std::swap(in, out)) {
    for (int y = 0; y < size; ++y) {
      uint8_t* const line = row(in, y);
      memset(line, line[margin], margin);
      memset(line + margin + size, line[margin + size - 1], margin);
    }
    box_filter(row(in, 0), row(out, 0), size * stride, 1, view.blur_radius, view.blur_weight, view.blur_edge_weight);
  }
  for (int pass = 0; pass < kBlurPasses; ++pass, std::swap(in, out)) {
    for (int y = 1; y <= margin; ++y) {
      memcpy(row(in, -y), row(in, 0), stride);
      memcpy(row(in, size - 1 + y), row(in, size - 1), stride);
    }
    box_filter(row(in, 0), row(out, 0), size * stride, stride, view.blur_radius, view.blur_weight,
               view.blur_edge_weight);
  }
  for (int y = 0; y < size; ++y) memcpy(plane + static_cast<size_t>(y) * size, row(in, y) + margin, size);
}

template <class T>
void write(Planes view, int size, bool flip, const T* values, T* out) {
  const int step = flip ? -1 : 1;
  for (int y = 0; y < size; ++y) {
    const size_t start = static_cast<size_t>(y) * size + (flip ? size - 1 : 0);
    const uint8_t *r = view.r + start, *g = view.g + start, *b = view.b + start;
    for (int x = 0; x < size; ++x, r += step, g += step, b += step, out += 3) {
      out[0] = values[*r];
      out[1] = values[256 + *g];
      out[2] = values[512 + *b];
    }
  }
}

}  // namespace

template <class T>
void make_view(const uint8_t* image, int width, const View& view, int size, const T* values, T* out, Scratch& scratch) {
  const int n = size * size;
  scratch.planes.resize(3 * static_cast<size_t>(n));
  const Planes planes{&scratch.planes[0], &scratch.planes[n], &scratch.planes[2 * static_cast<size_t>(n)]};
  crop_and_resize(image, width, view, size, scratch, planes);
  change_colours(view, planes, n);
  if (view.blur_radius >= 0) {
    for (uint8_t* plane : {planes.r, planes.g, planes.b}) blur(plane, size, view, scratch.padded);
  }
  write(planes, size, view.flip, values, out);
}

template void make_view(const uint8_t*, int, const View&, int, const float*, float*, Scratch&);
template void make_view(const uint8_t*, int, const View&, int, const uint16_t*, uint16_t*, Scratch&);

}  // namespace synco::augment
