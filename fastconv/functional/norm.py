"""Batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv import autograd, backends, geometry
from fastconv.functional.core import IntPair, overridable, pool_args


@overridable
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
    """Batch normalisation, residual and ReLU. Equal to `relu(batch_norm(input, running_mean, ...) + residual)`.

    Statistics are computed in float32 (float64 for float64). Our kernels sum distances to a value near the mean, so that a
    mean far from 0 costs no digits of the variance; where torch serves, statistics are its own and as exact as those.

    Args:
        input: (N, C, H, W).
        running_mean, running_var: (C,). Read unless `training`, else updated in place where they are given.
        weight, bias: (C,) or None. These four are of the input's dtype or, beside float16 and bfloat16, of float32.
        training: normalise by the batch's own statistics.
        momentum: share of the batch's statistics in the running ones.
        eps: added to the variance.
        residual: exactly the input's shape (it is not broadcast), any floating-point dtype: it is cast to the input's.

    Returns:
        (N, C, H, W) in the input's dtype, which autocast leaves as it is.

    Raises:
        ValueError: unbatched input, a single value per channel or eps=0 when training, eps < 0, one running statistic
            without the other.
        RuntimeError: a running statistic that requires a gradient (F.batch_norm refuses it too).

    Source: Ioffe & Szegedy, Batch normalization, arXiv:1502.03167.
    """
    op = "batch_norm_relu"
    operands = _operands(op, input, running_mean, running_var, weight, bias, residual)
    momentum, eps = _settings(op, training, momentum, eps)
    request = backends.requested()
    output, mean, var = autograd.call(op, *operands, training, eps, request)
    if training:
        _update(input, running_mean, running_var, mean, var, momentum, request)
    return output


@overridable
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
    """Batch normalisation, residual, ReLU and max-pool. Equal to `max_pool2d(batch_norm_relu(input, ...), pool_...)`.

    Where a fused kernel serves the shape (2×2 windows with stride 2) the unpooled map never reaches memory; backward reads
    one code per pooled element, as that of `conv2d_relu_max_pool2d` does. Of equal maxima the first wins; equality is that
    of float32 where the pool is fused, and of the rounded map where it is not.

    Args:
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual: as in `batch_norm_relu`.
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode: as in `max_pool2d`.

    Returns:
        (N, C, PH, PW) in the input's dtype.
    """
    op = "batch_norm_relu_max_pool2d"
    pool = pool_args(op, pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode, prefix="pool_")
    operands = _operands(op, input, running_mean, running_var, weight, bias, residual)
    momentum, eps = _settings(op, training, momentum, eps)
    request = backends.requested()
    output, _, mean, var = autograd.call(op, *operands, training, eps, pool, request)
    if training:
        _update(input, running_mean, running_var, mean, var, momentum, request)
    return output


_OTHERS = (*geometry.CHANNEL_OPERANDS, "residual")
_STATISTICS = ("running_mean", "running_var")


def _operands(op: str, input: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands as the operators take them; what they hold is checked there."""
    geometry.check_tensor(op, "input", input)
    for name, operand in zip(_OTHERS, others, strict=True):
        if operand is None:
            continue
        geometry.check_tensor(op, name, operand)
        if name in _STATISTICS and operand.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: {name} must not require a gradient, since there is none with respect to it; "
                f"got {name} with requires_grad=True; allowed: {name}.detach()"
            )
    *channels, residual = others
    if residual is not None:
        geometry.check_floating(op, "residual", residual)
        residual = residual.to(input.dtype)
    return (input, *channels, residual)


def _settings(op: str, training: bool, momentum: float, eps: float) -> tuple[float, float]:
    geometry.check_bool(op, "training", training)
    if type(momentum) is float and type(eps) is float:
        return momentum, eps
    return geometry.number(op, "momentum", momentum), geometry.number(op, "eps", eps)


def _update(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    backend: str,
) -> None:
    """Move the running statistics towards the batch's; an empty batch has none."""
    if running_mean is None or input.shape[0] == 0:
        return
    count = input.shape[0] * input.shape[2] * input.shape[3]
    autograd.batch_norm_update(running_mean, running_var, mean, var, count, momentum, backend)
