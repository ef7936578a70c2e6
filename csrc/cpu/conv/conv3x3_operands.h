// What the operators on 3×3 convolutions take, checked: dtypes, memory formats, sizes that fit each other.
#pragma once

#include "../operators.h"
#include "../tensors.h"
#include "conv3x3.h"

namespace fastconv {

// Whether a convolution reads `in` and writes `out` along a dimension.
inline bool fits_3x3(int64_t in, int64_t out, int64_t pad) { return pad >= 0 && pad <= 2 && out > 0 && out == in + 2 * pad - 2; }

class Conv3x3Operands {
 public:
  Conv3x3Operands(
      const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
      const Tensor& output, const std::optional<Tensor>& code, const Pair& size, const Pair& padding, bool relu, bool turned)
      : x_(x), weight_(weight), bias_(bias), residual_(residual), output_(output), code_(code), relu_(relu), turned_(turned),
        filter_(map_of(weight, "weight")), to_(map_of(output, "output")) {
    const Map from = map_of(x, "x");
    const auto dtype = x.scalar_type();
    check_same(weight, "weight", filter_, dtype);
    check_same(output, "output", to_, dtype);
    check_bias(bias, to_, dtype);
    if (code) check_same(*code, "code", to_, ScalarType::Byte);
    if (residual) check_same(*residual, "residual", to_, dtype);
    STD_TORCH_CHECK(!code || (relu && !residual), "fastconv_native: a pool comes with ReLU and without a residual");
    const int64_t channels = turned ? filter_.batch : filter_.channels, outputs = turned ? filter_.channels : filter_.batch;
    STD_TORCH_CHECK(
        filter_.height == 3 && filter_.width == 3 && channels == from.channels && outputs == to_.channels,
        "fastconv_native: weight must be [K, C, 3, 3] of the channels of x and output");
    STD_TORCH_CHECK(
        from.batch == to_.batch && fits_3x3(from.height, size[0], padding[0]) && fits_3x3(from.width, size[1], padding[1]) &&
            holds(size[0], to_.height, code.has_value()) && holds(size[1], to_.width, code.has_value()),
        "fastconv_native: output has a wrong size, or padding is not 0, 1 or 2");
    sizes_ = {from.batch, from.height, from.width, from.channels, size[0], size[1], outputs, padding[0], padding[1]};
  }

  const Conv3x3Sizes& sizes() const { return sizes_; }

  template <class T>
  Conv3x3Pass<T> pass() const {
    return {
        sizes_,
        read<T>(x_),
        {read<T>(weight_), filter_.batch, filter_.channels, turned_},
        {write<T>(output_), code_ ? write<uint8_t>(*code_) : nullptr, bias_ ? read<T>(*bias_) : nullptr,
         residual_ ? read<T>(*residual_) : nullptr, relu_, to_.height, to_.width}};
  }

 private:
  const Tensor& x_;
  const Tensor& weight_;
  const std::optional<Tensor>& bias_;
  const std::optional<Tensor>& residual_;
  const Tensor& output_;
  const std::optional<Tensor>& code_;
  bool relu_, turned_;
  Map filter_, to_;
  Conv3x3Sizes sizes_;
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
