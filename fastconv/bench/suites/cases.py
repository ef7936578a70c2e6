"""The lists: layers, pools and nets that are measured, on a CPU, on a GPU, and in a hurry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from fastconv.bench.suites import nets
from fastconv.bench.suites.layers import Layer
from fastconv.models import recipe_net, vgg

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Net:
    """A net and the batch of square images that it is measured on.

    Attributes:
        build: "fastconv" or "torch" → the net on these layers, the same weights under the same seed.
        dtypes: as in records.DTYPES.
        is_compiled: torch.compile is measured too, whose compilations are most of a run's time.
        is_captured: a training step is measured as a CUDA graph too, where there is a GPU.
        trains: training steps are measured, and not inference alone.
    """

    name: str
    build: Callable[[str], nn.Module]
    batch: int
    size: int
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    is_compiled: bool = False
    is_captured: bool = False
    trains: bool = True

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


@dataclass(frozen=True)
class PoolCase:
    """A pool of square maps.

    Attributes:
        op: of fastconv.functional: relu_max_pool2d, max_pool2d, avg_pool2d or global_avg_pool2d.
        window: kernel size, stride and padding; of global_avg_pool2d none.
    """

    op: str
    channels: int
    size: int
    batch: int
    window: tuple[int, int, int] | None = None

    @property
    def case(self) -> str:
        shape = "" if self.window is None else f" {self.window[0]}x{self.window[0]}/{self.window[1]}"
        return f"{self.op}{shape} {self.channels}@{self.size} batch {self.batch}"


class Cases(NamedTuple):
    """What is measured on a kind of device: by dtype, and in a list what matters most first."""

    layers: Mapping[str, tuple[LayerCase, ...]]
    pools: Mapping[str, tuple[PoolCase, ...]]
    scaling: Mapping[str, tuple[LayerCase, ...]]
    nets: tuple[Net, ...]


def recipe(size: int) -> Callable[[str], nn.Module]:
    return lambda layers: recipe_net(size, layers=layers)


def _vgg16(layers: str) -> nn.Module:
    return vgg(16, dropout=0.0, layers=layers)


def layers_of(model: nn.Module, size: int) -> tuple[Layer, ...]:
    """The convolutions of a plain sequential net, each with its ReLU and, where one follows, its pool; each once."""
    found, modules = [], [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ReLU, nn.MaxPool2d))]
    for i, conv in enumerate(modules):
        if isinstance(conv, nn.Conv2d):
            behind = modules[i + 2] if i + 2 < len(modules) else None
            pool = behind if isinstance(behind, nn.MaxPool2d) else None
            kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
            side = _side(pool.kernel_size) if pool is not None else 0
            pads = None if padding == kernel // 2 else padding
            layer = Layer(conv.in_channels, conv.out_channels, size, side, kernel, stride, pads)
            found.append(layer)
            size = layer.output_shape(1)[2]
    return tuple(dict.fromkeys(found))


def _side(window: int | tuple[int, int]) -> int:
    return window if isinstance(window, int) else window[0]


def _of(build: Callable[[str], nn.Module], size: int) -> tuple[Layer, ...]:
    with torch.device("meta"):
        return layers_of(build("torch"), size)


VGG16, RECIPE_32, RECIPE_224 = _of(_vgg16, 224), _of(recipe(32), 32), _of(recipe(224), 224)
ALEXNET = _of(nets.alexnet, 224)
# The stem as it is in evaluation, its norm folded; the strided convolutions that halve the maps.
RESNET50 = (
    Layer(3, 64, 224, pool=3, kernel=7, stride=2, pool_padding=1),
    *(Layer(channels, channels, size, stride=2) for channels, size in ((128, 56), (256, 28), (512, 14))),
)
NETS_LAYERS = tuple(dict.fromkeys((*RECIPE_224, *RECIPE_32, *VGG16, *ALEXNET, *RESNET50)))

# Shapes that no kernel was chosen for: odd channels, large maps, a wide window, few images; and callers that hold NCHW.
UNTUNED = (
    LayerCase(Layer(16, 16, 256), 1),
    LayerCase(Layer(24, 40, 56), 8),
    LayerCase(Layer(40, 67, 28), 16),
    LayerCase(Layer(67, 67, 32, pool=2), 8),
    LayerCase(Layer(3, 24, 256, stride=2), 2),
    LayerCase(Layer(96, 192, 36, kernel=5), 2),
    LayerCase(Layer(64, 64, 56), 8, channels_last=False),
    LayerCase(Layer(128, 128, 28, pool=2), 4, channels_last=False),
)


def _batched(layers: tuple[Layer, ...], batches: tuple[int, ...], most_flops: float = float("inf")) -> tuple[LayerCase, ...]:
    """Layers at each batch at which a forward takes at most so many operations."""
    cases = [LayerCase(layer, batch) for batch in batches for layer in layers]
    return tuple(case for case in cases if case.layer.conv(case.batch).flops() <= most_flops)


def _swept(
    base: LayerCase, batches: tuple[int, ...], sizes: tuple[int, ...], widths: tuple[int, ...]
) -> tuple[LayerCase, ...]:
    """`base` with one of batch, resolution and width changed at a time."""
    cases = [replace(base, batch=batch) for batch in batches]
    cases += [replace(base, layer=replace(base.layer, size=size)) for size in sizes]
    cases += [replace(base, layer=replace(base.layer, in_channels=width, out_channels=width)) for width in widths]
    return tuple(dict.fromkeys(cases))


def _pools(batch: int) -> tuple[PoolCase, ...]:
    """Behind the convolutions of VGG-16, the recipe net, AlexNet and ResNet-50; the global averages of nets."""
    two, three = (2, 2, 0), (3, 2, 0)
    relu = [PoolCase("relu_max_pool2d", channels, size, batch, two) for channels, size in _PAIRS]
    plain = [PoolCase("max_pool2d", 64, 112, batch, two), PoolCase("max_pool2d", 64, 112, batch, (3, 2, 1))]
    plain += [PoolCase("max_pool2d", channels, size, batch, three) for channels, size in ((64, 55), (192, 27), (256, 13))]
    average = [PoolCase("avg_pool2d", 128, 56, batch, two)]
    average += [PoolCase("global_avg_pool2d", channels, size, batch) for channels, size in ((512, 4), (512, 7), (2048, 7))]
    return (*relu, *plain, *average)


_PAIRS = ((64, 224), (64, 112), (64, 56), (128, 28), (256, 14), (64, 32), (128, 16), (256, 8))

_RESNET18 = Net("resnet18", nets.resnet18, 4, 224)

# A forward of at most a few milliseconds of both cores: VGG-16 one image, the recipe net at 32 up to 32 of them.
_CPU_LAYERS = (*_batched(NETS_LAYERS, (1, 32), 5e9), *_batched(RECIPE_32, (256,), 5e9), *UNTUNED)
_CPU_POOLS = (*_pools(8), PoolCase("relu_max_pool2d", 64, 32, 64, (2, 2, 0)), PoolCase("global_avg_pool2d", 64, 32, 64))
_CPU_SCALING = _swept(
    LayerCase(Layer(64, 64, 28), 8),
    batches=(1, 2, 4, 8, 16, 32, 64),
    sizes=(7, 14, 28, 56, 112),
    widths=(16, 32, 64, 128, 256),
)
CPU = Cases(
    layers={
        "float32": _CPU_LAYERS,
        "bfloat16": _CPU_LAYERS,
        "float32_ieee": _batched(RECIPE_32, (32,)),
        "float16": _batched(RECIPE_32, (1,)),  # of which stock torch takes seconds for larger batches' gradients
    },
    pools={"float32": _CPU_POOLS, "bfloat16": _CPU_POOLS},
    scaling={"float32": _CPU_SCALING, "bfloat16": _CPU_SCALING},
    nets=(
        Net("recipe_net", recipe(32), 64, 32, is_compiled=True),
        Net("recipe_net", recipe(224), 8, 224, is_compiled=True),
        Net("recipe_net", recipe(32), 64, 32, ("bfloat16_autocast",)),
        Net("recipe_net", recipe(224), 8, 224, ("bfloat16_autocast",)),
        Net("vgg16", _vgg16, 2, 224),
        Net("alexnet", nets.alexnet, 16, 224),
        _RESNET18,
    ),
)
_QUICK_LAYERS = tuple(LayerCase(layer, 8) for layer in (*RECIPE_32[:4], RECIPE_224[3], RECIPE_224[5], RECIPE_224[7]))
_QUICK_POOLS = tuple(case for case in _pools(8) if case.size <= 32 or case.op == "global_avg_pool2d")
_QUICK_SCALING = _swept(LayerCase(Layer(64, 64, 14), 8), batches=(1, 4, 8, 16), sizes=(7, 14, 28, 56), widths=(16, 64, 128))
CPU_QUICK = Cases(
    layers={"float32": _QUICK_LAYERS, "bfloat16": _QUICK_LAYERS},
    pools={"float32": _QUICK_POOLS},
    scaling={"float32": _QUICK_SCALING},
    nets=(Net("recipe_net", recipe(32), 8, 32), Net("vgg16", _vgg16, 1, 224, ("float32",), trains=False)),
)
_GPU_LAYERS = (*_batched(NETS_LAYERS, (32, 256, 1)), *UNTUNED)
_GPU_POOLS = (*_pools(32), *_pools(256))
GPU = Cases(
    layers=dict.fromkeys(("bfloat16", "float16", "tf32", "float32_ieee"), _GPU_LAYERS),
    pools=dict.fromkeys(("bfloat16", "float16", "float32_ieee"), _GPU_POOLS),
    scaling={
        "bfloat16": _swept(
            LayerCase(Layer(64, 64, 56), 32),
            batches=(1, 4, 16, 32, 64, 128, 256),
            sizes=(7, 14, 28, 56, 112, 224),
            widths=(16, 32, 64, 128, 256, 512),
        )
    },
    nets=(
        Net("recipe_net", recipe(224), 256, 224, ("bfloat16",), is_compiled=True),
        Net("recipe_net", recipe(32), 128, 32, ("bfloat16",), is_compiled=True, is_captured=True),
        Net("vgg16", _vgg16, 128, 224, ("bfloat16",), is_compiled=True),
        replace(_RESNET18, batch=128, dtypes=("bfloat16",), is_compiled=True),
        Net("alexnet", nets.alexnet, 256, 224, ("bfloat16",), is_compiled=True),
        Net("recipe_net", recipe(224), 1, 224, ("bfloat16",), is_compiled=True, trains=False),
        Net("recipe_net", recipe(224), 32, 224, ("bfloat16", "tf32"), is_compiled=True),
        Net("vgg16", _vgg16, 1, 224, ("bfloat16",), trains=False),
        Net("vgg16", _vgg16, 32, 224, ("bfloat16", "tf32")),
        Net("recipe_net", recipe(224), 256, 224, ("float16", "tf32", "bfloat16_autocast")),
        Net("recipe_net", recipe(32), 128, 32, ("float16", "tf32", "bfloat16_autocast")),
    ),
)
GPU_QUICK = Cases(
    layers={"bfloat16": _QUICK_LAYERS, "tf32": _QUICK_LAYERS},
    pools={"bfloat16": _QUICK_POOLS},
    scaling={"bfloat16": _QUICK_SCALING},
    nets=(Net("recipe_net", recipe(32), 8, 32, ("bfloat16", "tf32"), is_captured=True),),
)


def of(device_type: str, quick: bool) -> Cases:
    """The lists of a kind of device, the short ones if `quick`."""
    if device_type == "cuda":
        return GPU_QUICK if quick else GPU
    return CPU_QUICK if quick else CPU
