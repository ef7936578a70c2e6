// Operators of convolutions: what tensors say is checked and told to kernels.
#include "conv_direct.h"
#include "conv_launch.h"
#include "operators.h"
#include "sum_rows.h"
#include "tensors.h"

namespace fastconv {

namespace {

// body(Type<Math>) for how elements of `dtype` are multiplied.
template <class Body>
void by_math(ScalarType dtype, bool tf32, const Body& body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body(Type<Bf16>{});
    case ScalarType::Half:
      return body(Type<F16>{});
    case ScalarType::Float:
      return tf32 ? body(Type<Tf32>{}) : body(Type<Ieee>{});
    default:
      STD_TORCH_CHECK(false, "fastconv_native: dtype must be float32, bfloat16 or float16");
  }
}

// Kernels number pixels, channels and elements of a weight in 32 bits, and reckon a little beyond.
int narrow_size(int64_t size, const char* name) {
  STD_TORCH_CHECK(size >= 0 && size < (int64_t{1} << 31) - (1 << 16), "fastconv_native: ", name, " is too large: ", size);
  return static_cast<int>(size);
}

// One convolution's sizes, from the shapes of its tensors.
struct Sizes {
  Map x, weight, out;
  int64_t groups;

  void check() const {
    STD_TORCH_CHECK(
        groups > 0 && x.channels == weight.channels * groups && weight.batch == out.channels && out.channels % groups == 0 &&
            x.batch == out.batch,
        "fastconv_native: sizes of a convolution's tensors do not go together");
    narrow_size(x.pixels(), "the map");
    narrow_size(out.pixels(), "the output");
    narrow_size(weight.numel(), "the weight");
  }
};

template <class Params>
void set_window(Params& p, const Sizes& sizes, const Pair& stride, const Pair& padding, const Pair& dilation) {
  p.batch = static_cast<int>(sizes.x.batch);
  p.groups = static_cast<int>(sizes.groups);
  p.kernel_h = static_cast<int>(sizes.weight.height);
  p.kernel_w = static_cast<int>(sizes.weight.width);
  p.stride_h = narrow_size(stride[0], "stride");
  p.stride_w = narrow_size(stride[1], "stride");
  p.pad_h = narrow_size(padding[0], "padding");
  p.pad_w = narrow_size(padding[1], "padding");
  p.dilation_h = narrow_size(dilation[0], "dilation");
  p.dilation_w = narrow_size(dilation[1], "dilation");
}

TileSize to_tile(int64_t tile) {
  STD_TORCH_CHECK(tile >= 0 && tile <= 2, "fastconv_native: tile must be 0, 1 or 2, got ", tile);
  return static_cast<TileSize>(tile);
}

bool is_vector(const Sizes& sizes, int64_t element_size, std::initializer_list<const void*> read) {
  const int64_t vector = kChunkBytes / element_size;
  const int64_t out_channels = sizes.out.channels / sizes.groups;
  if (sizes.weight.channels % vector != 0 || out_channels % vector != 0) return false;
  for (const void* address : read) {
    if (!is_aligned(address)) return false;
  }
  return true;
}

}  // namespace

void cuda_conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& output, const std::optional<Tensor>& code, const Pair& size, const Pair& stride, const Pair& padding,
    const Pair& dilation, int64_t groups, bool relu, bool tf32, int64_t tile) {
  const ScalarType dtype = x.scalar_type();
  const Map out = map_of(output, "output");
  const Sizes sizes{map_of(x, "x"), map_of(weight, "weight"), {out.batch, out.channels, size[0], size[1]}, groups};
  sizes.check();
  check_same(weight, "weight", sizes.weight, dtype);
  check_same(output, "output", out, dtype);
  STD_TORCH_CHECK(
      out.height == (code ? size[0] / 2 : size[0]) && out.width == (code ? size[1] / 2 : size[1]),
      "fastconv_native: output has a wrong size");
  check_bias(bias, out, dtype);
  if (residual) check_same(*residual, "residual", out, dtype);
  if (code) check_same(*code, "code", out, ScalarType::Byte);
  STD_TORCH_CHECK(!code || (relu && !residual), "fastconv_native: a pool comes behind a ReLU, without a residual");
  const Call call(x);
  ConvParams p{};
  p.x = call.read(x);
  p.weight = call.read(weight);
  p.bias = call.read(bias);
  p.residual = call.read(residual);
  p.y = call.write(output);
  p.code = call.write<uint8_t>(code);
  p.height = static_cast<int>(sizes.x.height);
  p.width = static_cast<int>(sizes.x.width);
  p.out_height = static_cast<int>(size[0]);
  p.out_width = static_cast<int>(size[1]);
  p.channels = static_cast<int>(sizes.weight.channels);
  p.out_channels = static_cast<int>(out.channels / groups);
  p.relu = relu;
  set_window(p, sizes, stride, padding, dilation);
  p.stores_chunks = is_aligned(p.y) && is_aligned(p.code);
  const Route route = code ? Route::kForwardPool : Route::kForward;
  if (tile == 0 && is_direct(p)) return launch_direct(call.stream(), dtype, route, p);
  const bool vector = is_vector(sizes, x.element_size(), {p.x, p.weight});
  by_math(dtype, tf32, [&](auto math) {
    launch_conv<typename decltype(math)::T>(call.stream(), route, p, vector, to_tile(tile));
  });
}

