"""How an operator is defined: schema, implementation and fake from one function, and the way to its backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastconv import backends
from fastconv.backends import Launchers
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import policy

# What each operator does with plain tensors, for those who may go past the dispatcher.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}

_library = torch.library.Library("fastconv", "DEF")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator whose function, given `fake=True`, allocates its outputs and computes nothing."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def implementation(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):  # operands are cast already: see precision.autocast
                return function(*args, fake=False)

        IMPLEMENTATIONS[name] = functools.partial(function, fake=False)

        def fake(*args: Any) -> Any:
            return function(*args, fake=True)

        for key in ("CPU", "CUDA"):
            _library.impl(name, implementation, key)
        torch.library.register_fake(f"fastconv::{name}", fake, lib=_library)
        return function

    return register


def register_vmap(name: str, rule: Callable[..., Any]) -> None:
    """Give an operator a rule for torch.vmap; without one torch loops over the samples."""
    torch.library.register_vmap(f"fastconv::{name}", rule, lib=_library)


def launchers_for(
    backend: str, op: str, direction: str, g: ConvGeometry | PoolGeometry, tensor: Tensor, layout: torch.memory_format
) -> Launchers:
    if g.is_empty:
        return backends.load("aten")  # nothing to launch: torch makes the zeros and the empty tensors
    arithmetic = policy(tensor.dtype, tensor.device.type)
    return backends.select(backend, op, direction, g, arithmetic, tensor, layout == torch.channels_last)


def dense(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """`tensor` in exactly the strides that the fake promises, also where sizes of one leave them open."""
    tensor = tensor.contiguous(memory_format=layout)
    if 1 not in tensor.shape:
        return tensor
    _, c, h, w = tensor.shape
    strides = (h * w * c, 1, w * c, c) if layout == torch.channels_last else (c * h * w, h * w, w, 1)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)


def absent(like: Tensor) -> Tensor:
    """What stands for an output that was not asked for: schemas have no optional outputs."""
    return like.new_empty(0)


def optional_bias(like: Tensor, channels: int, wanted: bool) -> Tensor:
    """The fake of a bias gradient."""
    return like.new_empty(channels) if wanted else absent(like)
