"""What batch normalisation checks: the operands of a channel each, and when a batch has statistics of its own."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fastconv.geometry.arguments import check_input, check_operand, check_residual

# Operands of a value a channel, in the order in which operators take them.
CHANNEL_OPERANDS = ("running_mean", "running_var", "weight", "bias")


def statistics_dtype(input: Tensor) -> torch.dtype:
    """What statistics are computed and returned in: float32, float64 for float64."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def check_batch_norm(
    op: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """The operands of a batch normalisation.

    Raises:
        ValueError, RuntimeError: where torch.nn.functional.batch_norm and torch.nn.BatchNorm2d raise it, and for an
            operand that has neither the input's dtype nor, with a half-precision input, float32.
    """
    if input.dim() != 4:
        raise ValueError(f"{op}: expected 4D input (got {input.dim()}D input), that is (N, C, H, W)")
    check_input(op, input)
    batch, _, height, width = input.shape
    if training and batch * height * width == 1:
        raise ValueError(
            f"{op}: Expected more than 1 value per channel when training, got input size {tuple(input.shape)}; "
            f"allowed: another batch or map, or training=False"
        )
    if eps < 0 or (training and eps == 0):
        kind = "positive during training" if training else "non-negative"
        raise ValueError(f"{op}: eps must be {kind}, but got eps={eps}")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var must either both be None or neither be None")
    if running_mean is None and not training:
        raise RuntimeError(f"{op}: running_mean and running_var must be defined in evaluation mode (training=False)")
    dtype, device, shape = input.dtype, input.device, input.shape[1:2]
    dtypes = (dtype, statistics_dtype(input))
    for index, operand in enumerate((running_mean, running_var, weight, bias)):
        if operand is None:
            continue
        if operand.shape != shape or operand.dtype not in dtypes or operand.device != device:
            _refuse_channels(op, CHANNEL_OPERANDS[index], operand, input)
    if residual is not None:
        check_operand(op, "residual", residual, input)
        check_residual(op, residual, input.shape)


def check_batch_norm_update(
    op: str, running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int
) -> None:
    """The operands of an update of running statistics: one value a channel each, of `count` values.

    Raises:
        RuntimeError: another shape.
        ValueError: a count of 1, which has no unbiased variance, or less.
    """
    shape = mean.shape
    for name, operand in (("mean", mean), ("running_mean", running_mean), ("running_var", running_var), ("var", var)):
        if operand.dim() != 1 or operand.shape != shape:
            raise RuntimeError(
                f"{op}: {name} must have one value a channel, got {name} of size {list(operand.shape)} "
                f"with a mean of size {list(shape)}"
            )
    if count <= 1:
        raise ValueError(f"{op}: Expected more than 1 value per channel, got count={count}; allowed: 2 and more")


def _refuse_channels(op: str, name: str, operand: Tensor, input: Tensor) -> NoReturn:
    """For an operand that is not one value a channel in the input's dtype or, beside float16 and bfloat16, in float32."""
    channels = input.shape[1]
    if operand.dim() != 1 or operand.shape[0] != channels:
        raise RuntimeError(
            f"{op}: {name} should contain {channels} elements not {operand.numel()}, got {name} of size "
            f"{list(operand.shape)}; allowed: [{channels}], the input's channels"
        )
    if operand.dtype not in (input.dtype, statistics_dtype(input)):
        raise RuntimeError(
            f"{op}: {name} has dtype {operand.dtype} with an input of dtype {input.dtype}; allowed: the input's, "
            f"and torch.float32 with a half-precision input"
        )
    raise RuntimeError(f"{op}: input is on {input.device} but {name} is on {operand.device}; allowed: one device")
