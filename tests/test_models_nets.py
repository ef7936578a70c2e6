"""The nets of the field beside the recipe's and VGG: numbers of the literature, keys, what is fused, the same function."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from agreement import Life, assert_agrees, fresh, live, sgd
from torch import nn
from zoo_case import Net, image

from fastconv import convert
from fastconv import nn as fast
from fastconv.convert import convert_with_report
from fastconv.models import alexnet, car_truck, lenet5, mnist_net, network_in_network, recipe_net

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": lenet5,
    "mnist_net": mnist_net,
    "alexnet": alexnet,
    "car_truck": car_truck,
    "network_in_network": network_in_network,
    "recipe_net": lambda **options: recipe_net(32, batch_norm=True, **options),
}


def _linear(features: int, units: int) -> int:
    return (features + 1) * units


def _conv(channels: int, width: int, kernel: int) -> int:
    return (channels * kernel**2 + 1) * width


# What the sources state, and layer by layer.
PARAMETERS = {
    "lenet5": (44_426, [_conv(1, 6, 5), _conv(6, 16, 5), _linear(256, 120), _linear(120, 84), _linear(84, 10)]),
    "mnist_net": (3_274_634, [_conv(1, 32, 5), _conv(32, 64, 5), _linear(3136, 1024), _linear(1024, 10)]),
    "alexnet": (
        61_100_840,
        [
            *(_conv(3, 64, 11), _conv(64, 192, 5), _conv(192, 384, 3), _conv(384, 256, 3), _conv(256, 256, 3)),
            *(_linear(9216, 4096), _linear(4096, 4096), _linear(4096, 1000)),
        ],
    ),
    # A norm's weight and bias in place of a bias: one parameter a channel more.
    "car_truck": (93_153, [_conv(3, 32, 7) + 32, _conv(32, 64, 5) + 64, _conv(64, 64, 3) + 64, _linear(64, 1)]),
    "network_in_network": (
        966_986,
        [
            *(_conv(3, 192, 5), _conv(192, 160, 1), _conv(160, 96, 1)),
            *(_conv(96, 192, 5), _conv(192, 192, 1), _conv(192, 192, 1)),
            *(_conv(192, 192, 3), _conv(192, 192, 1), _conv(192, 10, 1)),
        ],
    ),
    "recipe_net": (4_690_506 + 64 * 2 + 128 * 2 + 256 * 2 + 512 * 2, []),
}


@pytest.mark.parametrize("layers", ["fastconv", "torch"])
@pytest.mark.parametrize("name", BUILDERS)
def test_parameters(name: str, layers: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in BUILDERS[name](layers=layers).parameters())
    stated, by_layer = PARAMETERS[name]
    assert count == stated
    assert not by_layer or count == sum(by_layer)


KEYS = {
    "lenet5": ["features.0", "features.3", "classifier.0", "classifier.2", "classifier.4"],
    "mnist_net": ["features.0", "features.3", "classifier.0", "classifier.3"],
    # torchvision's.
    "alexnet": [
        *("features.0", "features.3", "features.6", "features.8", "features.10"),
        *("classifier.1", "classifier.4", "classifier.6"),
    ],
    "network_in_network": [f"features.{place}" for place in (0, 2, 4, 8, 10, 12, 16, 18, 20)],
}


@pytest.mark.parametrize("layers", ["fastconv", "torch"])
@pytest.mark.parametrize("name", KEYS)
def test_keys(name: str, layers: str) -> None:
    with torch.device("meta"):
        keys = list(BUILDERS[name](layers=layers).state_dict())
    assert keys == [f"{layer}.{part}" for layer in KEYS[name] for part in ("weight", "bias")]


POOLED, RELU = fast.ConvReLUMaxPool2d, fast.ConvReLU2d
NORM, NORM_POOLED = (fast.Conv2d, fast.BatchNormReLU2d), (fast.Conv2d, fast.BatchNormReLUMaxPool2d)
FEATURES: dict[str, list[type[nn.Module]]] = {
    "lenet5": [POOLED, POOLED],
    "mnist_net": [POOLED, POOLED],
    "alexnet": [POOLED, POOLED, RELU, RELU, POOLED],
    "car_truck": [*NORM_POOLED] * 3,
    "network_in_network": [
        *(RELU, RELU, POOLED, nn.Dropout),
        *(RELU, RELU, RELU, fast.AvgPool2d, nn.Dropout),
        *(RELU, RELU, RELU),
    ],
    "recipe_net": [*NORM, *NORM_POOLED] * 3 + [*NORM, *NORM],
}


@pytest.mark.parametrize("name", FEATURES)
def test_every_convolution_is_fused(name: str) -> None:
    with torch.device("meta"):
        features = BUILDERS[name]().features
        _, report = convert_with_report(BUILDERS[name](layers="torch"))
    assert type(features) is fast.ConvChain
    assert [type(layer) for layer in features if type(layer) is not nn.Identity] == FEATURES[name]
    done = {layer.path: layer.done for layer in report if layer.kind == "Conv2d"}
    assert done and set(done.values()) == {"fused"}
    assert len(done) == sum(isinstance(layer, nn.Conv2d) for layer in features)


@pytest.mark.parametrize("name", BUILDERS)
def test_both_kinds_of_layers_start_alike(name: str) -> None:
    states = []
    for layers in ("fastconv", "torch"):
        torch.manual_seed(5)
        states.append(BUILDERS[name](layers=layers).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def _recipe_net(downsample: str) -> nn.Module:
    return recipe_net(16, in_channels=1, width=4, max_width=16, downsample=downsample, batch_norm=True, layers="torch")


def _features_of_alexnet() -> nn.Module:
    """Its classifier is 55 million parameters of plain Linears."""
    with torch.device("meta"):
        net = alexnet(layers="torch")
    net.classifier = nn.Flatten()
    net.to_empty(device="cpu")
    for module in net.features:
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return net


LIVES = {
    entry.name: entry
    for entry in (
        Net("lenet5", lambda: lenet5(layers="torch"), image(1, 28)),
        Net("mnist_net", lambda: mnist_net(layers="torch"), image(1, 28)),
        Net("alexnet", _features_of_alexnet, image(3, 63)),
        Net("car_truck", lambda: car_truck(layers="torch"), image(3, 24)),
        Net("network_in_network", lambda: network_in_network(layers="torch"), image(3, 10), drops=True),
        Net("recipe_net max", lambda: _recipe_net("max"), image(1, 16)),
        Net("recipe_net conv", lambda: _recipe_net("conv"), image(1, 16)),
    )
}


@cache
def _life(name: str, dtype: torch.dtype) -> Life:
    net = fresh(LIVES[name], dtype)
    return live(LIVES[name], net, sgd(net, LIVES[name]), dtype)


@pytest.mark.parametrize("name", LIVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_both_kinds_of_layers_are_one_function(name: str, dtype: torch.dtype) -> None:
    """Outputs, gradients and running statistics, in training (dropout drawn alike) and in evaluation."""
    assert_agrees(
        LIVES[name], lambda net: convert(net, inplace=True), dtype, (_life(name, dtype), _life(name, torch.float64))
    )


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("alexnet", (63, 90), (2, 1000)),
        ("car_truck", (8, 21), (2, 1)),
        ("car_truck", (128, 128), (2, 1)),
        ("network_in_network", (4, 33), (2, 10)),
        ("network_in_network", (32, 32), (2, 10)),
    ],
)
def test_sizes(name: str, size: tuple[int, int], shape: tuple[int, int]) -> None:
    with torch.device("meta"):
        assert BUILDERS[name]()(torch.empty(2, 3, *size)).shape == shape


def test_maps_of_network_in_network_are_halved_exactly() -> None:
    """As Caffe's pools, which round up."""
    with torch.device("meta"):
        features = network_in_network(layers="torch").features
        assert features[:8](torch.empty(1, 3, 32, 32)).shape == (1, 96, 16, 16)
        assert features(torch.empty(1, 3, 32, 32)).shape == (1, 10, 8, 8)


