// The DALI operator `synco_view`: from decoded images and the numbers of their views to what the encoder takes. One pass
// over each sample, in place of a chain of DALI's operators: on the pipeline's threads, where no image between the steps
// leaves a thread, or on the GPU in one launch for the batch, where none leaves a block's share of the workspace.
#include <memory>
#include <string>
#include <vector>

#include "cpu.h"
#include "dali/pipeline/operator/arg_helper.h"
#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#ifdef SYNCO_WITH_CUDA
#include "dali/kernels/dynamic_scratchpad.h"
#include "view.h"
#endif

namespace synco::augment {

namespace {

// For synco_fast/data/operator.py, which looks for it before the library is loaded.
__attribute__((used)) const char built_for[] = "built for DALI " SYNCO_DALI_VERSION;

View checked(const float* numbers, const dali::TensorShape<>& shape, int size, int i) {
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
  DALI_ENFORCE(view.blur_radius < 128, dali::make_string("numbers of sample ", i, ": the blur is too wide"));
  return view;
}

// Arguments and their checks, which are the same on both.
template <class Backend>
class ViewOperator : public dali::StatelessOperator<Backend> {
 public:
  explicit ViewOperator(const dali::OpSpec& spec)
      : dali::StatelessOperator<Backend>(spec),
        size_(spec.GetArgument<int>("size")),
        dtype_(spec.GetArgument<dali::DALIDataType>("dtype")),
        values_(spec.GetRepeatedArgument<float>("values")),
        numbers_("numbers", spec) {
    DALI_ENFORCE(size_ > 0 && size_ <= 4096, "size: expected 1 to 4096 pixels");
    DALI_ENFORCE(dtype_ == DALI_FLOAT || dtype_ == DALI_FLOAT16, "dtype: expected FLOAT or FLOAT16");
    DALI_ENFORCE(values_.size() == 3 * 256, "values: expected 256 for each of 3 channels");
    for (const float value : values_) {
      const dali::float16 half(value);
      uint16_t bits;
      static_assert(sizeof half == sizeof bits);
      memcpy(&bits, &half, sizeof bits);
      half_values_.push_back(bits);
    }
  }

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& outputs, const dali::Workspace& workspace) override {
    const auto& images = workspace.Input<Backend>(0);
    const int n = images.num_samples();
    numbers_.Acquire(this->spec_, workspace, n, dali::TensorShape<1>{kViewNumbers});
    DALI_ENFORCE(images.type() == DALI_UINT8, "images: expected 8-bit pixels");
    views_.clear();
    for (int i = 0; i < n; ++i) views_.push_back(checked(numbers_[i].data, images.tensor_shape(i), size_, i));
    outputs = {{dali::uniform_list_shape(n, dali::TensorShape<3>{size_, size_, 3}), dtype_}};
    return true;
  }

  const int size_;
  const dali::DALIDataType dtype_;
  const std::vector<float> values_;
  std::vector<uint16_t> half_values_;
  std::vector<View> views_;

 private:
  dali::ArgValue<float, 1> numbers_;
};

class ViewOperatorCpu : public ViewOperator<dali::CPUBackend> {
 public:
  explicit ViewOperatorCpu(const dali::OpSpec& spec) : ViewOperator(spec), scratch_(num_threads_) {}

 protected:
  void RunImpl(dali::Workspace& workspace) override {
    dtype_ == DALI_FLOAT ? run(workspace, values_) : run(workspace, half_values_);
  }

 private:
  template <class T>
  void run(dali::Workspace& workspace, const std::vector<T>& values) {
    const auto& images = workspace.Input<dali::CPUBackend>(0);
    auto& output = workspace.Output<dali::CPUBackend>(0);
    output.SetLayout("HWC");
    auto& pool = workspace.GetThreadPool();
    for (int i = 0; i < images.num_samples(); ++i) {
      const auto work = [&, i](int thread) {
        const int width = static_cast<int>(images.tensor_shape_span(i)[1]);
        auto* out = static_cast<T*>(output.raw_mutable_tensor(i));
        make_view(images.tensor<uint8_t>(i), width, views_[i], size_, values.data(), out, scratch_[thread]);
      };
      pool.AddWork(work, static_cast<int64_t>(views_[i].height) * views_[i].width);  // large ones first
    }
    pool.RunAll();
  }

  std::vector<Scratch> scratch_;
};

#ifdef SYNCO_WITH_CUDA
class ViewOperatorGpu : public ViewOperator<dali::GPUBackend> {
 public:
  using ViewOperator::ViewOperator;

 protected:
  void RunImpl(dali::Workspace& workspace) override {
    dtype_ == DALI_FLOAT ? run(workspace, values_) : run(workspace, half_values_);
  }

 private:
  template <class T>
  void run(dali::Workspace& workspace, const std::vector<T>& values) {
    const auto& images = workspace.Input<dali::GPUBackend>(0);
    auto& output = workspace.Output<dali::GPUBackend>(0);
    output.SetLayout("HWC");
    std::vector<Item<T>> items;
    for (int i = 0; i < images.num_samples(); ++i) {
      const int width = static_cast<int>(images.tensor_shape_span(i)[1]);
      items.push_back({views_[i], width, images.tensor<uint8_t>(i), static_cast<T*>(output.raw_mutable_tensor(i))});
    }
    int device = 0, processors = 0;
    CUDA_CALL(cudaGetDevice(&device));
    CUDA_CALL(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    const Plan plan = plan_views(items.data(), images.num_samples(), size_, processors);
    // What it gives is given back on the stream, behind the launch.
    dali::kernels::DynamicScratchpad scratchpad(workspace.stream());
    auto* const share = scratchpad.AllocateGPU<uint32_t>(plan.workspace_bytes() / sizeof(uint32_t));
    const auto [on_device, table] = scratchpad.ToContiguousGPU(workspace.stream(), items, values);
    CUDA_CALL(make_views<T>(on_device, table, share, plan, workspace.stream()));
  }
};
#endif

}  // namespace

}  // namespace synco::augment

DALI_REGISTER_OPERATOR(SyncoView, ::synco::augment::ViewOperatorCpu, ::dali::CPU);
#ifdef SYNCO_WITH_CUDA
DALI_REGISTER_OPERATOR(SyncoView, ::synco::augment::ViewOperatorGpu, ::dali::GPU);
#endif

DALI_SCHEMA(SyncoView)
    .DocStr("Augmented and normalised views of decoded RGB images, as torchvision makes them of PIL images.")
    .NumInput(1)
    .NumOutput(1)
    .InputLayout(0, "HWC")
    .AddArg("size", "Height and width of a view, pixels.", DALI_INT32)
    .AddArg("numbers", "What is done to each image: kernels/include/synco/view.h.", DALI_FLOAT_VEC, true)
    .AddArg("values", "What pixel value v of channel c becomes, at 256 c + v.", DALI_FLOAT_VEC)
    .AddArg("dtype", "FLOAT or FLOAT16.", DALI_DATA_TYPE);
