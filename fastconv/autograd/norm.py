"""Functions of batch normalisation with residual, ReLU and max-pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv.autograd.core import Grads, PoolArgs, ops, register, run
from fastconv.autograd.pool import unpool


def batch_norm_update(*args: Any) -> None:
    """The operator of that name, which has no gradient; past the dispatcher where nobody listens there."""
    with torch.no_grad():
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            ops.batch_norm_update.default(*args)
        else:
            run(ops.batch_norm_update.default, *args)


def _keep(ctx: Any, inputs: tuple[Any, ...], statistics: tuple[Tensor, Tensor], gate: Tensor) -> None:
    """Save the statistics, `gate` (output or code), and the input where a gradient reads it."""
    input, running_mean, running_var, weight, bias, _, ctx.training, ctx.eps = inputs[:8]
    need_input, _, _, need_weight, need_bias, _ = ctx.needs_input_grad[:6]
    ctx.mark_non_differentiable(*statistics)
    mean, var = statistics if ctx.training else (running_mean, running_var)
    with_sums = need_weight or need_bias or (need_input and ctx.training)
    ctx.save_for_backward(input if with_sums else None, mean, var, weight, gate)
    ctx.input_shape = input.shape
    ctx.weight_dtype, ctx.bias_dtype = (None if t is None else t.dtype for t in (weight, bias))
    ctx.backend = inputs[-1]
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, grad_input: Tensor | None, sums: Tensor | None, grad_residual: Tensor | None) -> Grads:
    """The gradients of the six operands; `sums` are the bias's and the weight's."""
    need_input, _, _, need_weight, need_bias, need_residual = ctx.needs_input_grad[:6]
    return (
        grad_input if need_input else None,
        *(None, None),
        sums[1].to(ctx.weight_dtype) if sums is not None and need_weight else None,
        sums[0].to(ctx.bias_dtype) if sums is not None and need_bias else None,
        grad_residual if need_residual else None,
    )


def _recorded(ctx: Any, closed: Tensor, input: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None) -> Grads:
    """The gradients in differentiable torch ops, `closed` being that behind residual, ReLU and pool."""
    grad = closed.to(torch.promote_types(closed.dtype, torch.float32))
    sums = normalised = None
    if input is not None:
        x = input.to(grad.dtype)
        if ctx.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)  # as functions of the input
        normalised = (x - mean.view(-1, 1, 1)) * (var + ctx.eps).rsqrt().view(-1, 1, 1)
        sums = torch.stack((grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))))
    scale = (var.to(grad.dtype) + ctx.eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    if ctx.training and sums is not None and normalised is not None:
        count = max(grad.numel() // grad.shape[1], 1)
        grad_mean, slope = (sums / count)[..., None, None].unbind()
        grad = grad - grad_mean - normalised * slope
    return _grads(ctx, (grad * scale.view(-1, 1, 1)).to(closed.dtype), sums, closed)


class BatchNormReLU(torch.autograd.Function):
    """(relu(batch_norm(input) + residual), the batch's mean and biased variance)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        training: bool,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        operands = (input, running_mean, running_var, weight, bias, residual)
        return run(ops.batch_norm_relu.default, *operands, training, eps, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _keep(ctx, inputs, output[1:], output[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 9
        input, mean, var, weight, output = ctx.saved_tensors
        if torch.is_grad_enabled():
            closed = grad.masked_fill(output <= 0, 0)
            return *_recorded(ctx, closed, input, mean, var, weight), None, None, None
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[5])
        saved = (input, mean, var, weight, ctx.training, ctx.eps)
        operands = (grad, output, *saved, *wanted, ctx.backend)
        grad_input, sums, grad_residual = run(ops.batch_norm_relu_backward.default, *operands)
        return *_grads(ctx, grad_input, sums, grad_residual), None, None, None


class BatchNormReLUMaxPool2d(torch.autograd.Function):
    """(max_pool2d(relu(batch_norm(input) + residual)), code, the batch's mean and biased variance)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        training: bool,
        eps: float,
        pool: PoolArgs,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        operands = (input, running_mean, running_var, weight, bias, residual)
        return run(ops.batch_norm_relu_max_pool2d.default, *operands, training, eps, pool, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        code, mean, var = output[1:]
        _keep(ctx, inputs, (mean, var), code)
        ctx.mark_non_differentiable(code, mean, var)
        ctx.pool = inputs[8]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 10
        input, mean, var, weight, code = ctx.saved_tensors
        if torch.is_grad_enabled():
            closed, _no_bias = unpool(grad, code, ctx.input_shape, ctx.pool, False, ctx.backend)
            return *_recorded(ctx, closed, input, mean, var, weight), None, None, None, None
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[5])
        saved = (ctx.input_shape, input, mean, var, weight, ctx.training, ctx.eps)
        grad_input, sums, grad_residual = run(
            ops.batch_norm_relu_max_pool2d_backward.default, grad, code, *saved, ctx.pool, *wanted, ctx.backend
        )
        return *_grads(ctx, grad_input, sums, grad_residual), None, None, None, None


register(BatchNormReLU, "batch_norm_relu", lambda *a: a)
register(BatchNormReLUMaxPool2d, "batch_norm_relu_max_pool2d", lambda *a: (*a[:8], PoolArgs(*a[8:13]), a[13]))
