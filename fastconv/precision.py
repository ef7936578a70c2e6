"""Which arithmetic a call may use: dtypes, torch's TF32 switch, autocast."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Policy(NamedTuple):
    """What a kernel reads and how it may multiply. Accumulation is always in float32 (float64 for float64).

    Attributes:
        dtype: of input, weight and output.
        tf32: float32 products may round their operands to TF32 (CUDA only).
    """

    dtype: torch.dtype
    tf32: bool = False


def policy(dtype: torch.dtype, device_type: str) -> Policy:
    """The policy in force for operands of `dtype`: TF32 exactly where torch's own convolutions use it.

    Source: torch.backends.cudnn.conv.fp32_precision (and through it torch.backends.cudnn.allow_tf32).
    """
    if device_type != "cuda" or dtype != torch.float32:
        return _policy(dtype, False)
    switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return _policy(dtype, switch.fp32_precision == "tf32")


_policy = cache(Policy)


def autocast(operand: Tensor) -> Tensor:
    """An operand as autocast would hand it to torch's conv2d: floating-point ones but float64 in its dtype."""
    if not torch._C._is_any_autocast_enabled():
        return operand
    device_type = operand.device.type
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return operand
    if not operand.is_floating_point() or operand.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(device_type))
