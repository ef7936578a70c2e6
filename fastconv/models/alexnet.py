"""AlexNet in one column (Krizhevsky, 2014, arXiv:1404.5997), with torchvision's layers, keys and initialisation."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fastconv.models.layers import require_positive, with_layers


def alexnet(
    num_classes: int = 1000, *, in_channels: int = 3, dropout: float = 0.5, layers: str = "fastconv"
) -> nn.Sequential:
    """AlexNet; loads torchvision's checkpoints: 61,100,840 parameters for 1000 classes.

    Args:
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        dropout: probability of the two Dropout layers of the classifier.
        layers: "fastconv" or "torch"; the state_dict's keys and the seeded initial weights are the same.

    Shapes:
        input [N, in_channels, H, W] with H, W ≥ 63; output [N, num_classes], unnormalised scores.

    Raises:
        ValueError: num_classes or in_channels below 1, or other layers.
    """
    require_positive("alexnet", num_classes=num_classes, in_channels=in_channels)
    model = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(
                nn.Conv2d(in_channels, 64, 11, stride=4, padding=2),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2),
                nn.Conv2d(64, 192, 5, padding=2),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2),
                nn.Conv2d(192, 384, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(384, 256, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(256, 256, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2),
            ),
            avgpool=nn.AdaptiveAvgPool2d((6, 6)),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(
                nn.Dropout(dropout),
                nn.Linear(256 * 6 * 6, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(4096, 4096),
                nn.ReLU(inplace=True),
                nn.Linear(4096, num_classes),
            ),
        )
    )
    with_layers(model, layers, "alexnet")
    return model
