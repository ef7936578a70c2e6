"""Functions of the pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastconv.autograd.core import Grads, PoolArgs, ops, register, run
from fastconv.geometry import memory_format


def unpool(
    grad: Tensor, code: Tensor, shape: Sequence[int], args: PoolArgs, with_bias: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the map that a max-pool (after ReLU or not) has read, and its sum over (N, H, W)."""
    if torch.is_grad_enabled():
        open_grad = grad.masked_fill(code == 0, 0)
        indices = ops.max_pool2d_indices.default(code, shape, *args)
        flat = grad.new_zeros((*shape[:2], shape[2] * shape[3]))
        unpooled = flat.scatter_add(2, indices.flatten(2), open_grad.flatten(2)).view(shape)
        return unpooled, open_grad.sum((0, 2, 3)) if with_bias else None
    unpooled, bias = run(ops.max_pool2d_backward.default, grad, code, shape, args, with_bias, backend)
    return unpooled, bias if with_bias else None


class MaxPool2d(torch.autograd.Function):
    """(max_pool2d(relu(input) if relu else input), code)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, args: PoolArgs, relu: bool, backend: str) -> tuple[Tensor, Tensor]:
        return run(ops.max_pool2d.default, input, args, relu, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, ctx.pool, _, ctx.backend = inputs
        code = output[1]
        ctx.mark_non_differentiable(code)
        ctx.save_for_backward(code)
        ctx.input_shape = input.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 4
        (code,) = ctx.saved_tensors
        return unpool(grad, code, ctx.input_shape, ctx.pool, False, ctx.backend)[0], None, None, None


class AvgPool2d(torch.autograd.Function):
    """avg_pool2d(input, ...)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, args: PoolArgs, count_include_pad: bool, divisor_override: int | None, backend: str
    ) -> Tensor:
        return run(ops.avg_pool2d.default, input, args, count_include_pad, divisor_override, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.pool, ctx.count_include_pad, ctx.divisor_override, ctx.backend = inputs
        ctx.input_shape, ctx.channels_last = input.shape, memory_format(input) == torch.channels_last
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 5
        pool: PoolArgs = ctx.pool
        rule = (ctx.count_include_pad, ctx.divisor_override)
        if torch.is_grad_enabled():
            shape_only = grad.new_empty(ctx.input_shape)
            window = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
            grad_input = torch.ops.aten.avg_pool2d_backward(grad, shape_only, *window, *rule)
        else:
            operands = (grad, ctx.input_shape, pool, *rule, ctx.channels_last, ctx.backend)
            grad_input = run(ops.avg_pool2d_backward.default, *operands)
        return grad_input, None, None, None, None


class GlobalAvgPool2d(torch.autograd.Function):
    """input.mean((2, 3), keepdim=True)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, backend: str) -> Tensor:
        return run(ops.global_avg_pool2d.default, input, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.backend = inputs
        ctx.map_shape, ctx.channels_last = input.shape[2:], memory_format(input) == torch.channels_last
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 2
        height, width = ctx.map_shape
        if torch.is_grad_enabled():
            return (grad / (height * width)).expand(-1, -1, height, width), None
        return run(ops.global_avg_pool2d_backward.default, grad, height, width, ctx.channels_last, ctx.backend), None


register(MaxPool2d, "max_pool2d", lambda x, *a: (x, PoolArgs(*a[:5]), *a[5:]))
register(AvgPool2d, "avg_pool2d", lambda x, *a: (x, PoolArgs(*a[:5]), *a[5:]))
register(GlobalAvgPool2d, "global_avg_pool2d", lambda *a: a)