@pytest.mark.parametrize("name", ["mnist_net", "alexnet", "network_in_network"])
def test_dropout(name: str) -> None:
    with torch.device("meta"):
        default, chosen = (
            [module.p for module in BUILDERS[name](**options).modules() if isinstance(module, nn.Dropout)]
            for options in ({}, {"dropout": 0.25})
        )
    assert set(default) == {0.5} and set(chosen) == {0.25} and len(default) == len(chosen)


WRONG = ({"num_classes": 0}, {"in_channels": -1}, {"layers": "jax"})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [(name, wrong) for name in BUILDERS for wrong in WRONG if name != "car_truck" or "num_classes" not in wrong],
    ids=str,
)
def test_arguments(name: str, wrong: dict[str, object]) -> None:
    (argument,) = wrong
    with torch.device("meta"), pytest.raises(ValueError, match=f"{name}: {argument} must be .*{wrong[argument]}"):
        BUILDERS[name](**wrong)


def test_norms_of_the_recipe_net_are_asked_for() -> None:
    """Without them keys are those of former checkpoints; with them no convolution has a bias."""
    with torch.device("meta"):
        plain, normed = recipe_net(16, width=4), recipe_net(16, width=4, batch_norm=True)
    places = [f"features.{place}" for place in (0, 2, 5, 7, 10, 12)]
    assert list(plain.state_dict()) == [
        f"{layer}.{part}" for layer in [*places, "classifier"] for part in ("weight", "bias")
    ]
    assert all(module.bias is None for module in normed.modules() if isinstance(module, nn.Conv2d))
