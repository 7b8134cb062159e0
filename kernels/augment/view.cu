// Crop, antialiased bilinear resize, colour, blur, flip and normalisation of a batch of views in one launch, a block to a
// view at a time.
//
//   footprints of columns and rows
//   --- barrier ---
//   resized pixels straight from the decoded image, and colour in registers up to the first contrast
//   --- barrier ---                        the mean luma of the view, for each contrast: colour up to the next one
//   three box filters along rows, three along columns, a barrier before each; without a blur, none
//
// What it fuses: all of it; the last pass flips, normalises and writes. What it never materialises: the crop, rows resized
// one way only, float pixels. In a block's share of the workspace: the view as 8-bit pixels, twice, and the footprints.
// Bits are the CPU's: whole numbers, and float and double products and sums that are rounded one by one (--fmad=false).

#include "view.h"

#include <algorithm>

#include "gpu.h"

namespace synco::augment {

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kValues = 3 * 256;
constexpr size_t kWorkspaceLimit = size_t{1} << 30;  // bytes, unless a single block needs more; reached at some 1000 pixels

struct Pixel {
  int r, g, b;
};

// Footprints along one axis, in the workspace: first source pixel and number of taps of each output pixel, and weights,
// the first of all pixels before the second of all.
struct Axis {
  int *first, *taps, *weights;
};

// A block's share. load_global may read it, as nobody but this block writes it, with a barrier in between.
struct Workspace {
  uint32_t *pixels, *others;  // (size, size): red, green, blue, 0, so that neighbouring lanes access neighbouring words
  Axis columns, rows;
};

template <class T>
struct Shared {
  T* values;
  Item<T>* item;
  uint32_t* warp_sums;

