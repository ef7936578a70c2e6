"""3×3 convolutions by Winograd's F(4×4, 3×3) in float32, whatever the dtype in memory: the launchers."""

from __future__ import annotations

from torch import Tensor

from fastconv.backends.native_library import dense, empty, kernel
from fastconv.geometry import ConvGeometry, PoolGeometry


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: ConvGeometry, relu: bool) -> Tensor:
    output = empty(x, g.output_shape)
    residual = None if residual is None else dense(residual)
    _conv(x, weight, bias, residual, output, None, g.output_shape[2:], g.padding, relu, turned=False)
    return output


def conv2d_relu_max_pool2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, pool: PoolGeometry
) -> tuple[Tensor, Tensor]:
    output, code = empty(x, pool.output_shape), empty(x, pool.output_shape, pool.code_dtype)
    _conv(x, weight, bias, None, output, code, g.output_shape[2:], g.padding, relu=True, turned=False)
    return output, code


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    input_grad = empty(grad, g.input_shape)
    padding = (2 - g.pad_h, 2 - g.pad_w)
    _conv(grad, weight, None, None, input_grad, None, g.input_shape[2:], padding, relu=False, turned=True)
    return input_grad


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry) -> Tensor:
    weight_grad = empty(grad, g.weight_shape)
    kernel("winograd_weight_grad")(dense(grad), dense(x), weight_grad, g.padding)
    return weight_grad


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    code: Tensor | None,
    size: tuple[int, ...],
    padding: tuple[int, int],
    relu: bool,
    turned: bool,
) -> None:
    kernel("winograd_conv2d")(dense(x), dense(weight), bias, residual, output, code, size, padding, relu, turned, None)
