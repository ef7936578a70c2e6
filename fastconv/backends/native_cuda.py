"""Convolutions on a GPU by the CUDA C++ kernels: implicit products on tensor cores, float32 without TF32 on CUDA cores.

Groups of few channels would leave tiles of products nearly empty: kernels of their own pass over their maps, in float32.

`prepared`, which other kernels are spared work by, is not read.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastconv.backends.native_library import dense, empty, kernel
from fastconv.backends.native_passes import masked, max_pool2d, max_pool2d_backward, relu_backward
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

tile = 0  # 0 leaves it to sizes what serves; tests also ask for products by small tiles (1) and by large ones (2)

_MOST = 2**31 - 2**16  # that the kernels number in 32 bits, and reckon a little beyond


def too_large(g: ConvGeometry | PoolGeometry) -> str | None:
    """Why the kernels cannot serve a geometry; None where they can. Elements they number in 64 bits."""
    pixels = g.batch * max(g.height * g.width, g.out_height * g.out_width)
    if pixels >= _MOST:
        return f"its kernels number pixels in 32 bits, got a map of {pixels}"
    elements = math.prod(g.weight_shape) if isinstance(g, ConvGeometry) else 0
    return f"its kernels number a weight's elements in 32 bits, got {elements}" if elements >= _MOST else None


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    g: ConvGeometry,
    policy: Policy,
    relu: bool,
    prepared: Tensor | None = None,
) -> Tensor:
    output = empty(x, g.output_shape)
    residual = None if residual is None else dense(residual)
    _forward(x, weight, bias, residual, output, None, g, policy, relu)
    return output


def conv2d_relu_max_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    pool: PoolGeometry,
    policy: Policy,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Winners are those of the float32 sums, before they are rounded."""
    if not pool.is_2x2:
        return max_pool2d(conv2d(x, weight, bias, None, g, policy, relu=False), pool, relu=True)
    output, code = empty(x, pool.output_shape), empty(x, pool.output_shape, pool.code_dtype)
    _forward(x, weight, bias, None, output, code, g, policy, relu=True)
    return output, code


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    code: Tensor | None,
    g: ConvGeometry,
    policy: Policy,
    relu: bool,
) -> None:
    bias = None if bias is None else bias.contiguous()
    size = (g.out_height, g.out_width)
    operands = (dense(x), dense(weight), bias, residual, output, code)
    kernel("cuda_conv2d")(*operands, size, g.stride, g.padding, g.dilation, g.groups, relu, policy.tf32, tile)


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    input_grad = empty(grad, g.input_shape)
    operands = (dense(grad), dense(weight), input_grad)
    kernel("cuda_conv2d_input_grad")(*operands, g.stride, g.padding, g.dilation, g.groups, policy.tf32, tile)
    return input_grad


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    """Sums over pixels in an order that sizes and alignment decide: the same bits on every GPU."""
    weight_grad = empty(grad, g.weight_shape)
    operands = (dense(grad), dense(x), weight_grad)
    kernel("cuda_conv2d_weight_grad")(*operands, g.stride, g.padding, g.dilation, g.groups, policy.tf32, tile)
    return weight_grad


def conv2d_relu_weight_grad(
    grad: Tensor, gate: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, pool: PoolGeometry | None, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    if pool is None:
        before, bias = relu_backward(grad, gate, with_bias)
    else:
        before, bias = max_pool2d_backward(grad, gate, pool, with_bias)
    return conv2d_weight_grad(before, x, g, policy), bias


def conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    grad = dense(grad)
    return conv2d_input_grad(grad, weight, g, policy), conv2d_weight_grad(grad, x, g, policy)


def conv2d_input_grad_relu(
    grad: Tensor, weight: Tensor, gate: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    return masked(conv2d_input_grad(grad, weight, g, policy), gate, with_bias)


def conv2d_backward_relu(
    grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad, x = dense(grad), dense(x)
    closed, bias = conv2d_input_grad_relu(grad, weight, x, g, policy, with_bias)
    return closed, conv2d_weight_grad(grad, x, g, policy), bias
