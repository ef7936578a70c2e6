"""Batch normalisation with residual, ReLU and max-pool: forward, backward, and the update of running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastconv import geometry
from fastconv.geometry import PoolGeometry
from fastconv.ops.define import absent, dense, given, launchers_for, operator, register_vmap

_OPERANDS = (
    "Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, Tensor? residual, "
    "bool training, float eps"
)
_SAVED = "Tensor? input, Tensor mean, Tensor var, Tensor? weight, bool training, float eps"
_POOL = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"


@operator(f"batch_norm_relu({_OPERANDS}, str backend) -> (Tensor, Tensor, Tensor)")
def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, the batch's mean, its biased variance): the latter two are empty unless `training`."""
    op = "batch_norm_relu"
    geometry.check_batch_norm(op, input, running_mean, running_var, weight, bias, residual, training, eps)
    layout = geometry.memory_format(input)
    if fake:
        return input.new_empty(input.shape).to(memory_format=layout), *_fake_statistics(input, training)
    g = geometry.single_elements(op, input.shape)
    launchers = launchers_for(backend, op, "forward", g, input, layout)
    statistics = _given_statistics(running_mean, running_var, training)
    output, (mean, var) = launchers.batch_norm_relu(input, statistics, weight, bias, residual, eps)
    if not training:
        mean, var = absent(mean), absent(var)
    return dense(output, layout), mean, var


@operator(f"batch_norm_relu_max_pool2d({_OPERANDS}, {_POOL}, str backend) -> (Tensor, Tensor, Tensor, Tensor)")
def batch_norm_relu_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, code, the batch's mean, its biased variance): the latter two are empty unless `training`."""
    op = "batch_norm_relu_max_pool2d"
    geometry.check_batch_norm(op, input, running_mean, running_var, weight, bias, residual, training, eps)
    pool = PoolGeometry.of(op, input.shape, kernel_size, stride, padding, dilation, ceil_mode, "pool_")
    layout = geometry.memory_format(input)
    if fake:
        output = input.new_empty(pool.output_shape).to(memory_format=layout)
        return output, torch.empty_like(output, dtype=pool.code_dtype), *_fake_statistics(input, training)
    launchers = launchers_for(backend, op, "forward", pool, input, layout)
    statistics = _given_statistics(running_mean, running_var, training)
    output, code, (mean, var) = launchers.batch_norm_relu_max_pool2d(input, statistics, weight, bias, residual, eps, pool)
    if not training:
        mean, var = absent(mean), absent(var)
    return dense(output, layout), dense(code, layout), mean, var


def _given_statistics(mean: Tensor | None, var: Tensor | None, training: bool) -> tuple[Tensor, Tensor] | None:
    return None if training or mean is None or var is None else (mean, var)


def _fake_statistics(input: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    dtype = geometry.statistics_dtype(input)
    mean, var = (input.new_empty(input.shape[1] if training else 0, dtype=dtype) for _ in range(2))
    return mean, var


@operator(
    f"batch_norm_relu_backward(Tensor grad, Tensor output, {_SAVED}, bool with_input, bool with_residual, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
def batch_norm_relu_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    with_input: bool,
    with_residual: bool,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(input gradient, [2, C] bias and weight gradient, residual gradient): the second where an input is given.

    Under `training` the input gradient needs the input too.
    """
    op = "batch_norm_relu"
    g = geometry.single_elements(op, grad.shape)
    saved = (grad, output, input, mean, var, weight, eps, training)
    return _backward(op, g, None, saved, with_input, with_residual, backend, fake)


@operator(
    f"batch_norm_relu_max_pool2d_backward(Tensor grad, Tensor code, SymInt[] input_shape, {_SAVED}, {_POOL}, "
    "bool with_input, bool with_residual, str backend) -> (Tensor, Tensor, Tensor)"
)
def batch_norm_relu_max_pool2d_backward(
    grad: Tensor,
    code: Tensor,
    input_shape: Sequence[int],
    input: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    training: bool,
    eps: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    with_input: bool,
    with_residual: bool,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "batch_norm_relu_max_pool2d"
    pool = PoolGeometry.of(op, input_shape, kernel_size, stride, padding, dilation, ceil_mode)
    saved = (grad, code, input, mean, var, weight, eps, training)
    return _backward(op, pool, pool, saved, with_input, with_residual, backend, fake)


_Saved = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, float, bool]


def _backward(
    op: str,
    g: PoolGeometry,
    pool: PoolGeometry | None,
    saved: _Saved,
    with_input: bool,
    with_residual: bool,
    backend: str,
    fake: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, gate, x, mean, var, weight, eps, training = saved
    if training and with_input and x is None:
        raise RuntimeError(f"{op}: backward needs input for its gradient when training=True, got input=None")
    layout = geometry.memory_format(grad, gate, *given(x))
    if fake:
        grad_input, grad_residual = (
            grad.new_empty(g.input_shape).to(memory_format=layout) if wanted else absent(grad)
            for wanted in (with_input, with_residual)
        )
        sums = absent(grad) if x is None else grad.new_empty((2, g.channels), dtype=geometry.statistics_dtype(grad))
        return grad_input, sums, grad_residual
    launchers = launchers_for(backend, op, "backward", g, grad, layout)
    grads = launchers.batch_norm_relu_backward(
        grad, gate, x, (mean, var), weight, eps, training, pool, with_input, with_residual
    )
    grad_x, sums_or_none, residual = grads
    return (
        absent(grad) if grad_x is None else dense(grad_x, layout),
        absent(grad) if sums_or_none is None else sums_or_none,
        absent(grad) if residual is None else dense(residual, layout),
    )


@operator(
    "batch_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, SymInt count, "
    "float momentum, str backend) -> ()"
)
def batch_norm_update(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
    backend: str,
    *,
    fake: bool,
) -> None:
    """running = (1 − momentum) · running + momentum · batch, in place, with the unbiased variance of `count` values."""
    op = "batch_norm_update"
    geometry.check_batch_norm_update(op, running_mean, running_var, mean, var, count)
    if fake:
        return
    g = geometry.single_elements(op, (1, mean.shape[0], 1, 1))
    launchers = launchers_for(backend, op, "forward", g, mean, torch.channels_last)
    launchers.batch_norm_update(running_mean, running_var, mean, var, count, momentum)
    if not (running_mean.is_inference() or running_var.is_inference()):
        torch.autograd.graph.increment_version((running_mean, running_var))


def _batch_norm_update_vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[None, None]:
    """The rule of torch.vmap, which has none of its own for what is changed in place: sample after sample."""
    if None in in_dims[:2]:
        raise RuntimeError(
            "batch_norm_update: running_mean and running_var must be batched by vmap as the input is, since they are "
            "updated in place, a sample each; allowed too: training=False, or None for both"
        )
    for i in range(info.batch_size):
        sample = (t if d is None else t.select(d, i) for t, d in zip(args, in_dims, strict=True))
        torch.ops.fastconv.batch_norm_update.default(*sample)
    return None, None


register_vmap("batch_norm_update", _batch_norm_update_vmap)
