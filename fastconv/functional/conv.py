"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastconv import autograd, backends, geometry, precision
from fastconv.autograd import ChainLayer, ConvArgs, PoolArgs
from fastconv.functional.core import IntPair, batched_input, overridable, pool_args


@overridable
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


@overridable
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


@overridable
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
    pool = pool_args(op, pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode, prefix="pool_")
    (x, w, b, _), args, batched = _conv_operands(op, input, weight, bias, None, stride, padding, dilation, groups)
    output, _ = autograd.call("conv2d_relu_max_pool2d", x, w, b, args, pool, backends.requested())
    return output if batched else output.squeeze(0)


def prepare_conv2d(weight: Tensor, stride: IntPair = 1, dilation: IntPair = 1, groups: int = 1) -> Tensor | None:
    """What `conv2d_prepared` can be spared of a weight, None where that is nothing.

    On a CPU: the transform of a 3×3 weight (stride 1, dilation 1, one group, up to 16,384 pairs of channels) for Winograd's
    algorithm, float32, four times as many elements as the weight has, laid out for the instruction set of this process. It
    holds the weight's values of now: later changes of the weight do not show in it.
    """
    op = "prepare_conv2d"
    geometry.check_tensor(op, "weight", weight)
    strides, dilations = geometry.pair(op, "stride", stride), geometry.pair(op, "dilation", dilation)
    return backends.prepare_conv2d(weight.detach(), strides, dilations, geometry.integer(op, "groups", groups))


def conv2d_prepared(
    input: Tensor,
    weight: Tensor,
    prepared: Tensor | None,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    max_pool: bool = False,
) -> Tensor:
    """`conv2d`, `conv2d_relu` where `relu`, or `conv2d_relu_max_pool2d` of 2×2 windows where `max_pool`; inference only.

    Where autocast casts the weight, `prepared` is not used: it belongs to the weight as it was.

    Args:
        input, weight, bias, stride, padding, dilation, groups, residual: as in `conv2d_relu`.
        prepared: `prepare_conv2d` of this weight, which may be None.
        relu: has to be true where there is a residual or a pool.
        max_pool: excludes a residual.

    Raises:
        RuntimeError: an operand requires a gradient while gradients are recorded; relu or max_pool does not fit.
    """
    op = "conv2d_prepared"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias, residual)):
        raise RuntimeError(f"{op}: it has no derivative: call it under torch.no_grad() or torch.inference_mode()")
    if (max_pool or residual is not None) and not relu:
        raise RuntimeError(f"{op}: relu must be True with a residual or a max_pool, got relu={relu}")
    if max_pool and residual is not None:
        raise RuntimeError(f"{op}: a residual is not served with max_pool=True")
    cast = precision.autocast(weight)
    if prepared is None or cast is not weight:
        layer = (input, cast, bias, stride, padding, dilation, groups)
        if max_pool:
            return conv2d_relu_max_pool2d(*layer, pool_kernel_size=2)
        return conv2d_relu(*layer, residual=residual) if relu else conv2d(*layer)
    (x, w, b, r), args, batched = _conv_operands(op, input, weight, bias, residual, stride, padding, dilation, groups)
    output = autograd.conv2d_prepared(x, w, prepared, b, r, args, relu, max_pool, backends.requested())
    return output if batched else output.squeeze(0)


class ConvLayer(NamedTuple):
    """A layer of `conv_chain`: the arguments of `conv2d_relu_max_pool2d`, or without a pool_kernel_size of `conv2d_relu`."""

    weight: Tensor
    bias: Tensor | None = None
    stride: IntPair = 1
    padding: str | IntPair = 0
    dilation: IntPair = 1
    groups: int = 1
    pool_kernel_size: IntPair | None = None
    pool_stride: IntPair | None = None
    pool_padding: IntPair = 0
    pool_dilation: IntPair = 1
    pool_ceil_mode: bool = False


