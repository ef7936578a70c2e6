"""The net of TensorFlow's tutorial "Deep MNIST for Experts" (2015)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fastconv.models.layers import require_positive, with_layers


def mnist_net(
    num_classes: int = 10, *, in_channels: int = 1, dropout: float = 0.5, layers: str = "fastconv"
) -> nn.Sequential:
    """Two 5×5 convolutions that keep the map's size, each with a 2×2 max-pool: 3,274,634 parameters for 10 classes.

    The layers are the tutorial's, the initialisation is torch's.

    Args:
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        dropout: probability of the Dropout before the last layer.
        layers: "fastconv" or "torch"; the state_dict's keys and the seeded initial weights are the same.

    Shapes:
        input [N, in_channels, 28, 28]; output [N, num_classes], unnormalised scores.

    Raises:
        ValueError: num_classes or in_channels below 1, or other layers.
    """
    require_positive("mnist_net", num_classes=num_classes, in_channels=in_channels)
    model = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(
                nn.Conv2d(in_channels, 32, 5, padding=2),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 5, padding=2),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(
                nn.Linear(64 * 7 * 7, 1024),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(1024, num_classes),
            ),
        )
    )
    with_layers(model, layers, "mnist_net")
    return model
