"""The zoo's nets of the literature without skips: true order of layers, usual names and calls, few channels."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_case import Net, image


class LeNet5(nn.Module):
    """LeCun et al., 1998, with ReLU and max-pool as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class LeNet5Modules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Linear(400, 84), nn.ReLU(), nn.Linear(84, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(x.size(0), -1))


class MNIST(nn.Module):
    """The two convolutions of many a first program: the pool comes before the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, kernel_size=5), nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = x.view(-1, 320)
        x = F.relu(self.fc1(x))
        x = F.dropout(x, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class AlexNet(nn.Module):
    """Krizhevsky, 2014 (arXiv:1404.5997)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, kernel_size=11, stride=4, padding=2), nn.ReLU(inplace=True)),
            nn.MaxPool2d(kernel_size=3, stride=2),
            *(nn.Conv2d(8, 12, kernel_size=5, padding=2), nn.ReLU(inplace=True)),
            nn.MaxPool2d(kernel_size=3, stride=2),
            *(nn.Conv2d(12, 16, kernel_size=3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(16, 12, kernel_size=3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(12, 12, kernel_size=3, padding=1), nn.ReLU(inplace=True)),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            *(nn.Dropout(p=0.5), nn.Linear(12 * 2 * 2, 32), nn.ReLU(inplace=True)),
            *(nn.Dropout(p=0.5), nn.Linear(32, 32), nn.ReLU(inplace=True)),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


_VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Simonyan and Zisserman, 2014 (arXiv:1409.1556): convolutions of each stage, then a pool."""

    def __init__(self, depth: int, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, convs in zip((4, 6, 8, 8, 8), _VGG[depth], strict=True):
            for _ in range(convs):
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)] if batch_norm else [nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            *(nn.Linear(8 * 7 * 7, 24), nn.ReLU(True), nn.Dropout()),
            *(nn.Linear(24, 24), nn.ReLU(True), nn.Dropout()),
            nn.Linear(24, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def network_in_network() -> nn.Sequential:
    """Lin et al., 2013 (arXiv:1312.4400): 1×1 convolutions, dropout between the blocks, an average of the whole map."""

    def mlpconv(channels: int, out_channels: int, kernel: int, last: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for width, size in ((out_channels, kernel), (out_channels, 1), (last, 1)):
            layers += [nn.Conv2d(channels, width, size, padding=size // 2), nn.ReLU(inplace=True)]
            channels = width
        return layers

    return nn.Sequential(
        *mlpconv(3, 12, 5, 8),
        *(nn.MaxPool2d(3, stride=2, padding=1), nn.Dropout(0.5)),
        *mlpconv(8, 12, 5, 12),
        *(nn.AvgPool2d(3, stride=2, padding=1), nn.Dropout(0.5)),
        *mlpconv(12, 12, 3, 10),
        *(nn.AvgPool2d(8, stride=1), nn.Flatten()),
    )


class BasicConv2d(nn.Module):
    def __init__(self, channels: int, out_channels: int, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, bias=False, **settings)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(channels, 4, kernel_size=1)
        self.branch2 = nn.Sequential(BasicConv2d(channels, 3, kernel_size=1), BasicConv2d(3, 6, kernel_size=3, padding=1))
        self.branch3 = nn.Sequential(BasicConv2d(channels, 2, kernel_size=1), BasicConv2d(2, 3, kernel_size=3, padding=1))
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True), BasicConv2d(channels, 3, kernel_size=1)
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._forward(x), 1)


class InceptionAux(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = BasicConv2d(channels, 8, kernel_size=1)
        self.fc1, self.fc2, self.dropout = nn.Linear(32, 16), nn.Linear(16, 5), nn.Dropout(p=0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, (2, 2))
        x = torch.flatten(self.conv(x), 1)
        return self.fc2(self.dropout(F.relu(self.fc1(x), inplace=True)))


GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])


class GoogLeNet(nn.Module):
    """Szegedy et al., 2014 (arXiv:1409.4842), with normalisations, and both auxiliary heads in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = BasicConv2d(3, 8, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(8, 8, kernel_size=1)
        self.conv3 = BasicConv2d(8, 12, kernel_size=3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a, self.inception4a, self.inception4b = Inception(12), Inception(16), Inception(16)
        self.maxpool3 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.aux1, self.aux2 = InceptionAux(16), InceptionAux(16)
        self.avgpool, self.dropout, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(p=0.4), nn.Linear(16, 5)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.inception3a(x)
        aux1 = self.aux1(x) if self.training else None
        x = self.inception4a(self.maxpool3(x))
        aux2 = self.aux2(x) if self.training else None
        x = torch.flatten(self.avgpool(self.inception4b(x)), 1)
        return self.fc(self.dropout(x)), aux2, aux1

    def forward(self, x: Tensor) -> Any:
        x, aux1, aux2 = self._forward(x)
        return GoogLeNetOutputs(x, aux2, aux1) if self.training else x


class Fire(nn.Module):
    """Iandola et al., 2016 (arXiv:1602.07360): two convolutions read one ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.squeeze_activation = nn.Conv2d(channels, 4, 1), nn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_activation = nn.Conv2d(4, 6, 1), nn.ReLU(inplace=True)
        self.expand3x3, self.expand3x3_activation = nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat([self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1)


def squeezenet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, kernel_size=3, stride=2), nn.ReLU(inplace=True)),
        nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
        *(Fire(8), Fire(12), nn.Dropout(p=0.5)),
        *(nn.Conv2d(12, 5, kernel_size=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
    )


class CarTruck(nn.Module):
    """Two classes from small images: conv–BN–ReLU–pool blocks, the head a mean over the map."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        self.block2 = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.block3 = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.classifier = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(x)))
        return self.classifier(x.mean((2, 3)))


NETS = [
    Net("lenet5", LeNet5, image(1, 32)),
    Net("lenet5_modules", LeNet5Modules, image(1, 28)),
    Net("mnist", MNIST, image(1, 28)),
    Net("alexnet", AlexNet, image(3, 64)),
    *(
        Net(f"vgg{depth}{'_bn' * norm}", lambda depth=depth, norm=norm: VGG(depth, norm), image(3, 32, 4))
        for norm in (False, True)
        for depth in _VGG
    ),
    Net("network_in_network", network_in_network, image(3, 32), drops=True),
    Net("googlenet", GoogLeNet, image(3, 48, 4)),
    Net("squeezenet", squeezenet, image(3, 32), drops=True),
    Net("car_truck", CarTruck, image(3, 24)),
]
