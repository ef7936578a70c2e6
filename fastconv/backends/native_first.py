"""First layers on a CPU: direct sums, and gradients straight from a ReLU's output or from the code of a pool.

Where AVX-512 multiplies pairs of bfloat16, subnormal bfloat16 inputs, sums and results count as zero, as the instructions
have it. `prepared`, which other kernels are spared work by, is not read.
"""

from __future__ import annotations

from torch import Tensor

from fastconv.backends.native_library import dense, empty, kernel
from fastconv.geometry import ConvGeometry, PoolGeometry


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    g: ConvGeometry,
    relu: bool,
    prepared: Tensor | None = None,
) -> Tensor:
    output = empty(x, g.output_shape)
    residual = None if residual is None else dense(residual)
    _forward(x, weight, bias, residual, output, None, g, relu)
    return output


def conv2d_relu_max_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    pool: PoolGeometry,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    output, code = empty(x, pool.output_shape), empty(x, pool.output_shape, pool.code_dtype)
    _forward(x, weight, bias, None, output, code, g, relu=True)
    return output, code


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    code: Tensor | None,
    g: ConvGeometry,
    relu: bool,
) -> None:
    bias = None if bias is None else bias.contiguous()
    size = (g.out_height, g.out_width)
    kernel("first_conv2d")(dense(x), dense(weight), bias, residual, output, code, size, g.stride, g.padding, relu)


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry) -> Tensor:
    return _weight_grad(grad, None, x, g, with_bias=False)[0]


def conv2d_relu_weight_grad(
    grad: Tensor, gate: Tensor, x: Tensor, g: ConvGeometry, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """`gate`: the output of the ReLU, or the code of the pool behind it."""
    return _weight_grad(grad, gate, x, g, with_bias)


def _weight_grad(
    grad: Tensor, gate: Tensor | None, x: Tensor, g: ConvGeometry, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    output, bias = empty(grad, g.weight_shape), grad.new_empty(g.out_channels) if with_bias else None
    gate = None if gate is None else dense(gate)
    size = (g.out_height, g.out_width)
    kernel("first_weight_grad")(dense(grad), gate, dense(x), output, bias, size, g.stride, g.padding)
    return output, bias
