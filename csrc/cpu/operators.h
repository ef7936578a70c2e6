// The operators of fastconv_native on a CPU; ../schemas.h holds their schemas. Outputs are allocated by the caller.
#pragma once

#include "../passes.h"

namespace fastconv {

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

}  // namespace fastconv
