"""fastconv.convert: what is fused, what is swapped, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastconv import convert
from fastconv import nn as fast


def _conv(channels: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, 4, 3, padding=1)


def _kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(layer) for layer in model.children()]


class Residual(nn.Module):
    """Layers outside a Sequential, called in an order that only `forward` knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1, self.conv2 = _conv(4), nn.ReLU(), _conv(4)
        self.pool, self.mean, self.global_mean = nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((1, 1))
        self.resize = nn.AdaptiveAvgPool2d((7, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.global_mean(self.mean(self.pool(self.relu1(self.conv2(self.relu1(self.conv1(x))) + x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.5))
        self.block = Residual()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.stem(x))


def test_chains() -> None:
    model = nn.Sequential(
        *(_conv(), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        *(_conv(4), nn.ReLU()),
        *(_conv(4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(_conv(4), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)),
    )
    converted = convert(model)
    assert _kinds(converted) == [
        *(fast.ConvReLUMaxPool2d, nn.Identity, nn.Identity),
        *(fast.ConvReLU2d, nn.Identity),
        *(fast.Conv2d, fast.BatchNormReLUMaxPool2d, nn.Identity, nn.Identity),
        *(fast.ConvReLU2d, nn.Identity, fast.MaxPool2d),
    ]
    assert type(converted) is fast.ConvChain, "two fused convolutions follow each other"
    assert (converted[0].pool_kernel_size, converted[0].pool_stride, converted[0].pool_padding) == (3, 2, 1)
    assert converted[0].pool_ceil_mode is True
    x = torch.randn(2, 3, 32, 32)
    for y, expected in zip(converted(x), model(x), strict=True):
        torch.testing.assert_close(y, expected)


def test_single_layers_elsewhere() -> None:
    converted = convert(Net())
    assert _kinds(converted.stem) == [fast.ConvReLUMaxPool2d, nn.Identity, nn.Identity, nn.Dropout]
    assert _kinds(converted.block) == [
        *(fast.Conv2d, nn.ReLU, fast.Conv2d),
        *(fast.MaxPool2d, fast.AvgPool2d, fast.GlobalAvgPool2d, nn.AdaptiveAvgPool2d),
    ]


def test_same_function_names_and_parameters() -> None:
    model = Net().eval()
    model.stem[0].weight.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    converted = convert(model)
    assert [name for name, _ in converted.named_modules()] == names
    assert list(converted.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(converted.parameters(), model.parameters(), strict=True))
    assert not any(module.training for module in converted.modules())
    assert not converted.stem[0].weight.requires_grad
    assert type(model.stem[0]) is nn.Conv2d, "the original is not touched"
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(converted(x), model(x))
    converted.load_state_dict(copy.deepcopy(model.state_dict()))
    model.load_state_dict(converted.state_dict())


def test_gradients_reach_the_shared_parameters() -> None:
    model = Net().eval()
    x = torch.randn(2, 3, 16, 16)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    convert(model)(x).sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_inplace_and_idempotent() -> None:
    model = Net()
    assert convert(model, inplace=True) is model
    kinds = [type(module) for module in model.modules()]
    layers = list(model.modules())
    convert(model, inplace=True)
    assert [type(module) for module in model.modules()] == kinds
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True)), "nothing is made anew"


def test_fastconv_layers_are_fused_too() -> None:
    assert _kinds(convert(nn.Sequential(fast.Conv2d(3, 4, 3), nn.ReLU(), fast.MaxPool2d(2)))) == [
        *(fast.ConvReLUMaxPool2d, nn.Identity, nn.Identity)
    ]


def test_a_single_layer() -> None:
    assert type(convert(nn.MaxPool2d(2))) is fast.MaxPool2d
    with pytest.raises(TypeError, match="model must be a torch"):
        convert("vgg16")


class Subclass(nn.Conv2d):
    pass


def _hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


def _patched(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x
    return layer


def _buffered(layer: nn.Module) -> nn.Module:
    layer.register_buffer("mask", torch.ones(1))
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: Subclass(3, 4, 3),
        lambda: _hooked(_conv()),
        lambda: _patched(_conv()),
        lambda: _buffered(_conv()),
        lambda: parametrizations.weight_norm(_conv()),
        lambda: nn.utils.weight_norm(_conv()),
        lambda: nn.utils.spectral_norm(_conv()),
        lambda: nn.LazyConv2d(4, 3),
        lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex64),
    ],
    ids=["subclass", "hook", "patched", "buffer", "parametrized", "weight_norm", "spectral_norm", "lazy", "complex"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_convolutions_left_alone(make: Callable[[], nn.Module]) -> None:
    conv = make()
    converted = convert(nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2)))
    expected = parametrize.type_before_parametrizations(conv)
    assert parametrize.type_before_parametrizations(converted[0]) is expected
    assert _kinds(converted)[1:] == [nn.ReLU, fast.MaxPool2d]
    assert type(convert(conv)) is type(conv) or parametrize.is_parametrized(conv)


def test_a_hook_splits_the_chain() -> None:
    assert _kinds(convert(nn.Sequential(_conv(), _hooked(nn.ReLU()), nn.MaxPool2d(2)))) == [
        *(fast.Conv2d, nn.ReLU, fast.MaxPool2d)
    ]
    assert _kinds(convert(nn.Sequential(_conv(), nn.ReLU(), _hooked(nn.MaxPool2d(2))))) == [
        *(fast.ConvReLU2d, nn.Identity, nn.MaxPool2d)
    ]


def test_shared_layers_are_left_alone() -> None:
    conv, relu = _conv(3), nn.ReLU()
    model = nn.Sequential(conv, relu, _conv(4), relu)
    model.tap = conv
    converted = convert(model)
    assert type(converted[0]) is nn.Conv2d
    assert converted[0] is converted.tap
    assert type(converted[1]) is nn.ReLU, "what comes before it stays"
    assert _kinds(converted)[2:4] == [fast.ConvReLU2d, nn.Identity], "a ReLU holds nothing that is shared"


def test_a_layer_used_twice_still_parts_its_neighbours() -> None:
    double = nn.Hardtanh()
    model = nn.Sequential(double, _conv(), double, nn.ReLU())
    assert _kinds(convert(model)) == [nn.Hardtanh, fast.Conv2d, nn.ReLU]
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(convert(model)(x), model(x))


def test_tied_weights_stay_tied() -> None:
    a, b = _conv(4), _conv(4)
    b.weight = a.weight
    converted = convert(nn.Sequential(a, nn.ReLU(), b, nn.ReLU()))
    assert converted[0].weight is converted[2].weight is a.weight


class Taps(nn.Sequential):
    """A Sequential whose forward is its own: what lies between its layers may be used."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        taps = []
        for layer in self:
            x = layer(x)
            taps.append(x)
        return taps


def test_a_sequential_with_its_own_forward_is_not_fused() -> None:
    patched = nn.Sequential(_conv(), nn.ReLU())
    patched.forward = lambda x: patched[0](x)
    assert _kinds(convert(patched, inplace=True)) == [fast.Conv2d, nn.ReLU]
    assert _kinds(convert(Taps(_conv(), nn.ReLU(), nn.MaxPool2d(2)))) == [fast.Conv2d, nn.ReLU, fast.MaxPool2d]


def test_a_sequential_that_is_more_than_one_becomes_no_chain() -> None:
    patched, tapped, single = (
        kind(*(fast.ConvReLU2d(3, 3, 1) for _ in range(count)))
        for kind, count in ((nn.Sequential, 2), (Taps, 2), (nn.Sequential, 1))
    )
    patched.forward = lambda x: patched[0](x)
    for model in (patched, tapped, single):
        assert type(convert(model, inplace=True)) is type(model) is not fast.ConvChain
    both = nn.Sequential(nn.Sequential(*(fast.ConvReLU2d(3, 3, 1) for _ in range(2))), nn.Sequential(_conv(), nn.ReLU()))
    assert [type(part) for part in convert(both)] == [fast.ConvChain, nn.Sequential]
