"""torch.nn.functional's convolution and pooling, and the fused ones: same argument names, order and defaults.

Common to all: `input` is (N, C, H, W) or, unbatched, (C, H, W); N may be 0; strides are free. dtypes are float64, float32,
bfloat16 and float16, the same for all operands unless autocast is on, which casts as it does for torch's own. The output
has the input's dtype, and lies channels_last if input or weight does, else contiguous. NaN and infinities propagate as in
torch. First and second derivatives and torch.func transforms work.

All raise TypeError for an argument of the wrong type and RuntimeError for a value that torch refuses too, for a dtype
that is not served, and where the backend named by `fastconv.use_backend` cannot serve the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastconv import autograd, backends, geometry, precision
from fastconv.autograd import ConvArgs, PoolArgs

IntPair = int | Sequence[int]
P = ParamSpec("P")
R = TypeVar("R")

__all__ = [
    "avg_pool2d",
    "conv2d",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "global_avg_pool2d",
    "max_pool2d",
    "relu_max_pool2d",
]


def _overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Hand calls with overriding arguments (torch.fx's proxies, tensor subclasses) to their __torch_function__."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        operands = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function(operands):
            result: R = handle_torch_function(call, operands, *args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call


@_overridable
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with bias. Equal to `torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)`.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (O, C / groups, KH, KW).
        bias: (O,) or None.
        stride, dilation: int or pair, 1 and more.
        padding: int or pair, 0 and more, zeros at each side; 'valid' is 0, 'same' keeps H and W (stride 1 only).
        groups: C and O must be divisible by it.

    Returns:
        (N, O, OH, OW), OH = floor((H + 2 · padding - dilation · (KH - 1) - 1) / stride) + 1.

    Source: Dumoulin & Visin, A guide to convolution arithmetic for deep learning, arXiv:1603.07285.
    """
    op = "conv2d"
    (x, w, b, _), args, batched = _conv_operands(op, input, weight, bias, None, stride, padding, dilation, groups)
    output = autograd.call("conv2d", x, w, b, args, backends.requested())
    return output if batched else output.squeeze(0)


@_overridable
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
    """Convolution, bias, residual and ReLU in one pass. Equal to `relu(conv2d(input, weight, bias, ...) + residual)`.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in `conv2d`.
        residual: exactly the output's shape (it is not broadcast), any floating-point dtype: it is cast to the input's.

    Returns:
        (N, O, OH, OW) in the input's dtype. Backward masks the gradient and sums the bias gradient in one pass.
    """
    op = "conv2d_relu"
    (x, w, b, r), args, batched = _conv_operands(op, input, weight, bias, residual, stride, padding, dilation, groups)
    output = autograd.call("conv2d_relu", x, w, b, r, args, backends.requested())
    return output if batched else output.squeeze(0)


@_overridable
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
    """Convolution, bias, ReLU and max-pool. Equal to `max_pool2d(relu(conv2d(input, weight, bias, ...)), pool_...)`.

    Where a fused kernel serves the shape (2×2 windows with stride 2) the unpooled map never reaches memory. Backward reads
    one code per pooled element (one byte for windows of up to 254 positions): which position won, or that ReLU closed it.
    Of equal maxima the first wins; equality is that of the convolution's accumulator where the pool is fused, and of the
    rounded map where it is not.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in `conv2d`.
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode: as in `max_pool2d`.

    Returns:
        (N, O, PH, PW) in the input's dtype.
    """
    op = "conv2d_relu_max_pool2d"
    pool = _pool_args(op, pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode, prefix="pool_")
    (x, w, b, _), args, batched = _conv_operands(op, input, weight, bias, None, stride, padding, dilation, groups)
    output, _ = autograd.call("conv2d_relu_max_pool2d", x, w, b, args, pool, backends.requested())
    return output if batched else output.squeeze(0)


@_overridable
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


@_overridable
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


@_overridable
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
    args = _pool_args(op, kernel_size, stride, padding, 1, ceil_mode)
    geometry.check_bool(op, "count_include_pad", count_include_pad)
    divisor_override = geometry.check_divisor(op, divisor_override)
    x, batched = _batched(op, input)
    output = autograd.call("avg_pool2d", x, args, count_include_pad, divisor_override, backends.requested())
    return output if batched else output.squeeze(0)


@_overridable
def global_avg_pool2d(input: Tensor) -> Tensor:
    """The mean of each map. Equal to `torch.nn.functional.adaptive_avg_pool2d(input, 1)`.

    Args:
        input: (N, C, H, W) or (C, H, W); the map must not be empty.

    Returns:
        (N, C, 1, 1) or (C, 1, 1), summed in float32 (float64 for float64).

    Source: Lin, Chen & Yan, Network in network, arXiv:1312.4400.
    """
    x, batched = _batched("global_avg_pool2d", input)
    output = autograd.call("global_avg_pool2d", x, backends.requested())
    return output if batched else output.squeeze(0)


def _batched(op: str, input: Tensor) -> tuple[Tensor, bool]:
    geometry.check_input(op, input)
    batched = input.dim() == 4
    return (input if batched else input.unsqueeze(0)), batched


def _conv_operands(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: IntPair,
    padding: str | IntPair,
    dilation: IntPair,
    groups: int,
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], ConvArgs, bool]:
    """The batched and cast operands, the normalised parameters, and whether the input was batched."""
    x, batched = _batched(op, input)
    geometry.check_tensor(op, "weight", weight)
    for name, operand in (("bias", bias), ("residual", residual)):
        if operand is not None:
            geometry.check_tensor(op, name, operand)
    groups = geometry.integer(op, "groups", groups)
    strides, dilations = geometry.pair(op, "stride", stride), geometry.pair(op, "dilation", dilation)
    pads, extra = geometry.conv_padding(op, padding, weight.shape, strides, dilations)
    x, w = (precision.autocast(t) for t in (x, weight))
    b = None if bias is None else precision.autocast(bias)
    if extra != (0, 0):
        x = F.pad(x, (0, extra[1], 0, extra[0]))  # 'same' with an even kernel: one more zero at the far side
    r = residual
    if r is not None:
        geometry.check_floating(op, "residual", r)
        r = (r if batched or r.dim() != 3 else r.unsqueeze(0)).to(x.dtype)
    return (x, w, b, r), ConvArgs(strides, pads, dilations, groups), batched


def _pool_args(
    op: str,
    kernel_size: IntPair,
    stride: IntPair | None,
    padding: IntPair,
    dilation: IntPair,
    ceil_mode: bool,
    prefix: str = "",
) -> PoolArgs:
    kernel = geometry.pair(op, f"{prefix}kernel_size", kernel_size)
    geometry.check_bool(op, f"{prefix}ceil_mode", ceil_mode)
    return PoolArgs(
        kernel,
        kernel if stride is None else geometry.pair(op, f"{prefix}stride", stride, empty=kernel),
        geometry.pair(op, f"{prefix}padding", padding),
        geometry.pair(op, f"{prefix}dilation", dilation),
        ceil_mode,
    )


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
    args = _pool_args(op, kernel_size, stride, padding, dilation, ceil_mode)
    x, batched = _batched(op, input)
    output, code = autograd.call("max_pool2d", x, args, relu, backends.requested())
    return (output if batched else output.squeeze(0)), code, args
