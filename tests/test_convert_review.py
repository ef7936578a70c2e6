"""fastconv.convert on forwards that read, write or depend on more than their arguments, and on changes after it."""

from __future__ import annotations

import copy
import logging
import random
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv import convert
from fastconv.convert.rewrite import Rewritten

SHARED: dict[str, Any] = {}
FLAG = 0
_log = logging.getLogger("tests.convert_review")


@pytest.fixture(autouse=True)
def _reset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(globals(), "FLAG", 0)
    monkeypatch.setitem(globals(), "SHARED", {"calls": 0})
    yield


def _conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


class Net(nn.Module):
    """Convolution → ReLU, then `behind`; what `behind` reads is set here."""

    constant = 0

    def __init__(self, before: Callable[..., Any] | None = None, behind: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.pool, self.relu = _conv(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(inplace=True)
        self.body = nn.Sequential(_conv(), nn.BatchNorm2d(4))
        self.inner = nn.Sequential(nn.Sequential(_conv(), nn.BatchNorm2d(4)))
        self.lists = nn.ModuleList([nn.ModuleList([_conv()])])
        self.heads = nn.ModuleDict({"a": _conv(), "b": _conv()})
        self.options, self.config, self.flag = {"flag": 0}, types.SimpleNamespace(flag=0), 0
        self.before, self.behind = before or _same, behind or _first

    def forward(self, x: Tensor) -> Any:
        x = self.before(self, x)
        return self.behind(self, F.relu(self.conv(x)), x)


def _same(net: Net, x: Tensor) -> Tensor:
    return x


def _first(net: Net, y: Tensor, x: Tensor) -> Tensor:
    return y


def _x() -> Tensor:
    return torch.randn(2, 4, 8, 8)


def _assert_agrees(net: nn.Module, change: Callable[[nn.Module], Any] = lambda net: None, rewritten: bool = True) -> None:
    converted = convert(copy.deepcopy(net))
    assert isinstance(converted, Rewritten) is rewritten
    x = _x()
    for each in (net, converted):
        change(each)
    inputs = x.clone(), x.clone()
    torch.testing.assert_close(converted(inputs[0]), net(inputs[1]))
    torch.testing.assert_close(inputs[0], inputs[1])


# What is read


def _in_lists(net: Net, y: Tensor, x: Tensor) -> Tensor:
    for group in net.lists:
        for layer in group:
            y = F.relu(layer(y))
    return y


def _in_heads(net: Net, y: Tensor, x: Tensor) -> list[Tensor]:
    return [F.relu(head(y)) for head in net.heads.values()]


def _set(name: str, value: Any) -> Callable[[nn.Module], Any]:
    return lambda net: setattr(net, name, value)


def _exchange_head(net: Any) -> None:
    net.heads["z"] = net.heads.pop("b")


def _other_order(net: Any) -> None:
    net.heads["a"] = net.heads.pop("a")


class Zeros(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0


CHANGES: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "object": (lambda net, y, x: y + 1 if net.config.flag else y, lambda net: setattr(net.config, "flag", 1)),
    "dict": (lambda net, y, x: y + net.options["flag"], lambda net: net.options.update(flag=1)),
    "global": (lambda net, y, x: y + 1 if FLAG else y, lambda net: globals().update(FLAG=1)),
    "class attribute": (lambda net, y, x: y + 1 if net.constant else y, _set("constant", 1)),
    "name in a string": (lambda net, y, x: y + getattr(net, "flag"), _set("flag", 1)),  # noqa: B009
    "new attribute": (lambda net, y, x: net.extra(y) if hasattr(net, "extra") else y, _set("extra", nn.Tanh())),
    "list in a list": (_in_lists, lambda net: net.lists[0].append(nn.Conv2d(4, 4, 1).requires_grad_(False).apply(_ones))),
    "dict's key": (_in_heads, _exchange_head),
    "dict's order": (_in_heads, _other_order),
    "hook on a Sequential": (
        lambda net, y, x: F.relu(net.body(y) + x),
        lambda net: net.body.register_forward_hook(lambda module, args, output: output * 0),
    ),
    "Sequential exchanged": (
        lambda net, y, x: F.relu(net.body(y) + x),
        lambda net: setattr(net, "body", Zeros(*net.body)),
    ),
    "Sequential's forward": (
        lambda net, y, x: F.relu(net.body(y) + x),
        lambda net: setattr(net.body, "forward", lambda x: x),
    ),
    "inner Sequential": (lambda net, y, x: F.relu(net.inner(y) + x), lambda net: net.inner[0].append(nn.Tanh())),
    "pool's indices": (
        lambda net, y, x: net.pool(F.relu(net.bn(y))),
        lambda net: setattr(net.pool, "return_indices", True),
    ),
}


def _ones(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.ones_(parameter)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_what_the_forward_reads(name: str) -> None:
    behind, change = CHANGES[name]
    _assert_agrees(Net(behind=behind), change)


def test_method_set_on_the_instance() -> None:
    class Method(Net):
        def body_of(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.body_of(x)

    _assert_agrees(Method(), _set("body_of", lambda x: x * 0))


def test_constant_of_the_class() -> None:
    class Constant(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv(x))
            return y + 1 if self.constant else y

    _assert_agrees(Constant(), lambda net: setattr(Constant, "constant", 1))


# What is asked


def _catches(net: Net, x: Tensor) -> Tensor:
    try:
        return x + 1 if x.shape[0] > 1 else x
    except Exception:
        return x


@pytest.mark.parametrize(
    ("before", "rewritten"),
    [(lambda net, x: x.mask if hasattr(x, "mask") else x, True), (_catches, False)],
    ids=["attribute", "caught"],
)
def test_questions_about_arguments(before: Callable[..., Any], rewritten: bool) -> None:
    _assert_agrees(Net(before), rewritten=rewritten)


def test_mode_of_a_child() -> None:
    net = Net(behind=lambda net, y, x: y * 2 if net.bn.training else y)
    _assert_agrees(net, lambda net: net.bn.eval(), rewritten=False)


# What is done beside


def _counts(net: Net, x: Tensor) -> Tensor:
    SHARED["calls"] += 1
    return x


def _rebinds(net: Net, x: Tensor) -> Tensor:
    global FLAG
    FLAG += 1
    return x


def _warns(net: Net, x: Tensor) -> Tensor:
    warnings.warn("seen", stacklevel=1)
    return x


def _logs(net: Net, x: Tensor) -> Tensor:
    _log.info("seen")
    return x


class Draws(Net):
    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) * self.generator.random()


@pytest.mark.filterwarnings("ignore:seen")
@pytest.mark.parametrize("before", [_counts, _rebinds, _warns, _logs, lambda net, x: x * time.perf_counter()])
def test_side_effects_stay(before: Callable[..., Any]) -> None:
    assert not isinstance(convert(Net(before)), Rewritten)


def test_generators_draw_at_each_call() -> None:
    numpy = pytest.importorskip("numpy")
    for generator in (random.Random(0), numpy.random.default_rng(0)):
        converted, x = convert(Draws(generator)), _x()
        assert not torch.equal(converted(x), converted(x))


def test_counter_of_the_class() -> None:
    class Counted(Net):
        def forward(self, x: Tensor) -> Tensor:
            Counted.constant += 1
            return F.relu(self.conv(x))

    converted = convert(Counted())
    before = Counted.constant
    converted(_x())
    assert Counted.constant == before + 1


def test_a_plain_tensor_is_not_counted_up() -> None:
    class Counted(Net):
        def __init__(self) -> None:
            super().__init__()
            self.count = torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return F.relu(self.conv(x))

    net = Counted()
    convert(net)
    assert net.count.item() == 0


# Places in memory


def test_relu_in_place_on_what_others_read() -> None:
    _assert_agrees(Net(behind=lambda net, y, x: (net.pool(net.relu(x)), net.conv(x))), rewritten=False)
    _assert_agrees(Net(behind=lambda net, y, x: (F.max_pool2d(F.relu_(x), 2), y)))


def _late_change(net: Net, y: Tensor, x: Tensor) -> Tensor:
    residual = x * 1
    total = net.body[0](y) + residual
    residual.add_(5)
    return F.relu(total) + residual


@pytest.mark.parametrize("behind", [_late_change, lambda net, y, x: F.relu(net.body[0](y) + y.shape[1])])
def test_residuals(behind: Callable[..., Any]) -> None:
    _assert_agrees(Net(behind=behind))


def _flat(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1)


def test_views_anywhere() -> None:
    class Named(Net):
        def forward(self, x: Tensor) -> Any:
            return _flat(self.body(x)) if x.shape[0] < 100 else x

    class Nested(Net):
        def forward(self, x: Tensor) -> Any:
            return (lambda map: map.view(2, -1))(self.body(x)) if x.shape[0] < 100 else x

    class As(Net):
        def forward(self, x: Tensor) -> Any:
            return self.body(x).view_as(x.reshape(2, -1)) if x.shape[0] < 100 else x

    for kind in (Named, Nested, As):
        _assert_agrees(kind())
