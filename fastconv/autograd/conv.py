"""Functions of the convolutions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastconv.autograd.core import ConvArgs, Grads, PoolArgs, ops, register, run
from fastconv.autograd.pool import unpool
from fastconv.geometry import conv_output_shape, memory_format


class Conv(NamedTuple):
    """What backward has to know of a convolution besides the tensors that it reads."""

    input_shape: torch.Size
    weight_shape: torch.Size
    weight_channels_last: bool
    args: ConvArgs
    backend: str

    @classmethod
    def of(cls, input: Tensor, weight: Tensor, args: ConvArgs, backend: str) -> Conv:
        return cls(input.shape, weight.shape, memory_format(weight) == torch.channels_last, args, backend)


def conv_grads(conv: Conv, grad: Tensor, input: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Input gradient (where a weight is given) and weight gradient (where an input is) for the output's gradient `grad`."""
    grad_input = grad_weight = None
    if torch.is_grad_enabled():
        if weight is not None:
            grad_input = conv2d_input(conv.input_shape, weight, grad, *conv.args)
        if input is not None:
            grad_weight = conv2d_weight(input, conv.weight_shape, grad, *conv.args)
        return grad_input, grad_weight
    if weight is not None or input is not None:
        grad_input, grad_weight = run(ops.conv2d_backward.default, grad, input, weight, *conv)
    return None if weight is None else grad_input, None if input is None else grad_weight


def relu_backward(grad: Tensor, output: Tensor, with_bias: bool, backend: str) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled():
        masked = grad.masked_fill(output <= 0, 0)
        return masked, masked.sum((0, 2, 3)) if with_bias else None
    masked, bias = run(ops.relu_backward.default, grad, output, with_bias, backend)
    return masked, bias if with_bias else None


def relu_weight_grad(
    conv: Conv, grad: Tensor, gate: Tensor, input: Tensor, pool: PoolArgs | None, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias gradient from the gradient behind a layer's ReLU (`gate`: its output) or pool (`gate`: its code)."""
    operands = (grad, gate, input, conv.weight_shape, conv.weight_channels_last, with_bias, conv.args)
    if pool is None:
        weight, bias = run(ops.conv2d_relu_weight_grad.default, *operands, conv.backend)
    else:
        weight, bias = run(ops.conv2d_relu_max_pool2d_weight_grad.default, *operands, pool, conv.backend)
    return weight, bias if with_bias else None


def is_weight_only(input: Tensor | None, weight: Tensor | None) -> bool:
    """Whether, by what was saved, the weight needs a gradient and the input none, and that once."""
    return weight is None and input is not None and not torch.is_grad_enabled()


def _keep_conv(ctx: Any, input: Tensor, weight: Tensor, args: ConvArgs, backend: str, *more: Tensor) -> None:
    """Save what the needed gradients read: the input for the weight's, the weight for the input's, and `more`."""
    need_input, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if need_weight else None, weight if need_input else None, *more)
    ctx.conv = Conv.of(input, weight, args, backend)
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
            backend = ctx.conv.backend
            bias = grad.sum((0, 2, 3)) if torch.is_grad_enabled() else run(ops.bias_grad.default, grad, backend)
        return (*conv_grads(ctx.conv, grad, input, weight), bias, None, None)


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
        if is_weight_only(input, weight) and not ctx.needs_input_grad[3]:
            return (None, *relu_weight_grad(ctx.conv, grad, output, input, None, ctx.needs_input_grad[2]), None, None, None)
        masked, bias = relu_backward(grad, output, ctx.needs_input_grad[2], ctx.conv.backend)
        residual = masked if ctx.needs_input_grad[3] else None
        return (*conv_grads(ctx.conv, masked, input, weight), bias, residual, None, None)


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
        need_bias = ctx.needs_input_grad[2]
        if is_weight_only(input, weight):
            return (None, *relu_weight_grad(ctx.conv, grad, code, input, ctx.pool, need_bias), None, None, None)
        unpooled, bias = unpool(grad, code, ctx.unpooled_shape, ctx.pool, need_bias, ctx.conv.backend)
        return (*conv_grads(ctx.conv, unpooled, input, weight), bias, None, None, None)


def conv2d_prepared(
    x: Tensor,
    weight: Tensor,
    prepared: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    args: ConvArgs,
    relu: bool,
    max_pool: bool,
    backend: str,
) -> Tensor:
    """The operator: it has no derivative, and so no Function."""
    op = ops.conv2d_prepared.default
    if torch.compiler.is_compiling():
        output: Tensor = op(x, weight, prepared, bias, residual, *args, relu, max_pool, backend)
        return output
    output = run(op, x, weight, prepared, bias, residual, args, relu, max_pool, backend)
    return output


register(Conv2d, "conv2d", lambda x, w, b, *a: (x, w, b, ConvArgs(*a[:4]), a[4]))
register(Conv2dReLU, "conv2d_relu", lambda x, w, b, r, *a: (x, w, b, r, ConvArgs(*a[:4]), a[4]))
register(
    Conv2dReLUMaxPool2d,
    "conv2d_relu_max_pool2d",
    lambda x, w, b, *a: (x, w, b, ConvArgs(*a[:4]), PoolArgs(*a[4:9]), a[9]),
)
