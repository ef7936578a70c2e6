"""Which operators a converted net runs: what fastconv.convert says is fused is one call."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from agreement import arguments, fresh
from torch import Tensor, nn
from zoo import NETS

from fastconv import convert, freeze, tuning
from fastconv import nn as fast
from fastconv.convert import convert_with_report
from fastconv.nn import fused

BY_NAME = {entry.name: entry for entry in NETS}
CONV, RELU, POOL = "conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"
NORM, NORM_POOL = "batch_norm_relu", "batch_norm_relu_max_pool2d"


def operators(run: Callable[[], object]) -> Counter[str]:
    """fastconv's operators in their forward direction."""
    tuning.forget()  # remembered choices are not observed
    with tuning.observing() as calls:
        run()
    found: Counter[str] = Counter()
    for call, count in calls.items():
        if call.direction == "forward":
            found[call.op] += count
    return found


@pytest.fixture
def always_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are folded where they may be, however small the map."""
    monkeypatch.setattr(fused, "_folding_pays", lambda *_: True)


# Convolutions with what they run with: in training, in evaluation without gradients. (A pool of overlapping windows and
# one behind a residual are passes of their own inside of the operator.)
EXPECTED: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "lenet5": ({POOL: 2}, {POOL: 2}),
    "mnist": ({POOL: 1, CONV: 1, "max_pool2d": 1}, {POOL: 1, CONV: 1, "max_pool2d": 1}),  # a dropout comes between
    "alexnet": ({CONV: 3, "relu_max_pool2d": 3, RELU: 2}, {CONV: 3, "relu_max_pool2d": 3, RELU: 2}),
    "vgg11": ({POOL: 5, RELU: 3}, {POOL: 5, RELU: 3}),
    "vgg11_bn": ({CONV: 8, NORM_POOL: 5, NORM: 3}, {POOL: 5, RELU: 3}),
    "googlenet": ({CONV: 23, NORM: 23}, {RELU: 21}),  # two auxiliary heads
    "resnet_basic": ({CONV: 10, NORM_POOL: 1, NORM: 8}, {CONV: 2, "relu_max_pool2d": 1, RELU: 8}),
    "resnet_bottleneck": ({CONV: 15, NORM_POOL: 1, NORM: 12}, {CONV: 3, "relu_max_pool2d": 1, RELU: 12}),
    "resnext": ({CONV: 15, NORM_POOL: 1, NORM: 12}, {CONV: 3, "relu_max_pool2d": 1, RELU: 12}),
    "residual_sequential": ({CONV: 6, NORM: 5}, {RELU: 5, CONV: 1}),
    "densenet": ({CONV: 8, NORM_POOL: 1, NORM: 2}, {CONV: 8, "relu_max_pool2d": 1, NORM: 2}),
    "unet": ({CONV: 11, NORM: 10}, {RELU: 10, CONV: 1}),
    "car_truck": ({CONV: 3, NORM_POOL: 2, NORM: 1}, {POOL: 2, RELU: 1}),
    "efficientnet": ({CONV: 16, NORM: 1}, {RELU: 1, CONV: 15}),  # SiLU has no kernel
    "squeezenet": ({CONV: 1, "relu_max_pool2d": 1, RELU: 7}, {CONV: 1, "relu_max_pool2d": 1, RELU: 7}),
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.usefixtures("always_fold")
def test_what_runs(name: str) -> None:
    entry = BY_NAME[name]
    net = convert(fresh(entry, torch.float32))
    args, kwargs = arguments(entry, 0, torch.float32)
    counted = (CONV, RELU, POOL, NORM, NORM_POOL, "relu_max_pool2d") + (("max_pool2d",) if name == "mnist" else ())
    for training, expected in zip((True, False), EXPECTED[name], strict=True):
        net.train(training)
        with torch.set_grad_enabled(training):
            found = operators(lambda: net(*args, **kwargs))
        assert {op: found[op] for op in counted if found[op]} == expected


@pytest.mark.usefixtures("always_fold")
@pytest.mark.parametrize("name", ["resnet_basic", "vgg11_bn"])
def test_folding_waits_for_evaluation_without_gradients(name: str) -> None:
    entry = BY_NAME[name]
    net = convert(fresh(entry, torch.float32)).eval()
    args, kwargs = arguments(entry, 0, torch.float32)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())

    def folded(model: nn.Module) -> bool:
        found = operators(lambda: model(*args, **kwargs))
        return found[NORM] + found[NORM_POOL] == 0

    assert norms and not folded(net), "gradients are wanted"
    with torch.no_grad():
        assert folded(net)
        assert not folded(convert(net, fold_batch_norm=False))
        assert not folded(copy.deepcopy(net).train())
    assert folded(copy.deepcopy(net).requires_grad_(False)), "nothing requires one"


class Block(nn.Module):
    """He et al., 2015: `relu` at two sites, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.pool(self.relu(self.bn2(self.conv2(y)) + x))


def _image() -> Tensor:
    return torch.randn(2, 4, 8, 8)