def conv_chain(input: Tensor, layers: Sequence[ConvLayer]) -> Tensor:
    """Layers of convolution, ReLU and, where asked for, max-pool, each on the output of the one before.

    Equal to `conv2d_relu` or `conv2d_relu_max_pool2d` of each layer in turn. As nothing else reads what lies between two
    layers, backward masks the gradient and sums the bias gradient of a layer where the input gradient of the one above
    is computed. Saved are each layer's input and the codes of the pools, and of the last layer without a pool the output.

    Args:
        input: (N, C, H, W) or (C, H, W).
        layers: any number of them, in a sequence.

    Returns:
        The last layer's output in the input's dtype; without a layer the input itself.

    Raises:
        TypeError, RuntimeError: as `conv2d_relu` and `conv2d_relu_max_pool2d` do, for any layer before the first one runs.
    """
    op = "conv_chain"
    if not isinstance(layers, Sequence):
        raise TypeError(f"{op}: layers must be a sequence of ConvLayer, got {type(layers).__name__}")
    for layer in layers:
        if not isinstance(layer, ConvLayer):
            raise TypeError(f"{op}: layers must be a sequence of ConvLayer, got one of type {type(layer).__name__}")
    operands = (input, *(tensor for layer in layers for tensor in layer[:2]))
    if has_torch_function(operands):
        result: Tensor = handle_torch_function(conv_chain, operands, input, layers)
        return result
    x, batched = batched_input(op, input)
    if not layers:
        return input
    x = precision.autocast(x)
    shape: Sequence[int] = x.shape
    tracing = torch.compiler.is_compiling()  # runs nothing, and its operators check the shapes
    runs: list[tuple[tuple[int, int], list[ChainLayer]]] = []  # each of what is padded before it, and its layers
    for i, layer in enumerate(layers):
        op = _names(i)
        w, b, args, extra = _conv_parameters(op, *layer[:6])
        pool = None
        if layer.pool_kernel_size is not None:
            pool = pool_args(op, layer.pool_kernel_size, *layer[7:], prefix="pool_")
        if i == 0 or extra != (0, 0):
            runs.append((extra, []))
        runs[-1][1].append(ChainLayer(w, b, args, pool))
        if not tracing:
            shape = _output_shape(op, x, shape, extra, w, b, args, pool)
    for extra, run in runs:
        x = autograd.call_chain(x if extra == (0, 0) else _pad_far(x, extra), run, backends.requested())
    return x if batched else x.squeeze(0)


@lru_cache
def _names(index: int) -> str:
    return f"conv_chain: layers[{index}]"


def _output_shape(
    op: str,
    input: Tensor,
    shape: Sequence[int],
    extra: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    args: ConvArgs,
    pool: PoolArgs | None,
) -> Sequence[int]:
    """The shape of a layer's output, checked before any layer runs: `input` is the chain's, `shape` the layer's input's."""
    dtype, device = input.dtype, input.device
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and (operand.dtype != dtype or operand.device != device):
            geometry.check_operand(op, name, operand, input)
    if extra != (0, 0):
        shape = (*shape[:2], shape[2] + extra[0], shape[3] + extra[1])
    g = geometry.ConvGeometry.of(op, shape, weight.shape, None if bias is None else bias.shape, *args)
    return g.output_shape if pool is None else geometry.PoolGeometry.of(op, g.output_shape, *pool, "pool_").output_shape


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
    x, batched = batched_input(op, input)
    w, b, args, extra = _conv_parameters(op, weight, bias, stride, padding, dilation, groups)
    x = precision.autocast(x)
    if extra != (0, 0):
        x = _pad_far(x, extra)
    r = residual
    if r is not None:
        geometry.check_tensor(op, "residual", r)
        geometry.check_floating(op, "residual", r)
        r = (r if batched or r.dim() != 3 else r.unsqueeze(0)).to(x.dtype)
    return (x, w, b, r), args, batched


def _conv_parameters(
    op: str,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntPair,
    padding: str | IntPair,
    dilation: IntPair,
    groups: int,
) -> tuple[Tensor, Tensor | None, ConvArgs, tuple[int, int]]:
    """The cast weight and bias, the normalised parameters, and the rows and columns that 'same' adds at the far side."""
    geometry.check_tensor(op, "weight", weight)
    if bias is not None:
        geometry.check_tensor(op, "bias", bias)
    groups = geometry.integer(op, "groups", groups)
    strides, dilations = geometry.pair(op, "stride", stride), geometry.pair(op, "dilation", dilation)
    pads, extra = geometry.conv_padding(op, padding, weight.shape, strides, dilations)
    b = None if bias is None else precision.autocast(bias)
    return precision.autocast(weight), b, ConvArgs(strides, pads, dilations, groups), extra


def _pad_far(x: Tensor, extra: tuple[int, int]) -> Tensor:
    """With zeros for 'same' with an even kernel, which the convolution's own padding cannot give to one side only."""
    return F.pad(x, (0, extra[1], 0, extra[0]))
