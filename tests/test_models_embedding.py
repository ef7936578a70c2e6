"""A feature space of few units before the scores of any net that ends in a Linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastconv.models import build, with_embedding

HEADS = {
    "recipe": ("classifier", 512),
    "lenet5": ("classifier.4", 84),
    "mnist": ("classifier.3", 1024),
    "car_truck": ("classifier", 64),
    "alexnet": ("classifier.6", 4096),
    "vgg11_bn": ("classifier.6", 4096),
}


@pytest.mark.parametrize("layers", ["fastconv", "torch"])
@pytest.mark.parametrize("name", HEADS)
def test_the_last_linear_becomes_two(name: str, layers: str) -> None:
    path, features = HEADS[name]
    with torch.device("meta"):
        net = build(name, layers=layers)
        before = net.state_dict()
        classes = net.get_submodule(path).out_features
        assert with_embedding(net, 2) is net
    after = net.state_dict()
    head = {key: tuple(value.shape) for key, value in after.items() if key.startswith(path)}
    assert head == {
        f"{path}.embedding.weight": (2, features),
        f"{path}.embedding.bias": (2,),
        f"{path}.scores.weight": (classes, 2),
        f"{path}.scores.bias": (classes,),
    }
    assert [key for key in after if key not in head] == [key for key in before if not key.startswith(path)]


def test_both_kinds_of_layers_stay_one_function() -> None:
    nets = {}
    for layers in ("fastconv", "torch"):
        torch.manual_seed(3)
        nets[layers] = with_embedding(build("lenet5", layers=layers), 2).double()
    states = [net.state_dict() for net in nets.values()]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    seen = []
    for net in nets.values():
        embedding = net.get_submodule("classifier.4.embedding")
        embedding.register_forward_hook(lambda module, args, output: seen.append(output))
        net(x).square().sum().backward()
    assert seen[0].shape == (3, 2)
    torch.testing.assert_close(seen[0], seen[1])
    for ours, theirs in zip(*(net.parameters() for net in nets.values()), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_new_layers_are_like_the_old_one() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 5, bias=False, dtype=torch.bfloat16)).eval()
    torch.manual_seed(1)
    with_embedding(net, 3)
    torch.manual_seed(1)
    expected = nn.Linear(8, 3, bias=False, dtype=torch.bfloat16)
    assert torch.equal(net[1].embedding.weight, expected.weight)
    assert net[1].scores.bias is None and net[1].scores.weight.dtype == torch.bfloat16
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize(
    ("net", "units", "message"),
    [
        (nn.Sequential(nn.Linear(4, 2)), 0, "units must be at least 1, got units=0"),
        (nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), 2, "is 1, a BatchNorm1d"),
        (nn.Sequential(nn.Flatten()), 2, "is the Sequential itself"),
        (nn.Linear(4, 2), 2, "is the Linear itself"),
    ],
    ids=["units", "norm", "none", "alone"],
)
def test_refused(net: nn.Module, units: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_embedding(net, units)


def test_network_in_network_has_no_linear() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"the last layer of this one is features.20, a ConvReLU2d"):
        with_embedding(build("nin"), 2)
