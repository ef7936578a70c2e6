// The operators of fastconv_native; registry.cpp holds their schemas. Outputs are allocated by the caller.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fastconv {

using torch::stable::Tensor;
using Pair = std::vector<int64_t>;

Tensor conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Pair& stride, const Pair& padding, const Pair& dilation, int64_t groups, bool relu);

// A 3×3 convolution of stride 1. `size`: height and width of its output before a pool, of which there is one where a code is
// given. Where `turned`, the input gradient of a convolution with `weight`: x is the output's gradient, the padding 2 less it.
void winograd_conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& output, const std::optional<Tensor>& code, const Pair& size, const Pair& padding, bool relu, bool turned,
    const std::optional<Tensor>& filters);
// `filters`: a weight transformed beforehand, for forwards that are not turned; 0 floats where that would not pay.
int64_t winograd_filters_size(int64_t channels, int64_t out_channels);
void winograd_filters(const Tensor& weight, const Tensor& filters);
void winograd_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight_grad, const Pair& padding);

// The same for bfloat16 on Intel's AMX, by products of tiles. An error in a process without it.
void amx_conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& output, const std::optional<Tensor>& code, const Pair& size, const Pair& padding, bool relu, bool turned);
void amx_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight_grad, const Pair& padding);

// Whether the compiler knew AMX; whether processor and kernel let this process use it, which ATEN_CPU_CAPABILITY can forbid.
bool built_with_amx();
bool has_amx();

// A convolution without groups and dilation of few input channels. `size` and code as above.
void first_conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& output, const std::optional<Tensor>& code, const Pair& size, const Pair& stride, const Pair& padding,
    bool relu);
// `gate`: the output of the convolution's ReLU, or the code of a pool behind it, if there is either.
void first_weight_grad(
    const Tensor& grad, const std::optional<Tensor>& gate, const Tensor& x, const Tensor& weight_grad,
    const std::optional<Tensor>& bias_grad, const Pair& size, const Pair& stride, const Pair& padding);

void relu_backward(const Tensor& grad, const Tensor& output, const Tensor& masked, const std::optional<Tensor>& bias_grad);
void bias_grad(const Tensor& grad, const Tensor& bias_grad);

void max_pool2d(
    const Tensor& x, const Tensor& output, const Tensor& code, const Pair& kernel, const Pair& stride, const Pair& padding,
    const Pair& dilation, bool relu);
void max_pool2d_backward(
    const Tensor& grad, const Tensor& code, const Tensor& input_grad, const std::optional<Tensor>& bias_grad,
    const Pair& kernel, const Pair& stride, const Pair& padding, const Pair& dilation);

void avg_pool2d(
    const Tensor& x, const Tensor& output, const Pair& kernel, const Pair& stride, const Pair& padding,
    bool count_include_pad, std::optional<int64_t> divisor);
void avg_pool2d_backward(
    const Tensor& grad, const Tensor& input_grad, const Pair& kernel, const Pair& stride, const Pair& padding,
    bool count_include_pad, std::optional<int64_t> divisor);

void global_avg_pool2d(const Tensor& x, const Tensor& output);
void global_avg_pool2d_backward(const Tensor& grad, const Tensor& input_grad);

void batch_norm_statistics(const Tensor& x, const Tensor& mean, const Tensor& var);
void batch_norm_relu(
    const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, double eps, bool relu, const Tensor& output);
void batch_norm_relu_max_pool2d(
    const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, double eps, const Tensor& output,
    const Tensor& code);
void batch_norm_relu_backward(
    const Tensor& grad, const std::optional<Tensor>& gate, const std::optional<Tensor>& x, const Tensor& mean,
    const Tensor& var, const std::optional<Tensor>& weight, double eps, bool training, const std::optional<Tensor>& sums,
    const std::optional<Tensor>& input_grad, const std::optional<Tensor>& closed);
void batch_norm_relu_max_pool2d_backward(
    const Tensor& grad, const Tensor& code, const std::optional<Tensor>& x, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& weight, double eps, bool training, const std::optional<Tensor>& sums,
    const std::optional<Tensor>& input_grad);
void batch_norm_update(
    const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var, double momentum,
    double unbiased);

}  // namespace fastconv
