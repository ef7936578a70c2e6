"""The lists: nets and layers that are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks import nets
from fastconv.bench.layers import Layer
from fastconv.models import recipe_net, vgg


@dataclass(frozen=True)
class Net:
    """A net and the batch of square images that it is measured on.

    Attributes:
        build: "fastconv" or "torch" → the net on these layers, the same weights under the same seed.
        dtypes: as in records.DTYPES.
        is_compiled: torch.compile is measured too, whose compilations are most of a run's time.
    """

    name: str
    build: Callable[[str], nn.Module]
    batch: int
    size: int
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    is_compiled: bool = False

    @property
    def case(self) -> str:
        return f"{self.name} R={self.size} batch {self.batch}"


@dataclass(frozen=True)
class LayerCase:
    layer: Layer
    batch: int
    channels_last: bool = True

    @property
    def case(self) -> str:
        return f"{self.layer.name} batch {self.batch}" + ("" if self.channels_last else " NCHW")


def _recipe(size: int) -> Callable[[str], nn.Module]:
    return lambda layers: recipe_net(size, layers=layers)


RECIPES = (
    Net("recipe_net", _recipe(32), 64, 32, is_compiled=True),
    Net("recipe_net", _recipe(224), 8, 224, is_compiled=True),
)
AUTOCAST = tuple(Net(net.name, net.build, net.batch, net.size, ("bfloat16_autocast",)) for net in RECIPES)
OTHERS = (
    Net("vgg16", lambda layers: vgg(16, dropout=0.0, layers=layers), 2, 224),
    Net("alexnet", nets.alexnet, 16, 224),
    Net("resnet18", nets.resnet18, 4, 224),
)
NETS = (*RECIPES, *AUTOCAST, *OTHERS)
QUICK_NETS = (Net("recipe_net", _recipe(32), 8, 32),)


def layers_of(net: Net) -> tuple[LayerCase, ...]:
    """The convolutions of a recipe net, each with the ReLU and, where one follows, the pool behind it; each once."""
    with torch.device("meta"):
        modules = [*net.build("torch").get_submodule("features").children(), nn.Identity()]
    cases, size = [], net.size
    for i, module in enumerate(modules):
        if isinstance(module, nn.Conv2d):
            pool = isinstance(modules[i + 2], nn.MaxPool2d)
            sides = (module.kernel_size[0], module.stride[0])
            cases.append(LayerCase(Layer(module.in_channels, module.out_channels, size, pool, *sides), net.batch))
            size //= sides[1] * (2 if pool else 1)
    return tuple(dict.fromkeys(cases))


LAYERS = tuple(case for net in RECIPES for case in layers_of(net))
QUICK_LAYERS = (LayerCase(Layer(64, 64, 16, pool=True), 8), LayerCase(Layer(128, 128, 8, pool=False), 8))

# Shapes that no kernel was chosen for: batches 1 to 64, maps 28 to 256, 16 to 512 channels, some of them odd, and NCHW.
SCALING = (
    LayerCase(Layer(64, 64, 28, pool=False), 1),
    LayerCase(Layer(64, 64, 56, pool=True), 1),
    LayerCase(Layer(256, 256, 28, pool=False), 1),
    LayerCase(Layer(512, 512, 28, pool=False), 2),
    LayerCase(Layer(16, 16, 256, pool=False), 1),
    LayerCase(Layer(16, 32, 128, pool=True), 4),
    LayerCase(Layer(32, 32, 64, pool=True), 16),
    LayerCase(Layer(24, 40, 56, pool=False), 8),
    LayerCase(Layer(40, 67, 28, pool=False), 16),
    LayerCase(Layer(67, 67, 32, pool=True), 8),
    LayerCase(Layer(3, 24, 256, pool=False, kernel=3, stride=2), 2),
    LayerCase(Layer(96, 192, 36, pool=False, kernel=5), 2),
    LayerCase(Layer(64, 128, 56, pool=False, kernel=3, stride=2), 8),
    LayerCase(Layer(128, 128, 28, pool=False), 64),
    LayerCase(Layer(64, 64, 56, pool=False), 8, channels_last=False),
    LayerCase(Layer(128, 128, 28, pool=True), 4, channels_last=False),
)
QUICK_SCALING = (SCALING[0], SCALING[8], SCALING[14])
