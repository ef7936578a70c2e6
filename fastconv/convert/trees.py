"""Trees of modules: copies around the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import Tensor, nn


def copy_modules(model: nn.Module, held: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """A copy of the tree of modules that holds the very tensors of `model`, or what `held` makes of each of them."""
    tensors = {id(tensor): tensor for tensor in _tensors(model)}
    return copy.deepcopy(model, {identity: held(tensor) for identity, tensor in tensors.items()})


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        # Computed weights (the old weight_norm's) are plain attributes, and not leaves: deepcopy refuses those.
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))
