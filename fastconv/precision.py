"""Which arithmetic a call may use: dtypes, `set_precision`, torch's TF32 switch, autocast.

`get_precision()` is one setting of the process, as torch's TF32 switches are, and like them it is read when an operator
runs: in a backward, the one in force then.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRECISIONS = ("fast", "ieee")


class Policy(NamedTuple):
    """What a kernel reads and how it may multiply. Accumulation is always in float32 (float64 for float64).

    Attributes:
        dtype: of input, weight and output.
        tf32: float32 products may round their operands to TF32 (CUDA only).
        direct: products are summed as they are: no transforms such as Winograd's, no TF32.
    """

    dtype: torch.dtype
    tf32: bool = False
    direct: bool = False


def policy(dtype: torch.dtype, device_type: str) -> Policy:
    """The policy in force for operands of `dtype`: direct under 'ieee', else TF32 exactly where torch's convolutions use it.

    Source: torch.backends.cudnn.conv.fp32_precision (and through it torch.backends.cudnn.allow_tf32).
    """
    if _precision == "ieee":
        return _policy(dtype, False, True)
    if device_type != "cuda" or dtype != torch.float32:
        return _policy(dtype)
    return _policy(dtype, _torchs_switch(device_type).fp32_precision == "tf32")


_policy = cache(Policy)
_precision = "fast"


def get_precision() -> str:
    """The precision in force: 'fast' or 'ieee'."""
    return _precision


class set_precision:
    """Say how products may be formed, from now on or for the length of a `with` block.

    Args:
        mode: 'fast' (the default) or 'ieee'.
            'fast': convolutions may regroup products by Winograd's transforms where the error measured against float64, as a
            relative norm, stays within 1e-5 in float32. On a GPU float32 operands are rounded to TF32 exactly where torch's
            own switch, torch.backends.cudnn.conv.fp32_precision, allows it.
            'ieee': products are summed as the definition of a convolution has them, never in TF32, whatever torch's switches
            say; oneDNN's float32 convolutions then use no smaller dtype either. Which algorithm cuDNN takes for a
            convolution that is left to torch is cuDNN's choice.

    It is one setting for all threads of a process; other processes begin with 'fast'. It is read when an operator runs: a
    backward uses what is in force then, not what its forward used, and compiled programs need not be compiled anew.

    Raises:
        ValueError: `mode` is neither.

    Example:
        >>> fastconv.set_precision("ieee")          # doctest: +SKIP
        >>> with fastconv.set_precision("ieee"):    # doctest: +SKIP
        ...     y = fastconv.functional.conv2d_relu(x, weight)
    """

    def __init__(self, mode: str) -> None:
        global _precision
        if mode not in PRECISIONS:
            raise ValueError(f"set_precision: mode must be one of {', '.join(map(repr, PRECISIONS))}, got {mode!r}")
        self._mode = mode
        self._before: list[str] = []  # what each block entered goes back to
        self._replaced: str | None = _precision  # by this call, until a block is entered
        _precision = mode

    def __enter__(self) -> set_precision:
        global _precision
        in_force = _precision == self._mode
        self._before.append(self._replaced if in_force and self._replaced is not None else _precision)
        self._replaced = None
        _precision = self._mode
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _precision
        _precision = self._before.pop()


def _torchs_switch(device_type: str) -> Any:
    backend = torch.backends.cudnn if device_type == "cuda" else torch.backends.mkldnn
    return backend.conv


_UNCHANGED = contextlib.nullcontext()


def torchs_convolution(policy: Policy, device_type: str) -> contextlib.AbstractContextManager[None]:
    """A block in which torch's own convolutions follow `policy`: where it is direct, their switch for float32 is off.

    torch takes no such wish with a call, for gradients at least, and its switch is one for all threads.
    """
    if not policy.direct or device_type not in _inside:
        return _UNCHANGED
    return _switched_off(device_type)


_EXACT = ("ieee", "none")
_lock = threading.Lock()
_inside = {"cpu": 0, "cuda": 0}  # blocks entered and not yet left, in all threads
_outside: dict[str, str] = {}  # what torch's switch was before the first of them


@contextlib.contextmanager
def _switched_off(device_type: str) -> Iterator[None]:
    switch = _torchs_switch(device_type)
    with _lock:
        if _inside[device_type] == 0:
            _outside[device_type] = switch.fp32_precision
            if _outside[device_type] not in _EXACT:
                switch.fp32_precision = "ieee"
        _inside[device_type] += 1
    try:
        yield
    finally:
        with _lock:
            _inside[device_type] -= 1
            if _inside[device_type] == 0 and _outside[device_type] not in _EXACT:
                switch.fp32_precision = _outside[device_type]


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
