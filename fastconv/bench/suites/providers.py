"""What computes the same expression: fastconv under a backend, or stock torch, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastconv import backends, functional, reference
from fastconv.bench.records import is_ours
from fastconv.bench.trial import ours

Function = Callable[..., Any]

# Without CUDA graphs, which would copy the inputs of a single layer: in a net they are maps that lie where they are.
_MODES = {"compile_default": None, "compile_max_autotune": "max-autotune-no-cudagraphs"}


def resolve(name: str, build: Callable[[ModuleType], Function]) -> Function:
    """The provider `name` of what `build` makes of fastconv.functional, or of its plain torch twin fastconv.reference."""
    if is_ours(name):
        function = build(functional)
        return function if name == ours() else _under(name.partition("_")[2], function)
    function = build(reference)
    if name in _MODES:
        compiled: Function = torch.compile(function, mode=_MODES[name], dynamic=False)
        return compiled
    return function


def _under(backend: str, function: Function) -> Function:
    def requested(*args: Any) -> Any:
        with backends.use_backend(backend):
            return function(*args)

    return requested


def layout(name: str) -> torch.memory_format:
    """How the maps lie that a provider reads: nothing is converted on the way."""
    return torch.contiguous_format if name == "eager_nchw" else torch.channels_last


def laid_out(name: str, maps: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Copies of `maps`, of which those with four dimensions lie as the provider wants them; leaves, as before."""
    copies = (t.detach().clone(memory_format=layout(name) if t.dim() == 4 else torch.preserve_format) for t in maps)
    return tuple(copy.requires_grad_(t.requires_grad) for copy, t in zip(copies, maps, strict=True))


def forget_compiled(names: Iterable[str]) -> Callable[[], object]:
    """What frees a trial's compiled functions, of which torch keeps few for one piece of code."""
    return torch._dynamo.reset if any(name.startswith("compile") for name in names) else lambda: None
