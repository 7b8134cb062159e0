// The DALI operator `synco_view`: from decoded images and the numbers of their views to what the encoder takes. One pass over
// each sample on the pipeline's threads, in place of a chain of DALI's operators; no image between the steps leaves a thread.
#include <memory>
#include <string>
#include <vector>

#include "cpu.h"
#include "dali/pipeline/operator/arg_helper.h"
#include "dali/pipeline/operator/checkpointing/stateless_operator.h"

namespace synco::augment {

namespace {

// For synco_fast/data/operator.py, which looks for it before the library is loaded.
__attribute__((used)) const char built_for[] = "built for DALI " SYNCO_DALI_VERSION;

class ViewOperator : public dali::StatelessOperator<dali::CPUBackend> {
 public:
  explicit ViewOperator(const dali::OpSpec& spec)
      : StatelessOperator(spec),
        size_(spec.GetArgument<int>("size")),
        dtype_(spec.GetArgument<dali::DALIDataType>("dtype")),
        numbers_("numbers", spec),
        scratch_(num_threads_) {
    const auto values = spec.GetRepeatedArgument<float>("values");
    DALI_ENFORCE(size_ > 0 && size_ <= 4096, "size: expected 1 to 4096 pixels");
    DALI_ENFORCE(dtype_ == DALI_FLOAT || dtype_ == DALI_FLOAT16, "dtype: expected FLOAT or FLOAT16");
    DALI_ENFORCE(values.size() == 3 * 256, "values: expected 256 for each of 3 channels");
    values_ = values;
    for (const float value : values) {
      const dali::float16 half(value);
      uint16_t bits;
      static_assert(sizeof half == sizeof bits);
      memcpy(&bits, &half, sizeof bits);
      half_values_.push_back(bits);
    }
  }

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& outputs, const dali::Workspace& workspace) override {
    const auto& images = workspace.Input<dali::CPUBackend>(0);
    const int n = images.num_samples();
    numbers_.Acquire(spec_, workspace, n, dali::TensorShape<1>{kViewNumbers});
    DALI_ENFORCE(images.type() == DALI_UINT8, "images: expected 8-bit pixels");
    views_.clear();
    for (int i = 0; i < n; ++i) views_.push_back(checked(numbers_[i].data, images.tensor_shape(i), size_, i));
    outputs = {{dali::uniform_list_shape(n, dali::TensorShape<3>{size_, size_, 3}), dtype_}};
    return true;
  }

  void RunImpl(dali::Workspace& workspace) override {
    const auto& images = workspace.Input<dali::CPUBackend>(0);
    auto& output = workspace.Output<dali::CPUBackend>(0);
    output.SetLayout("HWC");
    auto& pool = workspace.GetThreadPool();
    for (int i = 0; i < images.num_samples(); ++i) {
      const auto work = [&, i](int thread) {
        const auto* image = images.tensor<uint8_t>(i);
        const int width = static_cast<int>(images.tensor_shape_span(i)[1]);
        auto& scratch = scratch_[thread];
        if (dtype_ == DALI_FLOAT) {
          make_view(image, width, views_[i], size_, values_.data(), output.mutable_tensor<float>(i), scratch);
        } else {
          auto* out = static_cast<uint16_t*>(output.raw_mutable_tensor(i));
          make_view(image, width, views_[i], size_, half_values_.data(), out, scratch);
        }
      };
      pool.AddWork(work, static_cast<int64_t>(views_[i].height) * views_[i].width);  // large ones first
    }
    pool.RunAll();
  }

 private:
  static View checked(const float* numbers, const dali::TensorShape<>& shape, int size, int i) {
    DALI_ENFORCE(shape.sample_dim() == 3 && shape[2] == 3, "images: expected (height, width, 3)");
    const View view = view_from_numbers(numbers);
    DALI_ENFORCE(view.height > 0 && view.width > 0 && view.top >= 0 && view.left >= 0 &&
                     view.top + view.height <= shape[0] && view.left + view.width <= shape[1],
                 dali::make_string("numbers of sample ", i, ": the crop is not inside its image"));
    DALI_ENFORCE(view.window_top >= 0 && view.window_left >= 0 && view.window_top + size <= view.resized_height &&
                     view.window_left + size <= view.resized_width,
                 dali::make_string("numbers of sample ", i, ": the window is not inside the resized crop"));
    for (const auto& step : view.steps) {
      DALI_ENFORCE(step.colour < kColours, dali::make_string("numbers of sample ", i, ": no such colour operation"));
    }
    DALI_ENFORCE(view.blur_radius < 4096, dali::make_string("numbers of sample ", i, ": the blur is too wide"));
    return view;
  }

  int size_;
  dali::DALIDataType dtype_;
  dali::ArgValue<float, 1> numbers_;
  std::vector<float> values_;
  std::vector<uint16_t> half_values_;
  std::vector<View> views_;
  std::vector<Scratch> scratch_;
};

}  // namespace

}  // namespace synco::augment

DALI_REGISTER_OPERATOR(SyncoView, ::synco::augment::ViewOperator, ::dali::CPU);

DALI_SCHEMA(SyncoView)
    .DocStr("Augmented and normalised views of decoded RGB images, as torchvision makes them of PIL images.")
    .NumInput(1)
    .NumOutput(1)
    .InputLayout(0, "HWC")
    .AddArg("size", "Height and width of a view, pixels.", DALI_INT32)
    .AddArg("numbers", "What is done to each image: kernels/include/synco/view.h.", DALI_FLOAT_VEC, true)
    .AddArg("values", "What pixel value v of channel c becomes, at 256 c + v.", DALI_FLOAT_VEC)
    .AddArg("dtype", "FLOAT or FLOAT16.", DALI_DATA_TYPE);
