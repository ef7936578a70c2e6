"""Nets as they are measured: those of fastconv.models without dropout, and ResNet-18 in plain torch.nn."""

from __future__ import annotations

from torch import Tensor, nn

import fastconv


def alexnet(layers: str = "torch") -> nn.Module:
    """AlexNet without dropout, and without the average pool that does nothing at this size: [N, 3, 224, 224] → [N, 1000]."""
    net = fastconv.models.alexnet(dropout=0.0, layers="torch")
    net.avgpool = nn.Identity()
    return _on(net, layers)


class Block(nn.Module):
    """Two 3×3 convolutions with batch norms, and the way round them: [N, C, H, W] → [N, D, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride > 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(y)
        return result


def resnet18(layers: str = "torch") -> nn.Module:
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
            blocks.append(Block(channels, width, stride))
            channels = width
    return _on(nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)), layers)


def vgg16(layers: str = "torch") -> nn.Module:
    """VGG-16 (Simonyan and Zisserman, 2014, arXiv:1409.1556): [N, 3, 224, 224] → [N, 1000]."""
    return fastconv.models.vgg(16, dropout=0.0, layers=layers)


def _on(net: nn.Module, layers: str) -> nn.Module:
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return fastconv.convert(net, inplace=True) if layers == "fastconv" else net
