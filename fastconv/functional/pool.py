"""Pools."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv import autograd, backends, geometry
from fastconv.autograd import PoolArgs
from fastconv.functional.core import IntPair, batched_input, overridable, pool_args


@overridable
def relu_max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """ReLU and max-pool in one pass. Equal to `max_pool2d(relu(input), kernel_size, ...)`; arguments as in `max_pool2d`.

    A window without a pixel, which dilation can make of a small map, gives 0 (torch: minus infinity).
    """
    return _max_pool2d("relu_max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode, True)[0]


@overridable
def max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Max-pool. Equal to `torch.nn.functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)`.

    Saved for backward is the winner's position in its window, one byte (four for windows of 255 positions and more),
    not torch's int64 indices. Values and winners are those of torch to the bit, and so are gradients, but for float16 and
    bfloat16 where windows overlap: shares are then added in float32 and rounded once. Backward is deterministic, but for
    overlapping windows that torch itself serves on a GPU (backend 'aten').

    Args:
        input: (N, C, H, W) or (C, H, W).
        kernel_size, stride, dilation: int or pair, 1 and more; stride is kernel_size by default.
        padding: int or pair, minus infinity at each side, at most half of kernel_size.
        ceil_mode: count a last window that is only partly inside.
        return_indices: also return torch's indices into the flattened H · W map.

    Returns:
        (N, C, OH, OW), with `return_indices` a pair of it and an int64 tensor of the same shape.
    """
    output, code, args = _max_pool2d("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode, False)
    if not return_indices:
        return output
    batched = input.dim() == 4
    shape = input.shape if batched else (1, *input.shape)
    indices = torch.ops.fastconv.max_pool2d_indices(code, shape, *args)
    return output, indices if batched else indices.squeeze(0)


@overridable
def avg_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average-pool. Equal to `torch.nn.functional.avg_pool2d` with the same arguments.

    Args:
        input: (N, C, H, W) or (C, H, W).
        kernel_size, stride: int or pair, 1 and more; stride is kernel_size by default.
        padding: int or pair, zeros at each side, at most half of the window.
        ceil_mode: count a last window that is only partly inside.
        count_include_pad: whether padding counts in the divisor.
        divisor_override: the divisor, in the place of the window's size; not 0.

    Returns:
        (N, C, OH, OW).
    """
    op = "avg_pool2d"
    args = pool_args(op, kernel_size, stride, padding, 1, ceil_mode)
    geometry.check_bool(op, "count_include_pad", count_include_pad)
    divisor_override = geometry.check_divisor(op, divisor_override)
    x, batched = batched_input(op, input)
    plain = args.padding == (0, 0) and divisor_override is None and not torch.compiler.is_compiling()
    if plain and tuple(x.shape[2:]) == args.kernel_size:
        output = autograd.call("global_avg_pool2d", x, backends.requested())
    else:
        output = autograd.call("avg_pool2d", x, args, count_include_pad, divisor_override, backends.requested())
    return output if batched else output.squeeze(0)


@overridable
def global_avg_pool2d(input: Tensor) -> Tensor:
    """The mean of each map. Equal to `torch.nn.functional.adaptive_avg_pool2d(input, 1)`.

    Args:
        input: (N, C, H, W) or (C, H, W); the map must not be empty.

    Returns:
        (N, C, 1, 1) or (C, 1, 1), summed in float32 (float64 for float64).

    Source: Lin, Chen & Yan, Network in network, arXiv:1312.4400.
    """
    x, batched = batched_input("global_avg_pool2d", input)
    output = autograd.call("global_avg_pool2d", x, backends.requested())
    return output if batched else output.squeeze(0)


def _max_pool2d(
    op: str,
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None,
    padding: IntPair,
    dilation: IntPair,
    ceil_mode: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, PoolArgs]:
    args = pool_args(op, kernel_size, stride, padding, dilation, ceil_mode)
    x, batched = batched_input(op, input)
    output, code = autograd.call("max_pool2d", x, args, relu, backends.requested())
    return (output if batched else output.squeeze(0)), code, args