def _recorder(seen: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, output: seen.append(args[0])


def test_hooks_that_are_added_later_run(always_fold: None) -> None:
    """Each module alone, in training and evaluation: it is called, on what it was called on before."""
    plain = Block()
    for name, _ in plain.named_children():
        for training in (True, False):
            seen: list[Tensor] = []
            x = _image()
            for net in (plain.train(training), convert(plain).train(training)):
                handle = net.get_submodule(name).register_forward_hook(_recorder(seen))
                with torch.no_grad():
                    assert copy.deepcopy(net)(x).shape == (2, 4, 4, 4)
                handle.remove()
            times = 2 if name == "relu" else 1
            assert len(seen) == 2 * times
            for ours, theirs in zip(seen[:times], seen[times:], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_modules_that_are_exchanged_later_run(always_fold: None) -> None:
    for name, other in {
        "bn1": nn.GroupNorm(2, 4),
        "bn2": nn.Identity(),
        "relu": nn.SiLU(),
        "conv2": nn.Conv2d(4, 4, 1),
        "pool": nn.AvgPool2d(2),
    }.items():
        plain = Block()
        net = convert(plain)
        for model in (plain, net):
            setattr(model, name, other)
        for training in (True, False):
            x = _image()
            with torch.no_grad():
                pair = [copy.deepcopy(model).train(training)(x) for model in (net, plain)]
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_synchronised_norms_take_their_places_in_a_rewritten_forward() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(convert(Block()))
    assert type(net.bn1) is nn.SyncBatchNorm
    x = _image()
    expected = Block()
    expected.load_state_dict(net.state_dict())
    torch.testing.assert_close(net.eval()(x), expected.eval()(x), rtol=1e-4, atol=1e-5)


def test_frozen_layers_keep_their_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv2(F.max_pool2d(F.relu(self.conv1(x)), 2)))

    net = convert(Net()).eval()
    frozen = freeze(net)
    assert type(frozen.conv1) is fast.FrozenConv2d
    x = torch.randn(2, 16, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(frozen(x), net(x))
        monkeypatch.setattr(torch, "relu", lambda _: pytest.fail("the ReLU is the convolution's"))
        frozen(x)


def test_a_pool_before_the_relu_is_the_same() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU())
    net = convert(plain)
    assert [type(layer) for layer in net] == [fast.ConvReLUMaxPool2d, nn.Identity, nn.Identity]
    x = torch.randn(2, 3, 10, 10)
    torch.testing.assert_close(net(x), plain(x))


def test_report() -> None:
    net, layers = convert_with_report(nn.Sequential(Block(), nn.Conv2d(4, 4, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(2)))
    found = {layer.path: (layer.kind, layer.done, layer.detail) for layer in layers}
    assert found == {
        "0.conv1": ("Conv2d", "fused", "Conv2d + BatchNorm2d + ReLU"),
        "0.bn1": ("BatchNorm2d", "absorbed", "0.conv1"),
        "0.relu": ("ReLU", "absorbed", "0.conv2"),
        "0.conv2": ("Conv2d", "fused", "Conv2d + BatchNorm2d + add + ReLU + MaxPool2d"),
        "0.bn2": ("BatchNorm2d", "absorbed", "0.conv2"),
        "0.pool": ("MaxPool2d", "absorbed", "0.conv2"),
        "1": ("Conv2d", "swapped", ""),
        "3": ("AdaptiveAvgPool2d", "left", "output_size=2: fastconv has that of 1"),
    }
    assert isinstance(net[0], Block)


def _state(net: nn.Module) -> list[object]:
    return [(name, module, type(module), dict(vars(module))) for name, module in net.named_modules()]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory_format": torch.channels_last_3d}, ValueError, "memory_format must be one of torch.channels_last"),
        ({"memory_format": "NHWC"}, ValueError, "got 'NHWC'"),
        ({"example_inputs": torch.randn(1, 3, 8, 8)}, ValueError, r"does not run on example_inputs=\[\(1, 3, 8, 8\)\]"),
        ({"example_inputs": {"images": _image()}}, ValueError, "unexpected keyword argument 'images'"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(options: dict[str, object], error: type[Exception], message: str) -> None:
    net = Block()
    before = _state(net)
    with pytest.raises(error, match=message):
        convert(net, inplace=True, **options)
    assert _state(net) == before


def test_other_results_on_the_example_undo_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Block()
    before, strides = _state(net), [p.stride() for p in net.parameters()]
    monkeypatch.setattr(fast.Conv2d, "_padded", lambda self, input: (input * 2, self.padding))
    with pytest.raises(RuntimeError, match="left as it was"):
        convert(net, inplace=True, example_inputs=_image())
    assert _state(net) == before and [p.stride() for p in net.parameters()] == strides


def test_nothing_to_swap() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="nothing to swap in this model"):
        converted = convert(net)
    assert [type(module) for module in converted.modules()] == [type(module) for module in net.modules()]


def test_examples_agree_and_formats() -> None:
    net = Block()
    converted = convert(net, example_inputs=(_image(),), memory_format=torch.contiguous_format)
    assert all(p.is_contiguous() for p in converted.parameters())
    assert converted.conv1.weight is net.conv1.weight
    assert convert(net).conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert net.conv1.weight.is_contiguous(memory_format=torch.channels_last), "Parameters are shared"
    unfused = convert(net, fuse=False)
    assert type(unfused) is Block and type(unfused.conv1) is fast.Conv2d and type(unfused.pool) is fast.MaxPool2d


def test_what_cannot_be_read_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    with caplog.at_level("INFO", logger="fastconv"):
        converted = convert(nn.Sequential(Counting()))
    assert "convert: 0 runs layer by layer: in training mode its forward changes attributes" in caplog.text
    assert type(converted[0]) is Counting and type(converted[0].conv1) is fast.Conv2d


def test_an_input_that_is_changed_before_the_relu() -> None:
    class Net(Block):
        def forward(self, x: Tensor) -> Tensor:
            z = x * 1
            y = self.conv1(z)
            z.add_(5)
            return F.relu(y) + z

    net, x = Net(), _image()
    torch.testing.assert_close(convert(net)(x), net(x), rtol=1e-4, atol=1e-4)
