"""Nets with a flatten for the tests of fastconv.convolutionize, and how their scores slide over larger images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLATTENS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "product": lambda x: x.view(-1, x.size(1) * x.size(2) * x.size(3)),
}


class LeNet(nn.Module):
    """LeNet-5's structure: no padding, one pool called twice, a forward of its own. For 32×28 images, total stride 4."""

    def __init__(self, flatten: str = "flatten") -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(2, 3, 5), nn.Conv2d(3, 4, 5), nn.MaxPool2d(2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4 * 5 * 4, 7), nn.Linear(7, 6, bias=False), nn.Linear(6, 5)
        self.flatten = flatten

    def forward(self, x: Tensor, log: bool = False) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = FLATTENS[self.flatten](self.pool(torch.relu(self.conv2(x))))
        x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
        x = self.fc3(self.fc2(x).tanh())
        return F.log_softmax(x, dim=-1) if log else x


class AlexNet(nn.Module):
    """AlexNet's structure, with padding and in-place ReLUs, for 63×63 images: maps of 15, 7 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 4, 7, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(4, 6, 5, padding=2), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(inplace=True)),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(5 * 9, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 6)),
            *(nn.ReLU(inplace=True), nn.Linear(6, 5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))

    def dense(self, x: Tensor) -> Tensor:
        """The same layers applied densely."""
        x = self.features(x)
        for layer, size in zip(self.classifier, (0, 3, 0, 0, 1, 0, 1), strict=True):
            x = F.conv2d(x, layer.weight.unflatten(1, (-1, size, size)), layer.bias) if size else layer(x)
        return x


def sequential(*head: nn.Module) -> nn.Sequential:
    """A net without padding for 16×16 images: maps of 14, 7, 5; total stride 2."""
    body = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU())
    return nn.Sequential(*body, *head)


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Tail(nn.Module):
    """The body and a head given as a function of the map and a Linear."""

    def __init__(self, tail: Callable[[Tensor, nn.Linear], Tensor], features: int = 125) -> None:
        super().__init__()
        self.body, self.fc, self.tail = sequential(), nn.Linear(features, features), tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x), self.fc)


@torch.no_grad()
def assert_slides(dense: nn.Module, model: nn.Module, x: Tensor, size: tuple[int, int], stride: int) -> None:
    """Every position of the dense scores is the model's score of its window, and there are as many as windows fit."""
    scores = dense.eval()(x)
    (height, width), model = size, model.eval()
    rows, columns = (x.shape[2] - height) // stride + 1, (x.shape[3] - width) // stride + 1
    assert rows > 1 and columns > 1
    assert scores.shape[2:] == (rows, columns)
    windows = x.unfold(2, height, stride).unfold(3, width, stride)  # (N, C, rows, columns, H, W)
    expected = model(windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)).unflatten(0, (len(x), rows, columns))
    torch.testing.assert_close(scores, expected.permute(0, 3, 1, 2))
