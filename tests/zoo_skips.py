"""The zoo's nets of the literature with skips: residual sums, concatenation, gates; few channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo_case import Net, conv, conv_bn, image


class BasicBlock(nn.Module):
    """He et al., 2015 (arXiv:1512.03385): one ReLU module at two call sites."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1, one ReLU module at three call sites; grouped it is ResNeXt's (arXiv:1611.05431)."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        inner, out_channels = width * (2 if groups > 1 else 1), width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def _downsample(channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    def __init__(self, block: type[BasicBlock] | type[Bottleneck], width: int, blocks: int = 2, groups: int = 1) -> None:
        super().__init__()
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, width, blocks, 1, groups)
        self.layer2 = self._make_layer(block, 2 * width, blocks, 2, groups)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, 5)

    def _make_layer(self, block: Any, width: int, blocks: int, stride: int, groups: int) -> nn.Sequential:
        layers = []
        for index in range(blocks):
            layers.append(block(self.inplanes, width, stride if index == 0 else 1, groups))
            self.inplanes = width * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Residual(nn.Module):
    """The branch is one Sequential; the ReLU behind the sum a function, or a module made in forward."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1, made: bool = False) -> None:
        super().__init__()
        self.made = made
        self.residual = nn.Sequential(
            *conv_bn(channels, out_channels, stride=stride), nn.ReLU(inplace=True), *conv_bn(out_channels, out_channels)
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(*conv_bn(channels, out_channels, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        if self.made:
            return nn.ReLU(inplace=True)(self.residual(x) + self.shortcut(x))
        return F.relu(self.residual(x) + self.shortcut(x))


class PreActBlock(nn.Module):
    """He et al., 2016 (arXiv:1603.05027): BN and ReLU come first, and no ReLU behind the sum."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, out_channels, stride=stride, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out_channels), conv(out_channels, out_channels, bias=False)
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class InPlacePreAct(nn.Module):
    """The ReLU writes to the block's own input, so that the skip carries what the ReLU left."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.relu, self.conv1, self.bn1 = nn.ReLU(inplace=True), conv(channels, channels), nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(x))
        out = self.conv2(self.relu(self.bn1(out)))
        return out + x


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.scale_activation = nn.SiLU(inplace=True), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


class MBConv(nn.Module):
    """Tan and Le, 2019 (arXiv:1905.11946): expand, depthwise, squeeze and excite, project; whole rows are dropped."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1, drop: float = 0.5) -> None:
        super().__init__()
        inner = 2 * channels
        self.use_res_connect, self.drop = stride == 1 and channels == out_channels, drop
        self.block = nn.Sequential(
            nn.Sequential(*conv_bn(channels, inner, 1), nn.SiLU(inplace=True)),
            nn.Sequential(*conv_bn(inner, inner, stride=stride, groups=inner), nn.SiLU(inplace=True)),
            SqueezeExcitation(inner, 2),
            nn.Sequential(*conv_bn(inner, out_channels, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if not self.use_res_connect:
            return result
        if self.training:
            survival = 1.0 - self.drop
            noise = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(survival)
            result = result * noise.div_(survival)
        result += x
        return result


class InvertedResidual(nn.Module):
    """Sandler et al., 2018 (arXiv:1801.04381): ReLU6, a linear bottleneck, a sum without ReLU."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        inner = 2 * channels
        self.use_res_connect = stride == 1 and channels == out_channels
        self.conv = nn.Sequential(
            nn.Sequential(*conv_bn(channels, inner, 1), nn.ReLU6(inplace=True)),
            nn.Sequential(*conv_bn(inner, inner, stride=stride, groups=inner), nn.ReLU6(inplace=True)),
            *conv_bn(inner, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class DenseLayer(nn.Module):
    """Huang et al., 2016 (arXiv:1608.06993): BN, ReLU, convolution; takes a map or the list of all maps before."""

    def __init__(self, channels: int, growth: int, efficient: bool) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 2 * growth, kernel_size=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * growth, growth, kernel_size=3, padding=1, bias=False)
        self.efficient = efficient

    def bottleneck(self, *maps: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        maps = [x] if isinstance(x, Tensor) else x
        if self.efficient and any(m.requires_grad for m in maps):
            inner = checkpoint(self.bottleneck, *maps, use_reentrant=False)
        else:
            inner = self.bottleneck(*maps)
        return self.conv2(self.relu2(self.norm2(inner)))


class DenseNet(nn.Module):
    def __init__(self, efficient: bool = False) -> None:
        super().__init__()
        self.conv0, self.norm0, self.pool0 = conv(3, 6, 7, stride=2, bias=False), nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1)
        self.layers = nn.ModuleList(DenseLayer(6 + 4 * index, 4, efficient) for index in range(3))
        self.transition = nn.Sequential(
            *(nn.BatchNorm2d(18), nn.ReLU(inplace=True), nn.Conv2d(18, 8, 1, bias=False), nn.AvgPool2d(2, stride=2))
        )
        self.norm5, self.classifier = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.pool0(F.relu(self.norm0(self.conv0(x))))]
        for layer in self.layers:
            maps.append(layer(maps))
        x = F.relu(self.norm5(self.transition(torch.cat(maps, 1))), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class UNet(nn.Module):
    """Ronneberger et al., 2015 (arXiv:1505.04597): what is pooled is skipped too."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self._double(1, 4), self._double(4, 6), self._double(6, 8)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.merge2 = nn.ConvTranspose2d(8, 6, 2, stride=2), self._double(12, 6)
        self.up1, self.merge1 = nn.ConvTranspose2d(6, 4, 2, stride=2), self._double(8, 4)
        self.out = nn.Conv2d(4, 2, kernel_size=1)

    @staticmethod
    def _double(channels: int, width: int) -> nn.Sequential:
        return nn.Sequential(*conv_bn(channels, width), nn.ReLU(inplace=True), *conv_bn(width, width), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.down1(x)
        skip2 = self.down2(self.pool(skip1))
        x = self.bottom(self.pool(skip2))
        x = self.merge2(torch.cat([skip2, self.up2(x)], dim=1))
        x = self.merge1(torch.cat([skip1, self.up1(x)], dim=1))
        return self.out(x)


def _ends(channels: int, *blocks: nn.Module, stem: bool = True) -> nn.Sequential:
    """A stem, blocks, and a head of `channels` in."""
    first = [*conv_bn(3, 4), nn.ReLU(inplace=True)] if stem else [conv(3, 4)]
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


NETS = [
    Net("resnet_basic", lambda: ResNet(BasicBlock, 8), image(3, 32, 4)),
    Net("resnet_bottleneck", lambda: ResNet(Bottleneck, 4), image(3, 32, 4)),
    Net("resnext", lambda: ResNet(Bottleneck, 4, groups=4), image(3, 32, 4)),
    Net("residual_sequential", lambda: _ends(6, Residual(4, 4), Residual(4, 6, 2)), image(3, 12, 4)),
    Net("residual_relu_made", lambda: _ends(6, Residual(4, 4, made=True), Residual(4, 6, 2, made=True)), image(3, 12, 4)),
    Net("preact_resnet", lambda: _ends(6, PreActBlock(4, 4), PreActBlock(4, 6, 2), stem=False), image(3, 12, 4)),
    Net("preact_in_place", lambda: _ends(4, InPlacePreAct(4), InPlacePreAct(4), stem=False), image(3, 12, 4)),
    Net("efficientnet", lambda: _ends(6, MBConv(4, 4), MBConv(4, 6, 2), MBConv(6, 6)), image(3, 16, 4)),
    Net("mobilenet_v2", lambda: _ends(6, InvertedResidual(4, 4), InvertedResidual(4, 6, 2)), image(3, 16, 4)),
    Net("densenet", DenseNet, image(3, 32, 4)),
    Net("densenet_checkpointed", lambda: DenseNet(efficient=True), image(3, 32, 4)),
    Net("unet", UNet, image(1, 16)),
]
