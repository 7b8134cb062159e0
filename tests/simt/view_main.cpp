// Makes views on the emulated GPU: view_main INPUT OUTPUT reads a Header, the table of values, the numbers and then the
// images of all views, and writes the views one after the other.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "view.h"
#include "on_device.h"

namespace {

struct Header {
  int64_t views, size, half, processors;
};

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "view_main: %s\n", what);
  std::exit(2);
}

template <class T>
std::vector<T> read(std::FILE* file, size_t n) {
  std::vector<T> values(n);
  check(std::fread(values.data(), sizeof(T), n, file) == n, "the input is too short");
  return values;
}

// Each image and each view in an allocation of its own, so that going beyond its end is seen.
template <class T>
void make(const Header& header, std::FILE* input, std::FILE* output) {
  using namespace synco;
  const int n = static_cast<int>(header.views), size = static_cast<int>(header.size);
  const OnDevice<T> values(read<T>(input, 3 * 256));
  const auto numbers = read<float>(input, static_cast<size_t>(n) * kViewNumbers);
  const auto shapes = read<int64_t>(input, 2 * static_cast<size_t>(n));
  std::vector<std::unique_ptr<OnDevice<uint8_t>>> images;
  std::vector<std::unique_ptr<OnDevice<T>>> views;
  std::vector<augment::Item<T>> items;
  for (int i = 0; i < n; ++i) {
    const int64_t height = shapes[2 * i], width = shapes[2 * i + 1];
    images.emplace_back(new OnDevice<uint8_t>(read<uint8_t>(input, 3 * height * width)));
    views.emplace_back(new OnDevice<T>(3 * static_cast<size_t>(size) * size));
    items.push_back({view_from_numbers(&numbers[static_cast<size_t>(i) * kViewNumbers]), static_cast<int>(width),
                     *images.back(), *views.back()});
  }
  const auto plan = augment::plan_views(items.data(), n, size, static_cast<int>(header.processors));
  const OnDevice<uint32_t> workspace(plan.workspace_bytes() / sizeof(uint32_t));
  EXPECT_SUCCESS(augment::make_views<T>(OnDevice<augment::Item<T>>(items), values, workspace, plan, nullptr));
  for (const auto& view : views) {
    const auto pixels = view->values();
    check(std::fwrite(pixels.data(), sizeof(T), pixels.size(), output) == pixels.size(), "cannot write the output");
  }
}

}  // namespace

int main(int, char** arguments) {
  std::FILE *input = std::fopen(arguments[1], "rb"), *output = std::fopen(arguments[2], "wb");
  check(input && output, "cannot open the files");
  const Header header = read<Header>(input, 1)[0];
  header.half ? make<uint16_t>(header, input, output) : make<float>(header, input, output);
  return std::fclose(output) || failures ? 1 : 0;
}
