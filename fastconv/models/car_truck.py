"""A small classifier of two classes, with batch norms."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fastconv.models.layers import require_positive, with_layers


def car_truck(*, in_channels: int = 3, layers: str = "fastconv") -> nn.Sequential:
    """Tells two classes apart by one output: 93,153 parameters for images of 3 channels.

    Three blocks convolution–BatchNorm2d–ReLU–2×2 max-pool, of kernels 7, 5 and 3 and 32, 64 and 64 channels; the mean of
    each map; Linear. Convolutions keep the map's size and have no bias, which the norm would take away again.

    The output is the logit of class 1. Its sigmoid is not part of the net: for training it is in
    `F.binary_cross_entropy_with_logits(model(x).squeeze(1), labels.float())`, and a prediction applies it itself:
    `model(x).sigmoid()` is the probability of class 1, `model(x) > 0` says that it is above one half.

    Args:
        in_channels: channels of the images.
        layers: "fastconv" or "torch"; the state_dict's keys and the seeded initial weights are the same.

    Shapes:
        input [N, in_channels, H, W] with H, W ≥ 8 (made for 128); output [N, 1], a logit.

    Raises:
        ValueError: in_channels below 1, or other layers.
    """
    require_positive("car_truck", in_channels=in_channels)
    features: list[nn.Module] = []
    channels = in_channels
    for kernel, width in ((7, 32), (5, 64), (3, 64)):
        features += [
            nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
        channels = width
    model = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(channels, 1),
        )
    )
    with_layers(model, layers, "car_truck")
    return model
