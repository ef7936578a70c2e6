"""Batch normalisation in C++, with residual, ReLU and the 2×2 max-pool fused, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv.backends import Statistics
from fastconv.backends.native_library import dense, empty, kernel
from fastconv.backends.native_passes import max_pool2d, max_pool2d_backward, relu_backward
from fastconv.geometry import PoolGeometry


def batch_norm_relu(
    x: Tensor,
    statistics: Statistics | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Statistics]:
    x = dense(x)
    statistics = statistics or _batch_statistics(x)
    return _normalised(x, statistics, weight, bias, residual, eps, relu=True), statistics


def batch_norm_relu_max_pool2d(
    x: Tensor,
    statistics: Statistics | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    pool: PoolGeometry,
) -> tuple[Tensor, Tensor, Statistics]:
    x = dense(x)
    statistics = statistics or _batch_statistics(x)
    if not pool.is_2x2:
        normalised = _normalised(x, statistics, weight, bias, residual, eps, relu=False)
        return *max_pool2d(normalised, pool, relu=True), statistics
    output, code = empty(x, pool.output_shape), empty(x, pool.output_shape, pool.code_dtype)
    residual = None if residual is None else dense(residual)
    kernel("batch_norm_relu_max_pool2d")(x, *statistics, weight, bias, residual, eps, output, code)
    return output, code, statistics


def _batch_statistics(x: Tensor) -> Statistics:
    """(mean, biased variance) over (N, H, W), float32."""
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    kernel("batch_norm_statistics")(x, mean, var)
    return mean, var


def _normalised(
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    output = empty(x, x.shape)
    residual = None if residual is None else dense(residual)
    kernel("batch_norm_relu")(x, *statistics, weight, bias, residual, eps, relu, output)
    return output


def batch_norm_relu_backward(
    grad: Tensor,
    gate: Tensor,
    x: Tensor | None,
    statistics: Statistics,
    weight: Tensor | None,
    eps: float,
    training: bool,
    pool: PoolGeometry | None,
    with_input: bool,
    with_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad, gate = dense(grad), dense(gate)
    x = None if x is None else dense(x)
    shape = grad.shape if pool is None else pool.input_shape
    sums = None if x is None else grad.new_empty((2, shape[1]), dtype=torch.float32)
    unpooled = None
    if pool is not None and (with_residual or not pool.is_2x2):
        unpooled, _ = max_pool2d_backward(grad, gate, pool, with_bias=False)
    if x is None and not with_input:
        if pool is None and with_residual:
            unpooled, _ = relu_backward(grad, gate, with_bias=False)
        return None, None, unpooled if with_residual else None
    input_grad = empty(grad, shape) if with_input else None
    saved = (x, *statistics, weight, eps, training, sums, input_grad)
    if pool is not None and pool.is_2x2:
        kernel("batch_norm_relu_max_pool2d_backward")(grad, gate, *saved)
    elif pool is not None:
        kernel("batch_norm_relu_backward")(unpooled, None, *saved, None)
    else:
        unpooled = empty(grad, shape) if with_residual else None
        kernel("batch_norm_relu_backward")(grad, gate, *saved, unpooled)
    return input_grad, sums, unpooled if with_residual else None


def batch_norm_update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    kernel("batch_norm_update")(running_mean, running_var, mean, var, momentum, count / (count - 1))
