// Operators of fastconv_native that are passes over maps: the same on every device, each library with kernels of its own.
// Outputs are allocated by the caller; sums over pixels are taken in an order that sizes and alignment alone decide.
#pragma once

#include "maps.h"

namespace fastconv {

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
