"""How a Function and its operator belong together: arguments, calls, and registration with autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

import fastconv.ops  # noqa: F401  (defines torch.ops.fastconv)
from fastconv.ops.define import IMPLEMENTATIONS

ops = torch.ops.fastconv
IntPair = tuple[int, int]
Grads = tuple[Tensor | None, ...]


class ConvArgs(NamedTuple):
    """What an operator takes between its tensors and the backend request."""

    stride: IntPair
    padding: IntPair
    dilation: IntPair
    groups: int


class PoolArgs(NamedTuple):
    kernel_size: IntPair
    stride: IntPair
    padding: IntPair
    dilation: IntPair
    ceil_mode: bool


def call(name: str, *args: Any) -> Any:
    """Run an operator by its Function's arguments, and record it where a gradient will be wanted.

    torch's own Function.apply takes 25 µs to bind default arguments, of which there are none: it is passed over where
    torch.func does not need it. A trace gets the bare operator, which is differentiable by itself (see `register`).
    """
    if torch.compiler.is_compiling():
        return getattr(ops, name).default(*_flat(args))
    function = FUNCTIONS[name]
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return function.forward(*args)
    return record(function, *args)


def record(function: type[torch.autograd.Function], *args: Any) -> Any:
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _flat(args: tuple[Any, ...]) -> list[Any]:
    """A Function's arguments as its operator's."""
    return [item for arg in args for item in (arg if isinstance(arg, (ConvArgs, PoolArgs)) else (arg,))]


def run(op: Any, *args: Any) -> Any:
    """Call an operator from within its Function: what it does inside is not to be recorded again.

    The dispatcher's way into Python and back costs more than all of our own: it is passed over where nobody listens there.
    """
    if _is_unobserved() and _PLAIN.issuperset(types := {*map(type, args)}):
        return _IMPLEMENTATIONS[op](*(args if _GROUPS.isdisjoint(types) else _flat(args)))
    with torch._C._AutoDispatchBelowAutograd():
        return op(*_flat(args))


def _is_unobserved() -> bool:
    """No mode, transform, trace, autocast or profiler that acts on operators as they are dispatched."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)  # is_grads_batched's, which is not functorch's
        or torch._C._get_tracing_state() is not None
        or torch._C._is_any_autocast_enabled()
        or torch._C._autograd._profiler_enabled()
    )


_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")  # parsed once: by its name it is twenty times as slow
_PLAIN = frozenset(
    {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple, torch.Size, ConvArgs, PoolArgs}
)
_GROUPS = frozenset({ConvArgs, PoolArgs})
_IMPLEMENTATIONS = {getattr(ops, name).default: function for name, function in IMPLEMENTATIONS.items()}

FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_library = torch.library.Library("fastconv", "IMPL")


def register(function: type[torch.autograd.Function], name: str, pack: Callable[..., tuple[Any, ...]]) -> None:
    """Make direct calls of an operator differentiable too: those of traced and exported programs.

    Args:
        pack: the operator's arguments as its Function's.
    """
    op = getattr(ops, name).default
    FUNCTIONS[name] = function

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if wanted or forward_ad._current_level >= 0:
            with enable_single_level_autograd_function():  # of torch.func, whose transforms call this one at a time
                return record(function, *pack(*args))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)
