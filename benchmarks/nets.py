"""Nets of the benchmark that fastconv.models does not have, each on fastconv's or on torch's layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import fastconv


def alexnet(layers: str) -> nn.Module:
    """AlexNet as torchvision has it (Krizhevsky, 2014, arXiv:1404.5997), without dropout: [N, 3, 224, 224] → [N, 1000]."""
    net = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
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
        nn.Flatten(),
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, 1000),
    )
    return _on(net, layers)


class Block(nn.Module):
    """Two 3×3 convolutions with batch norms, and the way round them: [N, C, H, W] → [N, D, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, layers: str) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.is_fused = layers == "fastconv"
        self.norm = (fastconv.nn.BatchNormReLU2d if self.is_fused else nn.BatchNorm2d)(out_channels)
        self.round: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.round = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y, residual = self.second(self.first(x)), self.round(x)
        if self.is_fused:
            fused: Tensor = self.norm(y, residual)
            return fused
        return F.relu(self.norm(y) + residual, inplace=True)


def resnet18(layers: str) -> nn.Module:
    """ResNet-18 (He et al., 2015, arXiv:1512.03385): [N, 3, 224, 224] → [N, 1000]."""
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    blocks: list[nn.Module] = []
    channels = 64
    for width in (64, 128, 256, 512):
        for stride in (1 if width == 64 else 2, 1):
            blocks.append(Block(channels, width, stride, layers))
            channels = width
    return _on(nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)), layers)


def _on(net: nn.Module, layers: str) -> nn.Module:
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return fastconv.convert(net, inplace=True) if layers == "fastconv" else net
