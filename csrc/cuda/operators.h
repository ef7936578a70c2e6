// The convolutions of fastconv_native on CUDA tensors; ../passes.h has the passes, ../schemas.h the schemas.
#pragma once

#include "../passes.h"

#include <torch/csrc/stable/library.h>

namespace fastconv {

// `size`: height and width of the output before a 2×2 pool, of which there is one where a code is given. `tf32`: float32
// operands may be rounded to TF32. `tile`: 0 leaves the choice to sizes, also that of direct kernels for groups of few
// channels; 1 takes small tiles, 2 large ones where there are any.
void cuda_conv2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const Tensor& output, const std::optional<Tensor>& code, const Pair& size, const Pair& stride, const Pair& padding,
    const Pair& dilation, int64_t groups, bool relu, bool tf32, int64_t tile);
void cuda_conv2d_input_grad(
    const Tensor& grad, const Tensor& weight, const Tensor& input_grad, const Pair& stride, const Pair& padding,
    const Pair& dilation, int64_t groups, bool tf32, int64_t tile);
void cuda_conv2d_weight_grad(
    const Tensor& grad, const Tensor& x, const Tensor& weight_grad, const Pair& stride, const Pair& padding,
    const Pair& dilation, int64_t groups, bool tf32, int64_t tile);

template <class Library>
void implement_cuda_convolutions(Library& m) {
  m.impl("cuda_conv2d", TORCH_BOX(&cuda_conv2d));
  m.impl("cuda_conv2d_input_grad", TORCH_BOX(&cuda_conv2d_input_grad));
  m.impl("cuda_conv2d_weight_grad", TORCH_BOX(&cuda_conv2d_weight_grad));
}

}  // namespace fastconv
