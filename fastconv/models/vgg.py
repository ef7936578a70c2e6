"""VGG (Simonyan and Zisserman, 2014, arXiv:1409.1556), with torchvision's layout of keys and its initialisation."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fastconv.models.layers import require_positive, with_layers

# Convolutions of each of the five stages, which have 64, 128, 256, 512 and 512 channels and end in a 2×2 max-pool.
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_CHANNELS = (64, 128, 256, 512, 512)


def vgg(
    depth: int,
    batch_norm: bool = False,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    dropout: float = 0.5,
    layers: str = "fastconv",
) -> nn.Sequential:
    """VGG with 11, 13, 16 or 19 weight layers; loads torchvision's checkpoints of the same name.

    Args:
        depth: 11, 13, 16 or 19.
        batch_norm: a BatchNorm2d after each convolution, as torchvision's `_bn` variants.
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        dropout: probability of the two Dropout layers of the classifier.
        layers: "fastconv" or "torch"; the state_dict's keys and the seeded initial weights are the same.

    Shapes:
        input [N, in_channels, H, W] with H, W ≥ 32; output [N, num_classes], unnormalised scores.

    Raises:
        ValueError: another depth, num_classes or in_channels below 1, or other layers.
    """
    if depth not in _STAGES:
        raise ValueError(f"vgg: depth must be one of {', '.join(map(str, _STAGES))}, got depth={depth}")
    require_positive("vgg", num_classes=num_classes, in_channels=in_channels)
    features: list[nn.Module] = []
    channels = in_channels
    for stage_channels, convs in zip(_CHANNELS, _STAGES[depth], strict=True):
        for _ in range(convs):
            features.append(nn.Conv2d(channels, stage_channels, 3, padding=1))
            if batch_norm:
                features.append(nn.BatchNorm2d(stage_channels))
            features.append(nn.ReLU(inplace=True))
            channels = stage_channels
        features.append(nn.MaxPool2d(2))
    model = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            avgpool=nn.AdaptiveAvgPool2d((7, 7)),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(
                nn.Linear(channels * 7 * 7, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(4096, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(4096, num_classes),
            ),
        )
    )
    _initialise(model)
    with_layers(model, layers, "vgg")
    return model


def _initialise(model: nn.Module) -> None:
    """As torchvision.models.vgg does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
