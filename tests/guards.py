"""Guard bands: native kernels get tensors that lie, misaligned, inside of larger buffers, and may touch nothing around."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastconv import tuning
from fastconv.backends import native_library
from fastconv.tuning import cpu

_BAND = 1024  # elements on either side
_LINE = 64  # bytes: what memory for tensors is aligned to


class guarded(TorchDispatchMode):
    """A block in which every tensor that a native kernel gets is replaced, for that call, by a copy between guard bands.

    Copies have the original's strides, start one element behind a multiple of 64 bytes, and one original has one copy, so
    that kernels which work in place do so. Bands hold NaN (bytes of ones), which shows in what was computed from it; under
    the address sanitizer reading one is an error. Behind the kernel, bands and operands that its schema does not name as
    outputs must be as they were.

    Attributes:
        seen: names of the kernels that ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != native_library.namespace:
            return func(*args, **(kwargs or {}))
        assert not kwargs, f"{func}: operands by name are not guarded"
        name = func._schema.name.partition("::")[2]
        self.seen.add(name)
        written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
        bands: dict[tuple[object, ...], _Bands] = {}
        for arg, is_output in zip(args, written, strict=False):
            if isinstance(arg, Tensor) and arg.numel() > 0:
                key = _place(arg)
                bands.setdefault(key, _Bands(arg)).is_output |= is_output
        operands = [bands[_place(a)].inner if isinstance(a, Tensor) and a.numel() > 0 else a for a in args]
        _each(_poison, bands.values())
        try:
            result = func(*operands)
        finally:
            _each(_unpoison, bands.values())
        for number, guard in enumerate(bands.values()):
            guard.check(f"{name}, tensor {number} of {tuple(guard.original.shape)}")
        return result


def _place(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


class _Bands:
    """A copy of `original`, `inner`, and the buffer around it."""

    def __init__(self, original: Tensor) -> None:
        self.original, self.is_output = original, False
        size = original.element_size()
        self.numel = 1 + sum((n - 1) * stride for n, stride in zip(original.shape, original.stride(), strict=True))
        self.buffer = torch.empty(2 * _BAND + _LINE + self.numel, dtype=original.dtype, device=original.device)
        self._bytes = self.buffer.view(torch.uint8)
        self._bytes.fill_(255)
        self.first = _BAND + (size - self.buffer.data_ptr() - _BAND * size) % _LINE // size
        self.inner = self.buffer.as_strided(original.shape, original.stride(), self.first)
        assert self.inner.data_ptr() % _LINE == size % _LINE
        self.inner.copy_(original)
        self._before = self._bytes.clone()

    def sides(self) -> tuple[Tensor, Tensor]:
        size = self.buffer.element_size()
        return self._bytes[: self.first * size], self._bytes[(self.first + self.numel) * size :]

    def check(self, what: str) -> None:
        """Bands, and what is no output, hold what they held; outputs go to where they belong."""
        changed = (self._bytes != self._before).nonzero().flatten() // self.buffer.element_size() - self.first
        outside = changed[(changed < 0) | (changed >= self.numel)]
        assert len(outside) == 0, f"{what}: written outside, from element {outside[0]} to {outside[-1]} of {self.numel}"
        if self.is_output:
            self.original.copy_(self.inner)
        else:
            assert len(changed) == 0, f"{what}: an input was written to, at element {changed[0]} of {self.numel}"


@contextlib.contextmanager
def transforming() -> Iterator[None]:
    """A block in which Winograd's transforms are chosen wherever they can serve, also where they would not pay."""
    operations, has_amx = cpu._winograd_operations, cpu._has_amx
    cpu._winograd_operations = lambda direction, g: 0.0
    cpu._has_amx = lambda: False
    tuning.forget()
    try:
        yield
    finally:
        cpu._winograd_operations, cpu._has_amx = operations, has_amx
        tuning.forget()


def _sanitizer(name: str) -> Callable[[int, int], None] | None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), None
    return function  # type: ignore[no-any-return]


_poison = _sanitizer("__asan_poison_memory_region")
_unpoison = _sanitizer("__asan_unpoison_memory_region")


def _each(function: Callable[[int, int], None] | None, bands: Iterable[_Bands]) -> None:
    if function is not None:
        for guard in bands:
            for side in guard.sides():
                function(side.data_ptr(), side.numel())
