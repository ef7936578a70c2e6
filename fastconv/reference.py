"""The oracle: every functional in plain torch, read by tests, benchmarks and the README alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

IntPair = int | tuple[int, ...]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return F.relu(output if residual is None else output + residual.to(output.dtype))


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    pool_kernel_size: IntPair = 2,
    pool_stride: IntPair | None = None,
    pool_padding: IntPair = 0,
    pool_dilation: IntPair = 1,
    pool_ceil_mode: bool = False,
) -> Tensor:
    output = F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    return F.max_pool2d(output, pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode)


def conv_chain(input: Tensor, layers: Sequence[tuple[Any, ...]]) -> Tensor:
    """`layers` as functional.ConvLayer has them: weight to groups, and max_pool2d's arguments or None for the window."""
    for layer in layers:
        input = F.relu(F.conv2d(input, *layer[:6]))
        if layer[6] is not None:
            input = F.max_pool2d(input, *layer[6:])
    return input


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.relu(output if residual is None else output + residual.to(output.dtype))


def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    pool_kernel_size: IntPair = 2,
    pool_stride: IntPair | None = None,
    pool_padding: IntPair = 0,
    pool_dilation: IntPair = 1,
    pool_ceil_mode: bool = False,
) -> Tensor:
    output = batch_norm_relu(input, running_mean, running_var, weight, bias, training, momentum, eps, residual=residual)
    return F.max_pool2d(output, pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode)


def relu_max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    return F.max_pool2d(F.relu(input), kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if return_indices:
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def avg_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def global_avg_pool2d(input: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(input, 1)
