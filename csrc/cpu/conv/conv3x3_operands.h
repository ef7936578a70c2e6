// What the operators on 3×3 convolutions take, checked: dtypes, memory formats, sizes that fit each other.
#pragma once

#include "../operators.h"
#include "../tensors.h"
#include "conv3x3.h"

namespace fastconv {

// Whether a convolution reads `in` and writes `out` along a dimension.
inline bool fits_3x3(int64_t in, int64_t out, int64_t pad) { return pad >= 0 && pad <= 2 && out > 0 && out == in + 2 * pad - 2; }

struct Conv3x3Operands {
  const Tensor &x, &weight;
  const std::optional<Tensor>&bias, &residual;
  const Tensor& output;
  const std::optional<Tensor>& code;
  const Pair &size, &padding;
  bool relu, turned;

  Conv3x3Sizes sizes() const {
    const Map from = map_of(x, "x"), filter = map_of(weight, "weight"), to = map_of(output, "output");
    const auto dtype = x.scalar_type();
    check_same(weight, "weight", filter, dtype);
    check_same(output, "output", to, dtype);
    check_bias(bias, to, dtype);
    if (code) check_same(*code, "code", to, ScalarType::Byte);
    if (residual) check_same(*residual, "residual", to, dtype);
    STD_TORCH_CHECK(!code || (relu && !residual), "fastconv_native: a pool comes with ReLU and without a residual");
    const int64_t channels = turned ? filter.batch : filter.channels, outputs = turned ? filter.channels : filter.batch;
    STD_TORCH_CHECK(
        filter.height == 3 && filter.width == 3 && channels == from.channels && outputs == to.channels,
        "fastconv_native: weight must be [K, C, 3, 3] of the channels of x and output");
    const auto holds = [&](int64_t out, int64_t there) {
      return code ? there == out / 2 || there == (out + 1) / 2 : there == out;
    };
    STD_TORCH_CHECK(
        from.batch == to.batch && fits_3x3(from.height, size[0], padding[0]) && fits_3x3(from.width, size[1], padding[1]) &&
            holds(size[0], to.height) && holds(size[1], to.width),
        "fastconv_native: output has a wrong size, or padding is not 0, 1 or 2");
    return {from.batch, from.height, from.width, from.channels, size[0], size[1], outputs, padding[0], padding[1]};
  }

  template <class T>
  Conv3x3Pass<T> pass(const Conv3x3Sizes& sizes) const {
    const Map filter = map_of(weight, "weight"), to = map_of(output, "output");
    return {
        sizes,
        read<T>(x),
        {read<T>(weight), filter.batch, filter.channels, turned},
        {write<T>(output), code ? write<uint8_t>(*code) : nullptr, bias ? read<T>(*bias) : nullptr,
         residual ? read<T>(*residual) : nullptr, relu, to.height, to.width}};
  }
};

inline Conv3x3Sizes sizes_of_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight_grad, const Pair& padding) {
  const Map to = map_of(grad, "grad"), from = map_of(x, "x"), filter = map_of(weight_grad, "weight_grad");
  check_same(x, "x", from, grad.scalar_type());
  check_same(weight_grad, "weight_grad", filter, grad.scalar_type());
  STD_TORCH_CHECK(
      filter.height == 3 && filter.width == 3 && filter.batch == to.channels && filter.channels == from.channels,
      "fastconv_native: weight_grad must be [K, C, 3, 3] of the channels of grad and x");
  STD_TORCH_CHECK(
      from.batch == to.batch && fits_3x3(from.height, to.height, padding[0]) && fits_3x3(from.width, to.width, padding[1]),
      "fastconv_native: grad has a wrong size, or padding is not 0, 1 or 2");
  return {from.batch, from.height, from.width, from.channels, to.height, to.width, to.channels, padding[0], padding[1]};
}

}  // namespace fastconv
