"""An entry of the zoo: a net, what it is called with, and what else of it can be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def image(channels: int = 3, size: int = 8, batch: int = 2) -> Callable[[], tuple[Any, ...]]:
    """Arguments of a call: one batch [N, C, S, S], drawn anew each time."""
    return lambda: (torch.randn(batch, channels, size, size),)


def _call(net: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return net(*args, **kwargs)


def _nothing(net: nn.Module) -> Any:
    return None


@dataclass(frozen=True)
class Net:
    """A structure, and how to use it.

    Attributes:
        inputs: makes the arguments of a call; tensors of floating point get gradients.
        again: makes those of later calls, of other sizes for instance; None as `inputs`.
        kwargs: makes the keyword arguments of every call.
        call: what the user does with the net, where that is not net(*args, **kwargs).
        seen: what calls left behind on the net besides parameters and buffers: counts, recorded tensors.
        alter: what the user does to the net once it is converted (and to the original, to compare).
        learning_rate: of its steps of training: deep nets amplify the last bit by as much as a step carries them away.
        drops: single elements of maps are dropped, which dropout draws in the order of memory.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]] = field(default_factory=lambda: image())
    again: Callable[[], tuple[Any, ...]] | None = None
    kwargs: Callable[[], dict[str, Any]] = dict
    call: Callable[..., Any] = _call
    seen: Callable[[nn.Module], Any] = _nothing
    alter: Callable[[nn.Module], Any] = _nothing
    drops: bool = False
    learning_rate: float = 0.02

    def build(self) -> nn.Module:
        """The net, with weights that keep the scale of maps and normalisations that are none of the identity.

        A gamma may be negative: a pool does not commute with such a normalisation.
        """
        net = self.make()
        with torch.no_grad():
            for module in net.modules():
                weight: Any = getattr(module, "weight", None)
                if isinstance(module, nn.Conv2d) and isinstance(weight, nn.Parameter):
                    nn.init.kaiming_normal_(weight, nonlinearity="relu")
                elif isinstance(module, nn.BatchNorm2d):
                    if module.affine:
                        weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(module.num_features) < 0.25, -1.0, 1.0))
                        module.bias.normal_(std=0.3)
                    if module.running_mean is not None and module.running_var is not None:
                        module.running_mean.normal_(std=0.3)
                        module.running_var.uniform_(0.5, 1.5)
        return net


def conv(channels: int, out_channels: int = 4, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    """A convolution that keeps the size of a map at stride 1."""
    return nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, **settings)


def conv_bn(channels: int, out_channels: int = 4, kernel: int = 3, **settings: Any) -> list[nn.Module]:
    return [conv(channels, out_channels, kernel, bias=False, **settings), nn.BatchNorm2d(out_channels)]


def scores(x: Tensor) -> Tensor:
    """A small head that sees every element of a map: [N, C, H, W] to [N, C · 2 · 2]."""
    return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 2), 1)
