"""Trees of modules: copies around the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def copy_modules(
    model: nn.Module, held: Callable[[Tensor], Tensor] = lambda tensor: tensor, *, with_buffers: bool = True
) -> nn.Module:
    """A copy of the tree of modules that holds the very tensors of `model`, and its locks.

    Args:
        held: what the copy holds in the place of a tensor.
        with_buffers: whether buffers are the same ones too; else they are copies.
    """
    memo: dict[int, Any] = {id(value): held(value) if isinstance(value, Tensor) else value for value in _kept(model)}
    if not with_buffers:
        memo |= {id(buffer): buffer.detach().clone() for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _kept(model: nn.Module) -> Iterator[object]:
    """Tensors, wherever attributes hold them, and attributes that deepcopy refuses."""
    waiting: list[object] = [model]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, torch.jit.ScriptModule):
            yield from (*value.parameters(), *value.buffers())
        elif isinstance(value, nn.Module):
            waiting.extend(vars(value).values())
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting.extend(value)
        elif type(value).__name__ in _UNCOPIED:
            yield value


# Of _thread and of torch.distributed, where that is built.
_UNCOPIED = ("lock", "RLock", "ProcessGroup", "Stream", "Event")
