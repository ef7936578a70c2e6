"""fastconv.convert on torchvision's and timm's own definitions of nets: random weights, small images."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from agreement import Life, assert_agrees, fresh, live, sgd
from public_nets import public_models
from torch import nn
from zoo_case import Net, image

from fastconv import convert

pytestmark = pytest.mark.slow

_TORCHVISION: dict[str, dict[str, Any]] = {
    "alexnet": {},
    "vgg11_bn": {},
    "googlenet": {"aux_logits": True, "init_weights": False},
    "resnet18": {},
    "resnet50": {},
    "resnext50_32x4d": {},
    "efficientnet_b0": {},
    "densenet121": {},
    "mobilenet_v2": {},
    "squeezenet1_1": {},
}
_TIMM = ("resnet18", "resnet50d", "convnext_atto", "regnetx_002")
_SIZES = {"squeezenet1_1": 48, "convnext_atto": 32}


def _make(package: str, name: str) -> Callable[[], nn.Module]:
    models = public_models(package)
    if isinstance(models, str):
        pytest.skip(models)
    if package == "timm":
        return lambda: models.create_model(name, pretrained=False, num_classes=10)
    return lambda: _small_head(getattr(models, name)(weights=None, num_classes=10, **_TORCHVISION[name]))


def _small_head(net: nn.Module) -> nn.Module:
    """AlexNet's and VGG's hidden layers of 4096 hold nearly all of the parameters, and nothing that is converted."""
    head = getattr(net, "classifier", None)
    if isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear) and head[-1].in_features == 4096:
        features = next(layer.in_features for layer in head if isinstance(layer, nn.Linear))
        net.classifier = nn.Sequential(nn.Dropout(), nn.Linear(features, 32), nn.ReLU(inplace=True), nn.Linear(32, 10))
    return net


@lru_cache(maxsize=1)  # the next test is of the same net
def _original(package: str, name: str) -> tuple[Net, Life]:
    images, drops = image(3, _SIZES.get(name, 64)), name.startswith("squeeze")
    entry = Net(f"{package} {name}", _make(package, name), images, drops=drops, learning_rate=1e-4)
    return entry, _life(entry, torch.float64)


def _life(entry: Net, dtype: torch.dtype) -> Life:
    net = fresh(entry, dtype)
    return live(entry, net, sgd(net, entry), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("package", "name"), [*(("torchvision", name) for name in _TORCHVISION), *(("timm", name) for name in _TIMM)]
)
def test_agrees(package: str, name: str, dtype: torch.dtype) -> None:
    entry, oracle = _original(package, name)
    assert_agrees(entry, convert, dtype, (oracle if dtype == torch.float64 else _life(entry, dtype), oracle))
