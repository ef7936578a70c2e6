"""Network in Network (Lin, Chen and Yan, 2013, arXiv:1312.4400), in the form that its authors released for CIFAR-10."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fastconv.models.layers import initialise_he, require_positive, with_layers


def network_in_network(
    num_classes: int = 10, *, in_channels: int = 3, dropout: float = 0.5, layers: str = "fastconv"
) -> nn.Sequential:
    """Three blocks of a convolution and two 1×1 ones, each with ReLU, and no Linear: 966,986 parameters for 10 classes.

    The variant is that of the authors' Caffe model for CIFAR-10: the first block ends in a max-pool and the second in an
    average pool, both 3×3 of stride 2 with sizes rounded up (32, 16, 8), each followed by dropout; the last convolution
    has a map for each class, behind a ReLU like all others, whose mean is the score. He initialisation takes the place of
    the released model's deviations, which were set by hand.

    Args:
        num_classes: maps of the last convolution.
        in_channels: channels of the images.
        dropout: probability of the Dropout behind each of the two pools.
        layers: "fastconv" or "torch"; the state_dict's keys and the seeded initial weights are the same.

    Shapes:
        input [N, in_channels, H, W] with H, W ≥ 4 (made for 32); output [N, num_classes], unnormalised scores ≥ 0.

    Raises:
        ValueError: num_classes or in_channels below 1, or other layers.
    """
    require_positive("network_in_network", num_classes=num_classes, in_channels=in_channels)
    model = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(
                *_block(in_channels, 5, (192, 160, 96)),
                nn.MaxPool2d(3, stride=2, ceil_mode=True),
                nn.Dropout(dropout),
                *_block(96, 5, (192, 192, 192)),
                nn.AvgPool2d(3, stride=2, ceil_mode=True),
                nn.Dropout(dropout),
                *_block(192, 3, (192, 192, num_classes)),
            ),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    )
    initialise_he(model)
    with_layers(model, layers, "network_in_network")
    return model


def _block(channels: int, kernel: int, widths: tuple[int, int, int]) -> list[nn.Module]:
    """A convolution that keeps the map's size, then two 1×1: a small net that looks at each position alone."""
    block: list[nn.Module] = []
    for size, width in zip((kernel, 1, 1), widths, strict=True):
        block += [nn.Conv2d(channels, width, size, padding=size // 2), nn.ReLU(inplace=True)]
        channels = width
    return block
