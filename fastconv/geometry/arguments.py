"""What an argument may be: normalisation and checks that need no geometry."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CACHE_SIZE = 4096


def pair(op: str, name: str, value: int | Sequence[int], *, empty: tuple[int, int] | None = None) -> tuple[int, int]:
    """An int or a sequence of one or two ints as (height, width); `empty` is what an empty sequence stands for."""
    if type(value) is int:
        return (value, value)
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return (value, value)
    try:
        items = tuple(map(_index, value if isinstance(value, Sequence) else (value,)))
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int or a pair of ints, got {name}={value!r}") from None
    if len(items) == 0 and empty is not None:
        return empty
    if len(items) not in (1, 2):
        raise RuntimeError(f"{op}: {name} must either be a single int, or a tuple of two ints, got {name}={value!r}")
    return (items[0], items[-1])


def integer(op: str, name: str, value: Any) -> int:
    try:
        return _index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be int, got {name}={value!r} of type {type(value).__name__}") from None


def number(op: str, name: str, value: Any) -> float:
    """A real number of any kind (numpy's, a 0-d tensor, a symbolic one) but bool."""
    if isinstance(value, (float, torch.SymFloat)):
        return cast(float, value)
    if isinstance(value, (bool, str)):
        raise TypeError(f"{op}: {name} must be float, got {name}={value!r} of type {type(value).__name__}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be float, got {name}={value!r} of type {type(value).__name__}") from None


def _index(value: Any) -> Any:
    """`value` if it is an integer of any kind (numpy's, a 0-d tensor of integers, a symbolic one) but bool."""
    if isinstance(value, bool):
        raise TypeError
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def check_bool(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be bool, got {name}={value!r} of type {type(value).__name__}")


_STRIDED = torch.strided


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.layout is not _STRIDED or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise RuntimeError(f"{op}: {name} must be a dense strided tensor, got layout {layout}")


def check_input(op: str, input: Tensor) -> None:
    """The input of any operator: a floating-point tensor, batched or not."""
    check_tensor(op, "input", input)
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"{op}: Expected 3D (unbatched, (C, H, W)) or 4D (batch mode, (N, C, H, W)) tensor for input, "
            f"but got input of size {list(input.shape)}"
        )
    if input.dtype not in DTYPES:
        raise RuntimeError(f"{op}: input has dtype {input.dtype}; allowed: {', '.join(map(str, DTYPES))}")


def check_operand(op: str, name: str, value: Tensor | None, input: Tensor) -> None:
    """Another tensor of the same operator: where and what `input` is."""
    if value is None:
        return
    check_tensor(op, name, value)
    if value.dtype != input.dtype:
        raise RuntimeError(
            f"{op}: Input type ({input.dtype}) and {name} type ({value.dtype}) should be the same; "
            f"cast one, or run under autocast"
        )
    if value.device != input.device:
        raise RuntimeError(f"{op}: input is on {input.device} but {name} is on {value.device}; allowed: one device")


def check_floating(op: str, name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise RuntimeError(f"{op}: {name} must have a floating-point dtype, got {name} of dtype {value.dtype}")


def check_residual(op: str, residual: Tensor | None, shape: Sequence[int]) -> None:
    """A residual has exactly the output's shape; broadcasting it would hide a mistake and cost a second kernel."""
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise RuntimeError(
            f"{op}: residual must have exactly the output's shape {list(shape)}, got residual of size {list(residual.shape)}"
        )


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """torch's rule for outputs: channels_last if any operand's strides are, else contiguous."""
    for tensor in tensors:
        if _strides_like_channels_last(tensor):
            return torch.channels_last
    return torch.contiguous_format


def _strides_like_channels_last(tensor: Tensor) -> bool:
    """As c10::is_channels_last_strides_2d: ambiguous strides (N111 and the like) count as contiguous."""
    if tensor.dim() != 4:
        return False
    shape = tensor.shape
    strides = tensor.stride()
    if 1 not in shape and 0 not in shape:  # the ordinary case; is_contiguous would not answer for channels_last under vmap
        _, c, h, w = shape
        if strides == (h * w * c, 1, w * c, c):
            return True
        if strides == (c * h * w, h * w, w, 1):
            return False
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if shape[d] == 0 or strides[d] < least:
            return False
        if d == 0 and least == strides[1]:
            return False
        least = strides[d] * shape[d]
    return True


def check_divisor(op: str, divisor_override: int | None) -> int | None:
    if divisor_override is None:
        return None
    divisor_override = integer(op, "divisor_override", divisor_override)
    if divisor_override == 0:
        raise RuntimeError(f"{op}: divisor must be not zero, got divisor_override=0; allowed: None or another int")
    return divisor_override
