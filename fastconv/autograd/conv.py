"""Functions of the convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastconv.autograd.core import ConvArgs, Grads, PoolArgs, ops, register, run
from fastconv.autograd.pool import unpool
from fastconv.geometry import conv_output_shape, memory_format


def conv_grads(ctx: Any, grad: Tensor, input: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Input and weight gradient of a convolution whose output gradient is `grad`."""
    args: ConvArgs = ctx.conv
    need_input, need_weight = ctx.needs_input_grad[:2]
    grad_input = grad_weight = None
    if torch.is_grad_enabled():
        if need_input:
            grad_input = conv2d_input(ctx.input_shape, weight, grad, *args)
        if need_weight:
            grad_weight = conv2d_weight(input, ctx.weight_shape, grad, *args)
        return grad_input, grad_weight
    if need_input or need_weight:
        shapes = (ctx.input_shape, ctx.weight_shape, ctx.weight_channels_last)
        grad_input, grad_weight = ops.conv2d_backward.default(grad, input, weight, *shapes, *args, ctx.backend)
    return grad_input if need_input else None, grad_weight if need_weight else None


def relu_backward(ctx: Any, grad: Tensor, output: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled():
        masked = grad.masked_fill(output <= 0, 0)
        return masked, masked.sum((0, 2, 3)) if with_bias else None
    masked, bias = ops.relu_backward.default(grad, output, with_bias, ctx.backend)
    return masked, bias if with_bias else None


def _keep_conv(ctx: Any, input: Tensor, weight: Tensor, args: ConvArgs, backend: str, *more: Tensor) -> None:
    """Save what the needed gradients read: the input for the weight's, the weight for the input's, and `more`."""
    need_input, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if need_weight else None, weight if need_input else None, *more)
    ctx.input_shape, ctx.weight_shape = input.shape, weight.shape
    ctx.weight_channels_last = memory_format(weight) == torch.channels_last
    ctx.conv, ctx.backend = args, backend
    ctx.set_materialize_grads(False)


class Conv2d(torch.autograd.Function):
    """conv2d(input, weight, bias)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, args: ConvArgs, backend: str) -> Tensor:
        return run(ops.conv2d.default, input, weight, bias, args, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, args, backend = inputs
        _keep_conv(ctx, input, weight, args, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 5
        input, weight = ctx.saved_tensors
        bias = None
        if ctx.needs_input_grad[2]:
            bias = grad.sum((0, 2, 3)) if torch.is_grad_enabled() else ops.bias_grad.default(grad, ctx.backend)
        return (*conv_grads(ctx, grad, input, weight), bias, None, None)


class Conv2dReLU(torch.autograd.Function):
    """relu(conv2d(input, weight, bias) + residual)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, args: ConvArgs, backend: str
    ) -> Tensor:
        return run(ops.conv2d_relu.default, input, weight, bias, residual, args, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, _, args, backend = inputs
        _keep_conv(ctx, input, weight, args, backend, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 6
        input, weight, output = ctx.saved_tensors
        masked, bias = relu_backward(ctx, grad, output, ctx.needs_input_grad[2])
        residual = masked if ctx.needs_input_grad[3] else None
        return (*conv_grads(ctx, masked, input, weight), bias, residual, None, None)


class Conv2dReLUMaxPool2d(torch.autograd.Function):
    """(max_pool2d(relu(conv2d(input, weight, bias))), code)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, args: ConvArgs, pool: PoolArgs, backend: str
    ) -> tuple[Tensor, Tensor]:
        return run(ops.conv2d_relu_max_pool2d.default, input, weight, bias, args, pool, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, _, args, ctx.pool, backend = inputs
        code = output[1]
        ctx.mark_non_differentiable(code)
        _keep_conv(ctx, input, weight, args, backend, code)
        ctx.unpooled_shape = conv_output_shape(input.shape, weight.shape, *args[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 6
        input, weight, code = ctx.saved_tensors
        unpooled, bias = unpool(ctx, grad, code, ctx.unpooled_shape, ctx.needs_input_grad[2])
        return (*conv_grads(ctx, unpooled, input, weight), bias, None, None, None)


register(Conv2d, "conv2d", lambda x, w, b, *a: (x, w, b, ConvArgs(*a[:4]), a[4]))
register(Conv2dReLU, "conv2d_relu", lambda x, w, b, r, *a: (x, w, b, r, ConvArgs(*a[:4]), a[4]))
register(
    Conv2dReLUMaxPool2d,
    "conv2d_relu_max_pool2d",
    lambda x, w, b, *a: (x, w, b, ConvArgs(*a[:4]), PoolArgs(*a[4:9]), a[9]),
)
