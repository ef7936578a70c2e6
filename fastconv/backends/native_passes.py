"""Passes over maps in C++: ReLU's backward, bias gradients and poolings."""

from __future__ import annotations

from torch import Tensor

from fastconv.backends.native_library import dense, empty, kernel
from fastconv.geometry import PoolGeometry


def bias_grad(grad: Tensor) -> Tensor:
    output = grad.new_empty(grad.shape[1])
    kernel("bias_grad")(dense(grad), output)
    return output


def relu_backward(grad: Tensor, output: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    return masked(dense(grad), output, with_bias, empty(grad, grad.shape))


def masked(grad: Tensor, output: Tensor, with_bias: bool, masked: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """relu_backward into `masked`, or in place."""
    masked = grad if masked is None else masked
    bias = grad.new_empty(grad.shape[1]) if with_bias else None
    kernel("relu_backward")(grad, dense(output), masked, bias)
    return masked, bias


def max_pool2d(x: Tensor, pool: PoolGeometry, relu: bool) -> tuple[Tensor, Tensor]:
    output = empty(x, pool.output_shape)
    code = empty(x, pool.output_shape, pool.code_dtype)
    kernel("max_pool2d")(dense(x), output, code, pool.kernel_size, pool.stride, pool.padding, pool.dilation, relu)
    return output, code


def max_pool2d_backward(grad: Tensor, code: Tensor, pool: PoolGeometry, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    input_grad = empty(grad, pool.input_shape)
    bias = grad.new_empty(pool.channels) if with_bias else None
    kernel("max_pool2d_backward")(
        dense(grad), dense(code), input_grad, bias, pool.kernel_size, pool.stride, pool.padding, pool.dilation
    )
    return input_grad, bias


def avg_pool2d(x: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    output = empty(x, pool.output_shape)
    kernel("avg_pool2d")(dense(x), output, pool.kernel_size, pool.stride, pool.padding, count_include_pad, divisor_override)
    return output


def avg_pool2d_backward(grad: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    input_grad = empty(grad, pool.input_shape)
    kernel("avg_pool2d_backward")(
        dense(grad), input_grad, pool.kernel_size, pool.stride, pool.padding, count_include_pad, divisor_override
    )
    return input_grad


def global_avg_pool2d(x: Tensor) -> Tensor:
    output = empty(x, (*x.shape[:2], 1, 1))
    kernel("global_avg_pool2d")(dense(x), output)
    return output


def global_avg_pool2d_backward(grad: Tensor, height: int, width: int) -> Tensor:
    input_grad = empty(grad, (*grad.shape[:2], height, width))
    kernel("global_avg_pool2d_backward")(dense(grad), input_grad)
    return input_grad
