"""The recipe net: blocks of two 3×3 convolutions that double the channels while they halve the map."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fastconv.models.layers import initialise_he, require_positive, with_layers

DOWNSAMPLE = ("max", "conv")

_LAST_MAP = 7  # maps larger than this are halved
_STEM_FROM = 100  # resolutions from here on start with the 7×7 stem


def recipe_net(
    resolution: int = 224,
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: int = 64,
    max_width: int = 512,
    downsample: str = "max",
    batch_norm: bool = False,
    layers: str = "fastconv",
) -> nn.Sequential:
    """The recipe net for square images.

    From R = 100 on, a stem of a 7×7 stride-2 convolution, ReLU and 2×2 max-pool leaves a map of R / 4. Then, while the
    map is larger than 7, blocks conv3–ReLU–conv3–ReLU–pool with width, 2 · width, ... ≤ max_width channels; one last
    block without pooling; global average pooling; Linear. R = 224: stem, 64@56, 128@28, 256@14, 512@7.
    R = 32: 64@32, 128@16, 256@8, 512@4.

    Args:
        resolution: R, height and width of the images: 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96,
            and with the stem 112, 128, 160, 192, 224, 256, ...: those whose every halving is exact.
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        width, max_width: channels of the first block, and the most that any block gets.
        downsample: "max" halves maps by 2×2 max-pool, "conv" by a 3×3 stride-2 convolution with ReLU instead.
        batch_norm: a BatchNorm2d after every convolution, which then has no bias.
        layers: "fastconv" or "torch"; the state_dict's keys and the seeded initial weights are the same.

    Shapes:
        input [N, in_channels, R, R]; output [N, num_classes], unnormalised scores.

    Raises:
        ValueError: a resolution whose maps do not halve exactly, or an argument out of range.
    """
    require_positive("recipe_net", num_classes=num_classes, in_channels=in_channels, width=width)
    if max_width < width:
        raise ValueError(f"recipe_net: max_width must be at least width={width}, got max_width={max_width}")
    if downsample not in DOWNSAMPLE:
        raise ValueError(f"recipe_net: downsample must be 'max' or 'conv', got downsample={downsample!r}")
    maps = _halved_maps(resolution)

    features: list[nn.Module] = []
    channels = in_channels
    if resolution >= _STEM_FROM:
        features += [*_conv(channels, width, 7, 2, batch_norm), *_halve(width, downsample, batch_norm)]
        channels = width
    halvings = len(maps) - (2 if resolution >= _STEM_FROM else 0)
    for block in range(halvings + 1):
        block_width = min(width * 2**block, max_width)
        for conv_in in (channels, block_width):
            features += _conv(conv_in, block_width, 3, 1, batch_norm)
        if block < halvings:
            features += _halve(block_width, downsample, batch_norm)
        channels = block_width

    model = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(channels, num_classes),
        )
    )
    initialise_he(model)
    with_layers(model, layers, "recipe_net")
    return model


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int, batch_norm: bool) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=not batch_norm)
    norm = [nn.BatchNorm2d(out_channels)] if batch_norm else []
    return [conv, *norm, nn.ReLU(inplace=True)]


def _halve(channels: int, downsample: str, batch_norm: bool) -> list[nn.Module]:
    return [nn.MaxPool2d(2)] if downsample == "max" else _conv(channels, channels, 3, 2, batch_norm)


def _halved_maps(resolution: int) -> list[int]:
    """The maps that are halved, the image first where there is a stem.

    Raises:
        ValueError: one of them is odd.
    """
    maps, odd = _maps(resolution)
    if odd is None:
        return maps
    works = [r for r in range(1, 4 * max(resolution, 1) + 8) if _maps(r)[1] is None]
    below = [r for r in works if r < resolution][-2:]
    above = [r for r in works if r > resolution][:2]
    raise ValueError(
        f"recipe_net: every halving must be exact, but resolution={resolution} leads to a map of {odd}×{odd}; "
        f"the nearest resolutions that work: {', '.join(map(str, below + above))}"
    )


def _maps(resolution: int) -> tuple[list[int], int | None]:
    """The maps to halve, and the first of them that cannot be."""
    if resolution < 1:
        return [], resolution
    maps: list[int] = []
    size = resolution
    while size > _LAST_MAP or (resolution >= _STEM_FROM and len(maps) < 2):
        maps.append(size)
        if size % 2:
            return maps, size
        size //= 2
    return maps, None
