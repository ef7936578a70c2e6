"""Chains of nn.Sequential containers.

The fused module takes the convolution's place and torch.nn.Identity that of the ReLU and the pool, so every key of the
state_dict stays what it was.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

from torch import nn

from fastconv import nn as fast
from fastconv.convert.layers import runs_in_order, why_not
from fastconv.convert.program import subclass
from fastconv.nn.fused import Pooling


def fuse_chains(sequence: nn.Sequential, shared: Collection[int]) -> None:
    """Replace Conv2d or BatchNorm2d → ReLU (→ MaxPool2d) by a fused module and identities, in `sequence` itself."""
    identities: dict[int, nn.Identity] = {}  # one for each module: what had one name keeps it

    def absorb(name: str, module: nn.Module) -> None:
        sequence.add_module(name, identities.setdefault(id(module), _identity(module)))

    # Not named_children: it names a module that is used twice once, and others would seem to be neighbours.
    layers = [(name, layer) for name, layer in sequence._modules.items() if layer is not None]
    following = [*layers[2:], ("", nn.Identity())]
    for (first_at, first), (second_at, second), (third_at, third) in zip(layers, layers[1:], following, strict=False):
        if type(first) not in (nn.Conv2d, fast.Conv2d, nn.BatchNorm2d) or why_not(first, shared) is not None:
            continue
        pool = _pool(third) if _is_relu(second) else _pool(second) if _is_relu(third) else None  # the two commute
        if pool is None and not _is_relu(second):
            continue
        sequence.add_module(first_at, _fused(cast(nn.Conv2d, first), pool))
        absorb(second_at, second)
        if pool is not None:
            absorb(third_at, third)


def make_chain(module: nn.Module, fold: bool) -> None:
    """Make a Sequential in which fused layers follow each other, or a norm follows a convolution, a ConvChain.

    The object stays and takes on the class, or one of both classes where it has one of its own: its place in the model,
    keys, hooks and attributes, the root's identity with them, are what they were.
    """
    if not runs_in_order(module) or "forward" in vars(module) or None in module._modules.values():
        return
    parts = [part for part in fast.ConvChain.parts(cast(nn.Sequential, module)) if len(part) > 1]
    gains = any(fold or not isinstance(part[1], nn.BatchNorm2d) for part in parts)
    if gains and type(module) is nn.Sequential:
        module.__class__ = fast.ConvChain
    elif gains and not isinstance(module, fast.ConvChain):
        try:
            module.__class__ = subclass(fast.ConvChain, type(module))
        except TypeError:  # its members run one by one, as before
            return
    vars(module).pop("fold_batch_norm", None)
    if isinstance(module, fast.ConvChain) and not fold:
        module.fold_batch_norm = False


def _is_relu(module: nn.Module) -> bool:
    return type(module) is nn.ReLU and why_not(module) is None


def _pool(module: nn.Module) -> nn.MaxPool2d | None:
    if not isinstance(module, nn.MaxPool2d) or why_not(module) is not None or module.return_indices:
        return None
    return module


def _identity(absorbed: nn.Module) -> nn.Identity:
    """At the place of a module whose work a fused one does; it remembers that module, which is no part of the model."""
    made = nn.Identity().train(absorbed.training)
    vars(made)["absorbed"] = (absorbed,)
    return made


def _fused(first: nn.Conv2d | nn.BatchNorm2d, pool: nn.MaxPool2d | None) -> nn.Module:
    if pool is None:
        plain = fast.ConvReLU2d if isinstance(first, nn.Conv2d) else fast.BatchNormReLU2d
        return plain.from_torch(first)  # type: ignore[arg-type]
    pooling = fast.ConvReLUMaxPool2d if isinstance(first, nn.Conv2d) else fast.BatchNormReLUMaxPool2d
    return pooling.from_torch(first, **Pooling.of(pool).behind())  # type: ignore[arg-type]
