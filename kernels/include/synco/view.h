// What a view is, and the arithmetic of making one, shared by kernels/augment's CPU and CUDA code.
//
// Every function gives the bits that Pillow gives, through which torchvision's transforms of PIL images go. So products and
// sums here must be rounded one by one: compile without contraction into FMAs. Resampling goes along rows first, as in
// Pillow up to 12; later ones begin with columns where that is cheaper, which moves some values by 1.
#pragma once

#include "synco/portable.h"

namespace synco {

enum Colour : int { kBrightness, kContrast, kSaturation, kHue, kGrey, kColours };

// One view. Python sends it as kViewNumbers floats in this order (synco_fast/data/numbers.py), which are whole numbers up to
// 2^24 but for the factors.
struct View {
  int top, left, height, width;        // the crop, in pixels of the image
  int resized_height, resized_width;   // what the crop is resized to
  int window_top, window_left;         // where in that the view is, which has a size of its own
  int flip;                            // 1: left and right change places
  int blur_radius;                     // whole part of the box's radius, -1: no blur
  int blur_weight;                     // of the 2 radius + 1 pixels inside the box, in 2^-24
  int blur_edge_weight;                // of the two pixels beyond them
  struct {
    int colour;    // a Colour, or -1: nothing
    float factor;  // hue: the shift in 1/256 of the circle, 0 to 255; grey: not used
  } steps[kColours];
};
constexpr int kViewNumbers = 12 + 2 * kColours;

inline View view_from_numbers(const float* numbers) {
  View view;
  int* const whole[] = {&view.top,         &view.left,          &view.height,     &view.width,
                        &view.resized_height, &view.resized_width, &view.window_top, &view.window_left,
                        &view.flip,        &view.blur_radius,   &view.blur_weight, &view.blur_edge_weight};
  for (int* value : whole) *value = static_cast<int>(*numbers++);
  for (auto& step : view.steps) {
    step.colour = static_cast<int>(*numbers++);
    step.factor = *numbers++;
  }
  return view;
}

// ---- Resampling: a triangle as wide as two output pixels, or two input pixels if those are larger.

constexpr int kResampleBits = 22;

// Source pixels [first, first + taps) that make up output pixel i, and what their weights are computed from.
struct Footprint {
  int first, taps;
  double centre, inverse_scale, total;
};

SYNCO_BOTH double triangle(const Footprint& footprint, int tap) {
  const double x = fabs((tap + footprint.first - footprint.centre + 0.5) * footprint.inverse_scale);
  return x < 1.0 ? 1.0 - x : 0.0;
}

SYNCO_BOTH Footprint footprint(int i, int input, int output) {
  const double scale = static_cast<double>(input) / output;
  const double support = scale < 1.0 ? 1.0 : scale;
  Footprint result;
  result.centre = (i + 0.5) * scale;
  result.inverse_scale = 1.0 / support;
  const int first = static_cast<int>(result.centre - support + 0.5);
  const int last = static_cast<int>(result.centre + support + 0.5);
  result.first = first < 0 ? 0 : first;
  result.taps = (last > input ? input : last) - result.first;
  result.total = 0.0;
  for (int tap = 0; tap < result.taps; ++tap) result.total += triangle(result, tap);
  return result;
}

// In 2^-kResampleBits.
SYNCO_BOTH int resample_weight(const Footprint& footprint, int tap) {
  return static_cast<int>(0.5 + triangle(footprint, tap) / footprint.total * (1 << kResampleBits));
}

// Weights add up to 1 but for their rounding, so that the result needs no clamp.
SYNCO_BOTH int round_resampled(int sum) { return (sum + (1 << (kResampleBits - 1))) >> kResampleBits; }

// ---- Colour. Values are 0 to 255.

SYNCO_BOTH int luma(int r, int g, int b) { return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; }

// From `degenerate` (factor 0) through `value` (factor 1) and beyond; the fraction is cut off.
SYNCO_BOTH int blend(int degenerate, int value, float factor) {
  const float x = degenerate + factor * (value - degenerate);
  return static_cast<int>(x < 0.f ? 0.f : x > 255.f ? 255.f : x);
}

// The mean of n lumas, rounded to the nearest, halves upwards.
SYNCO_BOTH int mean_luma(uint64_t sum, uint64_t n) { return static_cast<int>((2 * sum + n) / (2 * n)); }

SYNCO_BOTH int faded(int value, int saturation, int angle) {
  const int rise = angle - 255, fall = 1275 - angle, least = rise < fall ? rise : fall;
  const int share = least < 0 ? 0 : least > 255 ? 255 : least;
  return static_cast<int>(value * (1.f - saturation / 255.f * (share / 255.f)) + 0.5f);
}

// Turns the hue by shift / 256 of the circle, through HSV of 8 bits each. Without branches, so that compilers vectorise it.
SYNCO_BOTH void shift_hue(int& r, int& g, int& b, int shift) {
  const int larger = g > b ? g : b, value = r > larger ? r : larger;
  const int smaller = g < b ? g : b, range = value - (r < smaller ? r : smaller);
  // The largest is followed and preceded on the circle by the two others. Of no colour, all are the same.
  const int red = r == value, green = g == value;
  const int next = red ? g : green ? b : r, previous = red ? b : green ? r : g;
  // In sixths of the circle. One of the two is the smallest, and so a whole sixth away from the largest.
  float divisor = static_cast<float>(range + (range == 0));
  float from_next = (value - next) / divisor, from_previous = (value - previous) / divisor;
  float start = static_cast<float>((1 - red) * (4 - 2 * green));
  float sixths = from_next == 1.f ? start - 1.f + from_previous : start + 1.f - from_next;
  float turn = sixths / 6.f + (sixths < 0.f ? 1.f : 0.f);
  // The whole part of turn * 255, whose product a float would round: turn * 256 is exact, and so is what is after its point.
  const int whole = static_cast<int>(turn * 256.f);
  const int hue = (whole - (turn * 256.f - whole < turn ? 1 : 0) + shift) & 255;  // of no colour, it does not matter
  const int saturation = static_cast<int>(range / static_cast<float>(value + (value == 0)) * 255.f);

  // In 1/1530 of the circle from red: a channel is away from the value for the sixth before the third that is opposite to
  // it, that third, and the sixth behind it. Green is a third of the circle behind red, and blue behind green.
  const int from_red = hue * 6;
  r = faded(value, saturation, from_red);
  g = faded(value, saturation, from_red - 510 + (from_red < 510 ? 1530 : 0));
  b = faded(value, saturation, from_red - 1020 + (from_red < 1020 ? 1530 : 0));
}

// ---- Blur: three passes of this along rows, then three along columns. The line's ends go on beyond it.

// inside: sum of the 2 radius + 1 pixels of the box; beyond: sum of the two next to them.
SYNCO_BOTH int box(uint32_t inside, uint32_t beyond, uint32_t weight, uint32_t edge_weight) {
  return static_cast<int>((inside * weight + beyond * edge_weight + (1u << 23)) >> 24);
}

constexpr int kBlurPasses = 3;

}  // namespace synco
