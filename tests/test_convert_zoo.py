"""fastconv.convert on every structure of the zoo: the same outputs, gradients, statistics, keys and side effects."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from agreement import Life, arguments, assert_agrees, fresh, live, sgd
from torch import nn
from torch.utils._pytree import tree_flatten
from zoo import NETS
from zoo_case import Net

from fastconv import convert

BY_NAME = {entry.name: entry for entry in NETS}
# Training or not while it is converted, and inplace.
HOW = {torch.float64: (True, False), torch.float32: (False, False), torch.bfloat16: (True, True)}

# The same blocks a few times more than in nets that stay: slow tests.
DEEPER = {"vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19"}
# In float64 what is lost, doubled or mixed up shows sharply; of the largest nets the other dtypes are slow tests.
LARGE = {"googlenet", "efficientnet", "resnet_bottleneck", "resnext", "mobilenet_v2", "densenet_checkpointed", "vgg19_bn"}


def _run(*values: Any, slow: bool) -> Any:
    return pytest.param(*values, id="-".join(map(str, values)), marks=[pytest.mark.slow] * slow)


every_net = pytest.mark.parametrize("name", [_run(name, slow=name in DEEPER) for name in BY_NAME])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Maps are so small that threads would mostly wait for each other, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def _original(name: str, dtype: torch.dtype) -> Life:
    net = fresh(BY_NAME[name], dtype)
    return live(BY_NAME[name], net, sgd(net, BY_NAME[name]), dtype)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        _run(dtype, name, slow=name in DEEPER or (name in LARGE and dtype != torch.float64))
        for dtype in HOW
        for name in BY_NAME
    ],
)
def test_agrees(dtype: torch.dtype, name: str) -> None:
    training, inplace = HOW[dtype]
    lives = (_original(name, dtype), _original(name, torch.float64))
    assert_agrees(BY_NAME[name], lambda net: convert(net.train(training), inplace=inplace), dtype, lives)


@every_net
def test_names_keys_and_tensors_stay(name: str) -> None:
    net = fresh(BY_NAME[name], torch.float32)
    names, keys, types = _names(net), list(net.state_dict()), _types(net)
    modes = {key: module.training for key, module in net.named_modules(remove_duplicate=False)}
    draws = torch.get_rng_state(), random.getstate()
    converted = convert(net)
    assert torch.equal(torch.get_rng_state(), draws[0]) and random.getstate() == draws[1], "a conversion draws no numbers"
    assert converted is not net and (_names(net), _types(net)) == (names, types), "the original stays as it is"
    assert isinstance(converted, type(net))
    assert _names(converted) == names
    assert {key: module.training for key, module in converted.named_modules(remove_duplicate=False)} == modes
    assert list(converted.state_dict()) == keys
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(converted, kind)(), getattr(net, kind)(), strict=True)
        assert all(a == b and p is q for (a, p), (b, q) in pairs), f"the very {kind}"
    other = fresh(BY_NAME[name], torch.float32)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.add_(1)
    assert not converted.load_state_dict(other.state_dict()).missing_keys
    _assert_equal_states(converted, other)
    assert not other.load_state_dict(copy.deepcopy(converted.state_dict())).missing_keys
    _assert_equal_states(other, converted)


@every_net
def test_twice_is_once(name: str) -> None:
    net = fresh(BY_NAME[name], torch.float32)
    assert convert(net, inplace=True) is net, "no net of the zoo is a single layer"
    modules, types = list(net.modules()), _types(net)
    forwards = [module.forward for module in modules]
    assert convert(net, inplace=True) is net
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True)), "nothing is made anew"
    assert _types(net) == types
    assert [module.forward for module in modules] == forwards
    again = convert(net)
    assert _types(again) == types


@every_net
def test_original_still_works(name: str) -> None:
    """Behind a conversion that is not in place, the original's calls are what they would have been.

    (But for the memory format of the shared Parameters: dropouts draw in its order, and views may need the other.)
    """
    entry, (net, twin) = BY_NAME[name], (fresh(BY_NAME[name], torch.float64) for _ in range(2))
    convert(net, memory_format=None)
    for training in (True, False):
        results = []
        for each in (net, twin):
            each.train(training)
            args, kwargs = arguments(entry, seed=1, dtype=torch.float64)
            torch.manual_seed(2)
            random.seed(2)
            results.append((entry.call(each, *args, **kwargs), entry.seen(each), each.state_dict()))
        (actual, structure), (expected, same) = map(tree_flatten, results)
        assert structure == same
        for leaf, wanted in zip(actual, expected, strict=True):
            if isinstance(leaf, torch.Tensor):
                torch.testing.assert_close(leaf, wanted, rtol=1e-12, atol=1e-12)
            else:
                assert leaf == wanted


def _names(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_modules(remove_duplicate=False)]


def _types(net: nn.Module) -> list[type[Any]]:
    return [type(module) for module in net.modules()]


def _assert_equal_states(actual: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    for key, tensor in actual.state_dict().items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=0, msg=key)


def test_names_are_the_nets() -> None:
    assert len(BY_NAME) == len(NETS)
    assert all(isinstance(entry, Net) for entry in NETS)
    assert BY_NAME.keys() >= DEEPER | LARGE