void cuda_conv2d_input_grad(
    const Tensor& grad, const Tensor& weight, const Tensor& input_grad, const Pair& stride, const Pair& padding,
    const Pair& dilation, int64_t groups, bool tf32, int64_t tile) {
  const ScalarType dtype = grad.scalar_type();
  const Sizes sizes{map_of(input_grad, "input_grad"), map_of(weight, "weight"), map_of(grad, "grad"), groups};
  sizes.check();
  check_same(weight, "weight", sizes.weight, dtype);
  check_same(input_grad, "input_grad", sizes.x, dtype);
  const Call call(grad);
  ConvParams p{};
  p.x = call.read(grad);
  p.weight = call.read(weight);
  p.y = call.write(input_grad);
  p.height = static_cast<int>(sizes.out.height);
  p.width = static_cast<int>(sizes.out.width);
  p.out_height = static_cast<int>(sizes.x.height);
  p.out_width = static_cast<int>(sizes.x.width);
  p.channels = static_cast<int>(sizes.out.channels / groups);
  p.out_channels = static_cast<int>(sizes.weight.channels);
  set_window(p, sizes, stride, padding, dilation);
  p.stores_chunks = is_aligned(p.y);
  if (tile == 0 && is_direct(p)) return launch_direct(call.stream(), dtype, Route::kInputGrad, p);
  const bool vector = is_vector(sizes, grad.element_size(), {p.x, p.weight});
  by_math(dtype, tf32, [&](auto math) {
    launch_conv<typename decltype(math)::T>(call.stream(), Route::kInputGrad, p, vector, to_tile(tile));
  });
}

void cuda_conv2d_weight_grad(
    const Tensor& grad, const Tensor& x, const Tensor& weight_grad, const Pair& stride, const Pair& padding,
    const Pair& dilation, int64_t groups, bool tf32, int64_t tile) {
  const ScalarType dtype = grad.scalar_type();
  const Sizes sizes{map_of(x, "x"), map_of(weight_grad, "weight_grad"), map_of(grad, "grad"), groups};
  sizes.check();
  check_same(x, "x", sizes.x, dtype);
  check_same(weight_grad, "weight_grad", sizes.weight, dtype);
  const Call call(grad);
  WeightGradParams p{};
  p.x = call.read(x);
  p.grad = call.read(grad);
  p.height = static_cast<int>(sizes.x.height);
  p.width = static_cast<int>(sizes.x.width);
  p.out_height = static_cast<int>(sizes.out.height);
  p.out_width = static_cast<int>(sizes.out.width);
  p.channels = static_cast<int>(sizes.weight.channels);
  p.out_channels = static_cast<int>(sizes.out.channels / groups);
  set_window(p, sizes, stride, padding, dilation);
  if (tile == 0 && is_direct(p)) {
    const int runs = direct_weight_grad_runs(dtype, p);
    const Tensor sums = scratch(grad, {runs, sizes.weight.numel()});
    p.sums = call.write<float>(sums);
    launch_direct_weight_grad(call.stream(), dtype, p);
    return by_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::T;
      sum_rows(call.stream(), p.sums, runs, call.write<T>(weight_grad), sizes.weight.numel());
    });
  }
  const bool vector = is_vector(sizes, grad.element_size(), {p.x, p.grad});
  by_math(dtype, tf32, [&](auto math) {
    using Math = typename decltype(math)::T;
    using T = typename Math::Element;
    const int splits = weight_grad_splits<Math>(p, vector, to_tile(tile));
    const Tensor sums = scratch(grad, {splits, sizes.weight.numel()});
    p.sums = call.write<float>(sums);
    launch_weight_grad<Math>(call.stream(), p, vector, to_tile(tile));
    sum_rows(call.stream(), p.sums, splits, call.write<T>(weight_grad), sizes.weight.numel());
  });
}

}  // namespace fastconv
