// The schemas of fastconv_native's operators, and which functions are the passes among them.
#pragma once

#include "passes.h"

#include <torch/csrc/stable/library.h>

namespace fastconv {

template <class Library>
void define_passes(Library& m) {
  m.def("relu_backward(Tensor grad, Tensor output, Tensor(a!) masked, Tensor(b!)? bias_grad) -> ()");
  m.def("bias_grad(Tensor grad, Tensor(a!) bias_grad) -> ()");
  m.def(
      "max_pool2d(Tensor x, Tensor(a!) output, Tensor(b!) code, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool relu) -> ()");
  m.def(
      "max_pool2d_backward(Tensor grad, Tensor code, Tensor(a!) input_grad, Tensor(b!)? bias_grad, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation) -> ()");
  m.def(
      "avg_pool2d(Tensor x, Tensor(a!) output, int[2] kernel_size, int[2] stride, int[2] padding, bool count_include_pad, "
      "int? divisor_override) -> ()");
  m.def(
      "avg_pool2d_backward(Tensor grad, Tensor(a!) input_grad, int[2] kernel_size, int[2] stride, int[2] padding, "
      "bool count_include_pad, int? divisor_override) -> ()");
  m.def("global_avg_pool2d(Tensor x, Tensor(a!) output) -> ()");
  m.def("global_avg_pool2d_backward(Tensor grad, Tensor(a!) input_grad) -> ()");
  m.def("batch_norm_statistics(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "batch_norm_relu(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "bool relu, Tensor(a!) output) -> ()");
  m.def(
      "batch_norm_relu_max_pool2d(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, "
      "float eps, Tensor(a!) output, Tensor(b!) code) -> ()");
  m.def(
      "batch_norm_relu_backward(Tensor grad, Tensor? gate, Tensor? x, Tensor mean, Tensor var, Tensor? weight, float eps, "
      "bool training, Tensor(a!)? sums, Tensor(b!)? input_grad, Tensor(c!)? closed) -> ()");
  m.def(
      "batch_norm_relu_max_pool2d_backward(Tensor grad, Tensor code, Tensor? x, Tensor mean, Tensor var, Tensor? weight, "
      "float eps, bool training, Tensor(a!)? sums, Tensor(b!)? input_grad) -> ()");
  m.def(
      "batch_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, "
      "float unbiased) -> ()");
}

template <class Library>
void implement_passes(Library& m) {
  m.impl("relu_backward", TORCH_BOX(&fastconv::relu_backward));
  m.impl("bias_grad", TORCH_BOX(&fastconv::bias_grad));
  m.impl("max_pool2d", TORCH_BOX(&fastconv::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&fastconv::max_pool2d_backward));
  m.impl("avg_pool2d", TORCH_BOX(&fastconv::avg_pool2d));
  m.impl("avg_pool2d_backward", TORCH_BOX(&fastconv::avg_pool2d_backward));
  m.impl("global_avg_pool2d", TORCH_BOX(&fastconv::global_avg_pool2d));
  m.impl("global_avg_pool2d_backward", TORCH_BOX(&fastconv::global_avg_pool2d_backward));
  m.impl("batch_norm_statistics", TORCH_BOX(&fastconv::batch_norm_statistics));
  m.impl("batch_norm_relu", TORCH_BOX(&fastconv::batch_norm_relu));
  m.impl("batch_norm_relu_max_pool2d", TORCH_BOX(&fastconv::batch_norm_relu_max_pool2d));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&fastconv::batch_norm_relu_backward));
  m.impl("batch_norm_relu_max_pool2d_backward", TORCH_BOX(&fastconv::batch_norm_relu_max_pool2d_backward));
  m.impl("batch_norm_update", TORCH_BOX(&fastconv::batch_norm_update));
}

template <class Library>
void define_cpu_convolutions(Library& m) {
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, bool relu) -> Tensor");
  m.def(
      "winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) output, Tensor(b!)? code, "
      "int[2] size, int[2] padding, bool relu, bool turned, Tensor? filters=None) -> ()");
  m.def("winograd_filters(Tensor weight, Tensor(a!) filters) -> ()");
  m.def("winograd_weight_grad(Tensor grad, Tensor x, Tensor(a!) weight_grad, int[2] padding) -> ()");
  m.def(
      "first_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) output, Tensor(b!)? code, "
      "int[2] size, int[2] stride, int[2] padding, bool relu) -> ()");
  m.def(
      "first_weight_grad(Tensor grad, Tensor? gate, Tensor x, Tensor(a!) weight_grad, Tensor(b!)? bias_grad, int[2] size, "
      "int[2] stride, int[2] padding) -> ()");
  m.def(
      "amx_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) output, Tensor(b!)? code, "
      "int[2] size, int[2] padding, bool relu, bool turned) -> ()");
  m.def("amx_weight_grad(Tensor grad, Tensor x, Tensor(a!) weight_grad, int[2] padding) -> ()");
}

// `size`: height and width of the output before a pool, of which there is one where a code is given.
template <class Library>
void define_cuda_convolutions(Library& m) {
  m.def(
      "cuda_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) output, Tensor(b!)? code, "
      "int[2] size, int[2] stride, int[2] padding, int[2] dilation, int groups, bool relu, bool tf32, int tile) -> ()");
  m.def(
      "cuda_conv2d_input_grad(Tensor grad, Tensor weight, Tensor(a!) input_grad, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool tf32, int tile) -> ()");
  m.def(
      "cuda_conv2d_weight_grad(Tensor grad, Tensor x, Tensor(a!) weight_grad, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool tf32, int tile) -> ()");
}

}  // namespace fastconv
