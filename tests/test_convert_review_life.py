"""fastconv.convert around the conversion itself: failures, copies, other threads, profiles, classes and containers."""

from __future__ import annotations

import builtins
import copy
import cProfile
import gc
import pstats
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from test_convert_review import Net, _assert_agrees, _conv, _x
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastconv import convert
from fastconv.convert.rewrite import Rewritten


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter([*self._modules.values()][::-1])


def test_a_sequential_in_another_order() -> None:
    net = Backwards(nn.ReLU(), nn.Tanh(), _conv(), nn.ReLU(), _conv())
    x = _x()
    torch.testing.assert_close(convert(copy.deepcopy(net))(x), net(x))


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
def test_pools_of_integers(kind: Callable[..., nn.Module]) -> None:
    x = torch.randint(0, 9, (2, 4, 8, 8))
    assert torch.equal(convert(kind(2))(x), kind(2)(x))


def test_a_new_instance_of_the_class_runs() -> None:
    made = type(convert(Net()))()
    assert made(_x()).shape == (2, 4, 8, 8)


def test_a_class_that_refuses_subclasses() -> None:
    class Final(Net):
        def __init_subclass__(cls) -> None:
            raise ValueError("final")

    _assert_agrees(Final(), rewritten=False)


def test_a_parametrized_module_loses_its_parametrization() -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return (F.relu(self.conv(x)) * self.scale).view(x.shape[0], -1)

    net = Scaled()
    parametrize.register_parametrization(net, "scale", nn.Tanh())
    convert(net, inplace=True)
    parametrize.remove_parametrizations(net, "scale")
    assert type(net) is Scaled


def test_attributes_that_cannot_be_copied() -> None:
    net = Net()
    net.lock, net.computed, net.hidden = threading.Lock(), [net.conv.weight * 2], [_conv()]
    converted = convert(net)
    assert isinstance(converted, Rewritten) and converted.lock is net.lock
    assert converted.hidden[0] is not net.hidden[0] and converted.hidden[0].weight is net.hidden[0].weight


def test_a_failure_leaves_the_very_attributes() -> None:
    calls: list[int] = []

    class Unequal(Net):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return F.relu(self.conv(x)) * len(calls)

    net = Unequal()
    options, modules = net.options, net._modules
    with pytest.raises(RuntimeError, match="left as it was"):
        convert(net, inplace=True, example_inputs=_x())
    assert net.options is options and net._modules is modules and type(net.conv) is nn.Conv2d


def test_example_inputs_leave_buffers_and_may_give_infinities() -> None:
    class Counted(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            y = F.relu(self.conv(x))
            return torch.cat([y, y.log(), (y - y) / (y - y)])

    net = Counted()
    convert(net, example_inputs=_x())
    assert net.count.item() == 0


def _in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.fixture
def _many_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_many_switches")
def test_threads_that_convert() -> None:
    isinstance_, kinds = builtins.isinstance, []
    threads = [_in_thread(lambda: kinds.extend(type(convert(Net())).__name__ for _ in range(4))) for _ in range(3)]
    for thread in threads:
        thread.join()
    assert builtins.isinstance is isinstance_
    assert kinds == ["FusedNet"] * 12


@pytest.mark.usefixtures("_many_switches")
def test_a_thread_that_runs_the_model() -> None:
    net, x, wrong = Net().eval(), _x(), []
    done = threading.Event()
    with torch.no_grad():
        expected = net(x)

    def serve() -> None:
        while not done.is_set():
            try:
                with torch.no_grad():
                    torch.testing.assert_close(net(x), expected)
            except Exception as error:
                wrong.append(error)

    thread = _in_thread(serve)
    for _ in range(5):
        convert(net, memory_format=None)
    done.set()
    thread.join()
    assert not wrong


def test_profiles_go_on() -> None:
    def behind() -> None: ...

    profile = cProfile.Profile()
    profile.enable()
    convert(Net())
    behind()
    profile.disable()
    assert any(name == "behind" for _, _, name in pstats.Stats(profile).stats)  # type: ignore[attr-defined]


def test_the_collectors_callbacks_are_not_the_forwards() -> None:
    """A monitor that takes the time of each collection, as hypothesis does, with collections all the time."""

    def note(phase: str, info: dict[str, int]) -> None:
        time.perf_counter()

    threshold = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(1)
    try:
        assert isinstance(convert(Net()), Rewritten)
        assert gc.isenabled()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(note)
