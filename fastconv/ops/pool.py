"""Pooling operators, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconv import geometry
from fastconv.backends import aten
from fastconv.geometry import PoolGeometry
from fastconv.ops.define import absent, dense, launchers_for, operator, optional_bias

_POOL = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"


def _layout(channels_last: bool) -> torch.memory_format:
    """Of an average's input gradient: the input's, which a gradient of 1×1 maps cannot tell."""
    return torch.channels_last if channels_last else torch.contiguous_format


@operator(f"max_pool2d(Tensor input, {_POOL}, bool relu, str backend) -> (Tensor, Tensor)")
def max_pool2d(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    relu: bool,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor]:
    op = "relu_max_pool2d" if relu else "max_pool2d"
    geometry.check_input(op, input)
    pool = PoolGeometry.of(op, input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    layout = geometry.memory_format(input)
    if fake:
        output = input.new_empty(pool.output_shape).to(memory_format=layout)
        return output, torch.empty_like(output, dtype=pool.code_dtype)
    output, code = launchers_for(backend, op, "forward", pool, input, layout).max_pool2d(input, pool, relu)
    return dense(output, layout), dense(code, layout)


@operator(
    f"max_pool2d_backward(Tensor grad, Tensor code, SymInt[] input_shape, {_POOL}, bool with_bias, str backend)"
    " -> (Tensor, Tensor)"
)
def max_pool2d_backward(
    grad: Tensor,
    code: Tensor,
    input_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    with_bias: bool,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor]:
    op = "max_pool2d"
    pool = PoolGeometry.of(op, input_shape, kernel_size, stride, padding, dilation, ceil_mode)
    layout = geometry.memory_format(grad, code)
    if fake:
        unpooled = grad.new_empty(pool.input_shape).to(memory_format=layout)
        return unpooled, optional_bias(grad, grad.shape[1], with_bias)
    launchers = launchers_for(backend, op, "backward", pool, grad, layout)
    unpooled, bias = launchers.max_pool2d_backward(grad, code, pool, with_bias)
    return dense(unpooled, layout), absent(grad) if bias is None else bias


@operator(f"max_pool2d_indices(Tensor code, SymInt[] input_shape, {_POOL}) -> Tensor")
def max_pool2d_indices(
    code: Tensor,
    input_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    *,
    fake: bool,
) -> Tensor:
    """torch's int64 indices of the winners, for those who ask for them."""
    if fake:
        return torch.empty_like(code, dtype=torch.int64)
    pool = PoolGeometry.of("max_pool2d", input_shape, kernel_size, stride, padding, dilation, ceil_mode)
    return dense(aten.code_to_indices(code, pool), geometry.memory_format(code))


@operator(f"avg_pool2d(Tensor input, {_POOL}, bool count_include_pad, int? divisor_override, str backend) -> Tensor")
def avg_pool2d(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    backend: str,
    *,
    fake: bool,
) -> Tensor:
    op = "avg_pool2d"
    geometry.check_input(op, input)
    geometry.check_divisor(op, divisor_override)
    pool = PoolGeometry.of(op, input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    layout = geometry.memory_format(input)
    if fake:
        return input.new_empty(pool.output_shape).to(memory_format=layout)
    launchers = launchers_for(backend, op, "forward", pool, input, layout)
    return dense(launchers.avg_pool2d(input, pool, count_include_pad, divisor_override), layout)


@operator(
    f"avg_pool2d_backward(Tensor grad, SymInt[] input_shape, {_POOL}, bool count_include_pad, int? divisor_override, "
    "bool channels_last, str backend) -> Tensor"
)
def avg_pool2d_backward(
    grad: Tensor,
    input_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    channels_last: bool,
    backend: str,
    *,
    fake: bool,
) -> Tensor:
    op = "avg_pool2d"
    pool = PoolGeometry.of(op, input_shape, kernel_size, stride, padding, dilation, ceil_mode)
    layout = _layout(channels_last)
    if fake:
        return grad.new_empty(pool.input_shape).to(memory_format=layout)
    launchers = launchers_for(backend, op, "backward", pool, grad, layout)
    return dense(launchers.avg_pool2d_backward(grad, pool, count_include_pad, divisor_override), layout)


@operator("global_avg_pool2d(Tensor input, str backend) -> Tensor")
def global_avg_pool2d(input: Tensor, backend: str, *, fake: bool) -> Tensor:
    op = "global_avg_pool2d"
    geometry.check_input(op, input)
    g = geometry.global_pool(op, input.shape)
    layout = geometry.memory_format(input)
    if fake:
        return input.new_empty(g.output_shape).to(memory_format=layout)
    return dense(launchers_for(backend, op, "forward", g, input, layout).global_avg_pool2d(input), layout)


@operator("global_avg_pool2d_backward(Tensor grad, SymInt height, SymInt width, bool channels_last, str backend) -> Tensor")
def global_avg_pool2d_backward(
    grad: Tensor, height: int, width: int, channels_last: bool, backend: str, *, fake: bool
) -> Tensor:
    op = "global_avg_pool2d"
    g = geometry.global_pool(op, (*grad.shape[:2], height, width))
    layout = _layout(channels_last)
    if fake:
        return grad.new_empty(g.input_shape).to(memory_format=layout)
    return dense(
        launchers_for(backend, op, "backward", g, grad, layout).global_avg_pool2d_backward(grad, height, width), layout
    )
