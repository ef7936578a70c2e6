"""3×3 convolutions by Winograd's F(4×4, 3×3) in float32, whatever the dtype in memory: the launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv.backends.native_library import dense, empty, kernel, library
from fastconv.geometry import ConvGeometry, PoolGeometry


def filters(weight: Tensor) -> Tensor | None:
    """A weight [K, C, 3, 3] transformed for the forwards below, laid out for this process's instruction set.

    None for large weights: to read their transform from memory would take longer than to transform them again.
    """
    size = library().winograd_filters_size(weight.shape[1], weight.shape[0])
    if size == 0:
        return None
    transformed = weight.new_empty(size, dtype=torch.float32)
    kernel("winograd_filters")(dense(weight), transformed)
    return transformed


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    g: ConvGeometry,
    relu: bool,
    filters: Tensor | None = None,
) -> Tensor:
    output = empty(x, g.output_shape)
    residual = None if residual is None else dense(residual)
    _conv(x, weight, bias, residual, output, None, g.output_shape[2:], g.padding, relu, False, filters)
    return output


def conv2d_relu_max_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    pool: PoolGeometry,
    filters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    output, code = empty(x, pool.output_shape), empty(x, pool.output_shape, pool.code_dtype)
    _conv(x, weight, bias, None, output, code, g.output_shape[2:], g.padding, True, False, filters)
    return output, code


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    input_grad = empty(grad, g.input_shape)
    padding = (2 - g.pad_h, 2 - g.pad_w)
    _conv(grad, weight, None, None, input_grad, None, g.input_shape[2:], padding, False, True, None)
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
    filters: Tensor | None,
) -> None:
    kernel("winograd_conv2d")(dense(x), dense(weight), bias, residual, output, code, size, padding, relu, turned, filters)
