"""LeNet-5 (LeCun, Bottou, Bengio and Haffner, 1998) with ReLU and max-pool, for images of 28×28."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fastconv.models.layers import require_positive, with_layers


def lenet5(num_classes: int = 10, *, in_channels: int = 1, layers: str = "fastconv") -> nn.Sequential:
    """LeNet-5 as it is mostly written today: 44,426 parameters for 10 classes.

    The original takes 32×32 and has tanh, trained averages and a sparse second layer; here images are MNIST's own 28×28,
    without padding, so that 16 maps of 4×4 are left. Initialised as torch does.

    Args:
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        layers: "fastconv" or "torch"; the state_dict's keys and the seeded initial weights are the same.

    Shapes:
        input [N, in_channels, 28, 28]; output [N, num_classes], unnormalised scores.

    Raises:
        ValueError: num_classes or in_channels below 1, or other layers.
    """
    require_positive("lenet5", num_classes=num_classes, in_channels=in_channels)
    model = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(
                nn.Conv2d(in_channels, 6, 5),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
                nn.Conv2d(6, 16, 5),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(
                nn.Linear(16 * 4 * 4, 120),
                nn.ReLU(inplace=True),
                nn.Linear(120, 84),
                nn.ReLU(inplace=True),
                nn.Linear(84, num_classes),
            ),
        )
    )
    with_layers(model, layers, "lenet5")
    return model
