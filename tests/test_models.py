"""The models: sizes, keys, initial weights, and the same function on either kind of layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastconv import nn as fast
from fastconv.models import recipe_net, vgg

# torchvision's numbers for 1000 classes, without and with batch normalisation.
VGG_PARAMETERS = {
    11: (132_863_336, 132_868_840),
    13: (133_047_848, 133_053_736),
    16: (138_357_544, 138_365_992),
    19: (143_667_240, 143_678_248),
}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _conv(out_channels: int, in_channels: int, kernel: int = 3) -> int:
    return out_channels * in_channels * kernel * kernel + out_channels


@pytest.mark.parametrize("layers", ["fastconv", "torch"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("depth", VGG_PARAMETERS)
def test_vgg_parameters(depth: int, batch_norm: bool, layers: str) -> None:
    with torch.device("meta"):
        model = vgg(depth, batch_norm=batch_norm, layers=layers)
        assert _count(model) == VGG_PARAMETERS[depth][batch_norm]
        assert model(torch.empty(2, 3, 64, 96)).shape == (2, 1000)


def test_vgg_keys_are_torchvisions() -> None:
    with torch.device("meta"):
        keys = list(vgg(16, layers="fastconv").state_dict())
        with_norm = list(vgg(11, batch_norm=True).state_dict())
    convs = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    expected = [f"features.{n}" for n in convs] + [f"classifier.{n}" for n in (0, 3, 6)]
    assert keys == [f"{name}.{part}" for name in expected for part in ("weight", "bias")]
    assert with_norm[:7] == [
        *("features.0.weight", "features.0.bias", "features.1.weight", "features.1.bias"),
        *("features.1.running_mean", "features.1.running_var", "features.1.num_batches_tracked"),
    ]


def test_vgg_arguments() -> None:
    with torch.device("meta"):
        for depth in (11, 13, 16, 19):
            assert _count(vgg(depth, num_classes=10)) == VGG_PARAMETERS[depth][0] - 990 * 4097
    with pytest.raises(ValueError, match="depth=12"):
        vgg(12)
    with pytest.raises(ValueError, match="num_classes=0"):
        vgg(11, num_classes=0)


def test_vgg_is_one_chain() -> None:
    with torch.device("meta"):
        features = vgg(16).features
    assert type(features) is fast.ConvChain
    assert [len(part) for part in fast.ConvChain.parts(features)] == [13]
    kinds = [type(layer) for layer in features if not isinstance(layer, nn.Identity)]
    assert kinds.count(fast.ConvReLUMaxPool2d) == 5
    assert kinds.count(fast.ConvReLU2d) == 8
    assert len(kinds) == 13


@pytest.mark.parametrize("layers", ["fastconv", "torch"])
def test_recipe_parameters_by_hand(layers: str) -> None:
    with torch.device("meta"):
        small, large = recipe_net(32, layers=layers), recipe_net(224, 1000, layers=layers)
    blocks = _conv(64, 64) + _conv(128, 64) + _conv(128, 128) + _conv(256, 128) + _conv(256, 256)
    blocks += _conv(512, 256) + _conv(512, 512)
    assert _count(small) == _conv(64, 3) + blocks + 512 * 10 + 10 == 4_690_506
    assert _count(large) == _conv(64, 3, 7) + _conv(64, 64) + blocks + 512 * 1000 + 1000


def _maps(model: nn.Sequential, resolution: int, in_channels: int = 3) -> list[tuple[int, int]]:
    """(channels, size) after every convolution of the plain net."""
    seen: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: seen.append((output.shape[1], output.shape[2])))
    model(torch.empty(1, in_channels, resolution, resolution, device="meta"))
    return seen


def test_recipe_maps() -> None:
    with torch.device("meta"):
        assert _maps(recipe_net(32, layers="torch"), 32) == [
            *[(64, 32)] * 2, *[(128, 16)] * 2, *[(256, 8)] * 2, *[(512, 4)] * 2,
        ]  # fmt: skip
        assert _maps(recipe_net(224, layers="torch"), 224) == [
            (64, 112), *[(64, 56)] * 2, *[(128, 28)] * 2, *[(256, 14)] * 2, *[(512, 7)] * 2,
        ]  # fmt: skip
        assert _maps(recipe_net(448, width=32, max_width=128, layers="torch"), 448) == [
            (32, 224), *[(32, 112)] * 2, *[(64, 56)] * 2, *[(128, 28)] * 2, *[(128, 14)] * 2, *[(128, 7)] * 2,
        ]  # fmt: skip
        assert _maps(recipe_net(16, width=8, downsample="conv", layers="torch"), 16) == [
            *[(8, 16)] * 2, (8, 8), *[(16, 8)] * 2, (16, 4), *[(32, 4)] * 2,
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("resolution", "odd", "nearest"), [(36, 9, "28, 32, 40, 48"), (100, 25, "80, 96, 112, 128"), (226, 113, "224, 256")]
)
def test_recipe_resolutions(resolution: int, odd: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"resolution={resolution} leads to a map of {odd}×{odd}.*{nearest}"):
        recipe_net(resolution)


@pytest.mark.parametrize(
    "wrong", [{"resolution": 0}, {"width": 0}, {"max_width": 32}, {"downsample": "avg"}, {"layers": "jax"}], ids=str
)
def test_recipe_arguments(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        recipe_net(**{"resolution": 32, **wrong})


@pytest.mark.parametrize("downsample", ["max", "conv"])
@pytest.mark.parametrize("resolution", [16, 112])
def test_recipe_nets_are_the_same_function(resolution: int, downsample: str) -> None:
    nets = {}
    for layers in ("fastconv", "torch"):
        torch.manual_seed(5)
        nets[layers] = recipe_net(resolution, in_channels=1, width=4, max_width=16, downsample=downsample, layers=layers)
    fused, plain = nets["fastconv"], nets["torch"]
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(fused.parameters(), plain.parameters(), strict=True))
    assert not any(isinstance(module, (nn.ReLU, nn.MaxPool2d)) for module in fused.modules())
    assert type(fused.features) is fast.ConvChain
    assert len(list(fast.ConvChain.parts(fused.features))) == 1

    for a, b in ((fused, plain), (plain, fused)):
        a.load_state_dict({name: tensor + 0.01 for name, tensor in b.state_dict().items()})
    fused.load_state_dict(plain.state_dict())

    # In float64 no winner of a pool and no sign of a ReLU flips between the two.
    fused, plain = fused.double(), plain.double()
    x = torch.randn(2, 1, resolution, resolution, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x))
    fused(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_recipe_initialisation() -> None:
    net = recipe_net(32, layers="torch")
    conv = net.features[2]
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    assert not conv.bias.any()