  __device__ __forceinline__ explicit Shared(SharedArena& arena)
      : values(arena.take<T>(kValues)), item(arena.take<Item<T>>(1)), warp_sums(arena.take<uint32_t>(kWarps)) {}
  static constexpr unsigned bytes() {
    return shared_end<uint32_t>(shared_end<Item<T>>(shared_end<T>(0, kValues), 1), kWarps);
  }
};

__device__ __forceinline__ uint32_t pack(Pixel p) {
  return static_cast<uint32_t>(p.r) | static_cast<uint32_t>(p.g) << 8 | static_cast<uint32_t>(p.b) << 16;
}

__device__ __forceinline__ Pixel unpack(uint32_t word) {
  return {static_cast<int>(word & 255), static_cast<int>(word >> 8 & 255), static_cast<int>(word >> 16)};
}

template <class F>
__device__ __forceinline__ void for_each_pixel(int size, const F& f) {
  for (int i = static_cast<int>(threadIdx.x); i < size * size; i += kThreads) f(i, i % size, i / size);
}

__device__ __forceinline__ Workspace share_of(uint32_t* workspace, const Plan& plan) {
  uint32_t* const begin = workspace + blockIdx.x * plan.words;
  const int area = plan.size * plan.size, weights = plan.taps * plan.size;
  int* const columns = reinterpret_cast<int*>(begin + 2 * static_cast<size_t>(area));
  int* const rows = columns + 2 * plan.size + weights;
  return {begin, begin + area, {columns, columns + plan.size, columns + 2 * plan.size},
          {rows, rows + plan.size, rows + 2 * plan.size}};
}

// ---- Crop and resize

__device__ void prepare_footprints(const View& view, int size, const Workspace& workspace) {
  for (int i = static_cast<int>(threadIdx.x); i < 2 * size; i += kThreads) {
    const bool column = i < size;
    const Axis axis = column ? workspace.columns : workspace.rows;
    const int to = column ? i : i - size;
    const Footprint print = footprint((column ? view.window_left : view.window_top) + to, column ? view.width : view.height,
                                      column ? view.resized_width : view.resized_height);
    store_global(axis.first + to, print.first);
    store_global(axis.taps + to, print.taps);
    for (int tap = 0; tap < print.taps; ++tap) {
      store_global(axis.weights + tap * size + to, resample_weight(print, tap));
    }
  }
}

// What lies in a footprint is resized along its rows, and each row's result rounded, before it is along the column.
template <class T>
__device__ __forceinline__ Pixel resample(const Item<T>& item, const Workspace& workspace, int size, int x, int y) {
  const Axis &columns = workspace.columns, &rows = workspace.rows;
  const int n_columns = load_global(columns.taps + x), n_rows = load_global(rows.taps + y);
  const size_t top = item.view.top + load_global(rows.first + y), left = item.view.left + load_global(columns.first + x);
  const uint8_t* line = item.image + 3 * (top * item.width + left);
  Pixel sum{0, 0, 0};
  for (int row = 0; row < n_rows; ++row, line += 3 * static_cast<size_t>(item.width)) {
    Pixel resized{0, 0, 0};
    for (int column = 0; column < n_columns; ++column) {
      const int weight = load_global(columns.weights + column * size + x);
      resized.r += weight * load_global(line + 3 * column);
      resized.g += weight * load_global(line + 3 * column + 1);
      resized.b += weight * load_global(line + 3 * column + 2);
    }
    const int weight = load_global(rows.weights + row * size + y);
    sum.r += weight * round_resampled(resized.r);
    sum.g += weight * round_resampled(resized.g);
    sum.b += weight * round_resampled(resized.b);
  }
  return {round_resampled(sum.r), round_resampled(sum.g), round_resampled(sum.b)};
}

// ---- Colour

__device__ __forceinline__ int contrast_from(const View& view, int step) {
  while (step < kColours && view.steps[step].colour != kContrast) ++step;
  return step;
}

// mean: what contrast fades to.
__device__ __forceinline__ Pixel change_colour(int colour, float factor, int mean, Pixel p) {
  if (colour == kHue) {
    shift_hue(p.r, p.g, p.b, static_cast<int>(factor));
  } else if (colour >= 0) {
    const int grey = luma(p.r, p.g, p.b);
    if (colour == kGrey) return {grey, grey, grey};
    const int degenerate = colour == kBrightness ? 0 : colour == kContrast ? mean : grey;
    p = {blend(degenerate, p.r, factor), blend(degenerate, p.g, factor), blend(degenerate, p.b, factor)};
  }
  return p;
}

// The sum over the block, for all of it: of lumas of at most 4096 x 4096 pixels, which 32 bits hold.
__device__ __forceinline__ uint32_t block_sum(uint32_t value, uint32_t* warp_sums) {
  const uint32_t of_warp = __reduce_add_sync(kAllLanes, value);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = of_warp;
  __syncthreads();
  const uint32_t sum = __reduce_add_sync(kAllLanes, warp_sums[threadIdx.x % 32]);
  __syncthreads();  // before the next sum is written there
  return sum;
}
static_assert(kWarps == 32, "a lane for each warp's sum");

// ---- Blur

// Of the pixels of a line, `step` apart from `start` on.
__device__ __forceinline__ Pixel box_filter(const uint32_t* pixels, int start, int step, int size, int at,
                                            const View& view) {
  const auto neighbour = [&](int k) { return unpack(load_global(pixels + start + min(max(at + k, 0), size - 1) * step)); };
  const int radius = view.blur_radius;
  Pixel inside{0, 0, 0};
  for (int k = -radius; k <= radius; ++k) {
    const Pixel p = neighbour(k);
    inside = {inside.r + p.r, inside.g + p.g, inside.b + p.b};
  }
  const Pixel before = neighbour(-radius - 1), behind = neighbour(radius + 1);
  const auto filtered = [&](int sum, int beyond) { return box(sum, beyond, view.blur_weight, view.blur_edge_weight); };
  return {filtered(inside.r, before.r + behind.r), filtered(inside.g, before.g + behind.g),
          filtered(inside.b, before.b + behind.b)};
}

// ---- One view

template <class T>
__device__ __forceinline__ void write(const Shared<T>& shared, int size, int x, int y, Pixel p) {
  const int column = shared.item->view.flip ? size - 1 - x : x;
  T* const out = shared.item->out + 3 * (static_cast<size_t>(y) * size + column);
  store_global(out, shared.values[p.r]);
  store_global(out + 1, shared.values[256 + p.g]);
  store_global(out + 2, shared.values[512 + p.b]);
}

template <class T>
__device__ __forceinline__ void resize_and_colour(const Shared<T>& shared, const Workspace& workspace, int size) {
  const Item<T>& item = *shared.item;
  const bool blurred = item.view.blur_radius >= 0;
  bool resized = false;
  int begin = 0, end = contrast_from(item.view, 0), mean = 0;
  while (true) {
    const bool last = end == kColours;
    uint32_t sum = 0;
    for_each_pixel(size, [&](int i, int x, int y) {
      Pixel p = resized ? unpack(load_global(workspace.pixels + i)) : resample(item, workspace, size, x, y);
      for (int step = begin; step < end; ++step) {
        p = change_colour(item.view.steps[step].colour, item.view.steps[step].factor, mean, p);
      }
      sum += luma(p.r, p.g, p.b);
      if (last && !blurred) write(shared, size, x, y, p);
      else store_global(workspace.pixels + i, pack(p));
    });
    if (last) break;
    mean = mean_luma(block_sum(sum, shared.warp_sums), static_cast<uint64_t>(size) * size);
    resized = true;
    begin = end;
    end = contrast_from(item.view, begin + 1);
  }
}

template <class T>
__device__ __forceinline__ void blur(const Shared<T>& shared, const Workspace& workspace, int size) {
  const View& view = shared.item->view;
  uint32_t *from = workspace.pixels, *to = workspace.others;
  for (int pass = 0; pass < 2 * kBlurPasses; ++pass) {
    __syncthreads();  // what is read now has been written, and what is written now has been read
    for_each_pixel(size, [&](int i, int x, int y) {
      const Pixel p = pass < kBlurPasses ? box_filter(from, y * size, 1, size, x, view)
                                         : box_filter(from, x, size, size, y, view);
      if (pass == 2 * kBlurPasses - 1) write(shared, size, x, y, p);
      else store_global(to + i, pack(p));
    });
    uint32_t* const read = from;
    from = to;
    to = read;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    view_kernel(const Item<T>* items, const T* values, uint32_t* workspace, const Plan plan) {
  SharedArena arena;
  const Shared<T> shared(arena);
  const Workspace share = share_of(workspace, plan);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kValues; i += kThreads) shared.values[i] = load_global(values + i);
  for (int i = static_cast<int>(blockIdx.x); i < plan.views; i += static_cast<int>(gridDim.x)) {
    if (thread < static_cast<int>(sizeof(Item<T>) / sizeof(uint32_t))) {
      const uint32_t word = load_global(reinterpret_cast<const uint32_t*>(items + i) + thread);
      memcpy(reinterpret_cast<uint32_t*>(shared.item) + thread, &word, sizeof word);
    }
    __syncthreads();
    prepare_footprints(shared.item->view, plan.size, share);
    __syncthreads();
    resize_and_colour(shared, share, plan.size);
    if (shared.item->view.blur_radius >= 0) blur(shared, share, plan.size);
    __syncthreads();  // before the next view takes its place
  }
}

// Not less than any footprint has: one more than by its formula, of which roundings may take it a little beyond.
int most_taps(int input, int output) {
  return static_cast<int>(2 * std::max(1.0, static_cast<double>(input) / output)) + 2;
}

}  // namespace

template <class T>
Plan plan_views(const Item<T>* items, int n, int size, int processors) {
  Plan plan{n, size, 0, 0, 0};
  for (int i = 0; i < n; ++i) {
    const View& view = items[i].view;
    plan.taps = std::max({plan.taps, most_taps(view.width, view.resized_width),
                          most_taps(view.height, view.resized_height)});
  }
  plan.words = 2 * static_cast<size_t>(size) * (size + 2 + plan.taps);
  const size_t fit = std::max<size_t>(1, kWorkspaceLimit / (plan.words * sizeof(uint32_t)));
  plan.blocks = static_cast<unsigned>(std::min<size_t>(fit, std::min(n, processors)));
  return plan;
}

template <class T>
cudaError_t make_views(const Item<T>* items, const T* values, uint32_t* workspace, const Plan& plan, cudaStream_t stream) {
  if (!plan.views) return cudaSuccess;
  return SYNCO_LAUNCH((view_kernel<T>), plan.blocks, kThreads, Shared<T>::bytes(), stream, items, values, workspace,
                      plan);
}

#define SYNCO_INSTANTIATE(T)                                  \
  template Plan plan_views(const Item<T>*, int, int, int);    \
  template cudaError_t make_views(const Item<T>*, const T*, uint32_t*, const Plan&, cudaStream_t);
SYNCO_INSTANTIATE(float)
SYNCO_INSTANTIATE(uint16_t)
#undef SYNCO_INSTANTIATE

}  // namespace synco::augment
