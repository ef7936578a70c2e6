"""Whether calling a module runs the forward of its class and nothing else."""

from __future__ import annotations

import torch

from fastconv.nn.conv import Conv2d, ConvReLU2d, ConvReLUMaxPool2d, FrozenConv2d
from fastconv.nn.norm import BatchNormReLU2d, BatchNormReLUMaxPool2d
from fastconv.nn.pool import MaxPool2d

# As the classes define them: a forward that is patched onto a class is found by the difference.
_FORWARDS: dict[type[torch.nn.Module], object] = {
    kind: kind.forward
    for kind in (
        *(torch.nn.Identity, torch.nn.ReLU, torch.nn.BatchNorm2d, torch.nn.MaxPool2d),
        *(Conv2d, ConvReLU2d, ConvReLUMaxPool2d, FrozenConv2d, BatchNormReLU2d, BatchNormReLUMaxPool2d, MaxPool2d),
    )
}


def is_nothing_but(module: torch.nn.Module, *kinds: type[torch.nn.Module]) -> bool:
    """Whether `module` is of exactly one of `kinds`, and a call of it runs the forward of its class and nothing else."""
    kind = type(module)
    return kind in kinds and not (
        kind.forward is not _FORWARDS[kind]
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )
