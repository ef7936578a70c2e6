"""fastconv.convolutionize: what it refuses, and how."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dense import FLATTENS, LeNet, Tail, sequential
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastconv import convolutionize


def _hooked() -> nn.Module:
    model = sequential(nn.Flatten(), nn.Linear(125, 4))
    model[-1].register_forward_hook(lambda module, args, output: None)
    return model


def _reads_flat() -> nn.Module:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        _images, _features = args[0].shape

    model = sequential(nn.Flatten(), nn.Linear(125, 4), nn.ReLU())
    model[-1].register_forward_pre_hook(hook)
    return model


def _patched() -> nn.Module:
    model = sequential(nn.Flatten(), nn.Linear(125, 4))
    model.forward = lambda x: x
    return model


class Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size()[0], -1)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.flatten, self.a, self.b = sequential(), Flatten(), nn.Linear(125, 4), nn.Linear(125, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"a": self.a(self.flatten(x)), "b": self.b(self.flatten(x))}


class AnyArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = sequential(nn.Flatten(), nn.Linear(125, 4))

    def forward(self, *images: Tensor) -> Tensor:
        return self.body(images[0])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = sequential(nn.Flatten(), nn.Linear(125, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if x.sum() > 0 else -x)


FLAT = FLATTENS["flatten"]
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no linear": (lambda: sequential(nn.Flatten()), "nothing to make dense: no Linear"),
    "no flatten": (lambda: sequential(nn.AdaptiveAvgPool2d(1)), "nothing to make dense"),
    "too small": (
        lambda: sequential(nn.Conv2d(5, 5, 9), nn.Flatten(), nn.Linear(5, 4)),
        r"not run on .*\(3, 16, 16\).*Kernel size",
    ),
    "wrong features": (lambda: sequential(nn.Flatten(), nn.Linear(7, 4)), "does not run on images of size"),
    "control flow": (Branching, "torch.fx cannot trace the model in training"),
    "no flattened map": (
        lambda: Tail(lambda x, fc: fc(x.mean(3).mean(2).repeat(1, 25))),
        "Linear 'fc' reads repeat .* no flattened",
    ),
    "unknown": (lambda: Tail(lambda x, fc: fc(F.layer_norm(FLAT(x), (125,)))), "layer_norm"),
    "unknown behind": (lambda: Tail(lambda x, fc: fc(FLAT(x)).cumsum(1)), "cumsum in the forward of 'the model' follows"),
    "twice": (lambda: Tail(lambda x, fc: fc(fc(FLAT(x)))), "Linear 'fc' is called in several places"),
    "weight read": (lambda: Tail(lambda x, fc: fc(FLAT(x)) * fc.weight.mean()), "mul in the forward of"),
    "function": (lambda: Tail(lambda x, fc: F.linear(FLAT(x), fc.weight)), "linear in the forward .* no dense form"),
    "map handed out": (
        lambda: Tail(lambda x, fc: (lambda f: (fc(f), f.relu()))(FLAT(x))),
        "map itself is an output .* by relu",
    ),
    "weight read before": (
        lambda: Tail(lambda x, fc: fc(FLAT(x * fc.weight.mean()))),
        "the weight of Linear 'fc' is used elsewhere too",
    ),
    "flat only": (_reads_flat, "made dense, it fails by too many values to unpack"),
    "own tensor": (
        lambda: Tail(lambda x, fc: fc(FLAT(x + torch.ones(5, 5)))),
        "its forward computes aten.ones of no argument",
    ),
    "patched": (_patched, "forward is patched onto the instance"),
    "flattens twice": (TwoHeads, "'flatten', which calls view in the forward of 'flatten', is called in several places"),
    "norm of the map": (
        lambda: sequential(nn.Flatten(), nn.BatchNorm1d(125), nn.Linear(125, 4)),
        "Linear '7' reads BatchNorm1d '6', which is no flattened",
    ),
    "any arguments": (AnyArguments, r"cannot trace the model in training: its forward takes \*images"),
    "hook": (_hooked, "Linear '6' has hooks"),
    "parametrized": (
        lambda: sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(125, 4))),
        "ParametrizedLinear '6' follows the flatten|linear",
    ),
    "constant": (lambda: Tail(lambda x, fc: fc(FLAT(x)) + torch.ones(125)), "does not run|add|makes a tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, match = REFUSED[case]
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=match):
        convolutionize(model, 16)
    assert [type(module) for module in model.modules()] == kinds


def test_shared_weights_are_refused() -> None:
    model = sequential(nn.Flatten(), nn.Linear(125, 125), nn.Linear(125, 125))
    model[-1].weight = model[-2].weight
    with pytest.raises(ValueError, match="the weight of Linear '6' is used elsewhere too"):
        convolutionize(model, 16)


class Around(nn.Module):
    """A strided convolution beside the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.max_pool2d(x, 2), self.conv(x)], 1)


class Borrowing(nn.Module):
    """One pool called in two places, by one that does not own it."""

    class Inner(nn.Module):
        def __init__(self, pool: nn.Module) -> None:
            super().__init__()
            self.others = [pool]

        def forward(self, x: Tensor) -> Tensor:
            return self.others[0](x)

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.inner = Borrowing.Inner(self.pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.pool(x))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((nn.Conv2d(3, 4, 3),), "no max-pool with a stride above 1"),
        ((nn.MaxPool2d(2, ceil_mode=True),), "'0' has ceil_mode=True"),
        ((nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), "Conv2d '1' behind .* cannot be dilated"),
        ((nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, padding="same")), "Conv2d '1' behind .* cannot be dilated"),
        ((nn.MaxPool2d(2), nn.AvgPool2d(2, 1, divisor_override=3)), "AvgPool2d '1' behind .* cannot be dilated"),
        ((Around(),), "max_pool2d in the forward of '0' is not on every path"),
        ((Borrowing(),), "MaxPool2d '0.pool' is called by '0.inner', which it is no part of"),
        ((nn.MaxPool2d(2), nn.AvgPool2d(3, 1, padding=1)), "AvgPool2d '1' behind .* cannot be dilated"),
        ((nn.MaxPool2d(2), nn.ConvTranspose2d(3, 4, 3)), "ConvTranspose2d '1' behind"),
    ],
    ids=["no pool", "ceil_mode", "reflect", "same", "divisor", "around", "borrowed", "padded average", "transposed"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_dense_max_pool_is_refused(layers: tuple[nn.Module, ...], message: str) -> None:
    model = nn.Sequential(*layers, nn.Flatten())
    model.append(nn.Linear(model(torch.randn(1, 3, 11, 11)).shape[1], 4))
    assert convolutionize(model, (3, 11, 11))(torch.randn(1, 3, 13, 13)).shape[:2] == (1, 4)
    with pytest.raises(ValueError, match=message):
        convolutionize(model, (3, 11, 11), dense_max_pool=True)


def test_hooks_on_a_pool_of_several_places_are_refused() -> None:
    model = LeNet()
    model.pool.register_forward_hook(lambda module, args, output: None)
    convolutionize(model, (32, 28))
    with pytest.raises(ValueError, match="MaxPool2d 'pool' has hooks"):
        convolutionize(model, (32, 28), dense_max_pool=True)


def test_averages_of_scores_only() -> None:
    model = Tail(lambda x, fc: (fc(FLAT(x)), x))
    assert [len(y.shape) for y in convolutionize(model, 16)(torch.randn(1, 3, 18, 18))] == [4, 4]
    with pytest.raises(ValueError, match="output is more than scores"):
        convolutionize(model, 16, average=True)
    with pytest.raises(ValueError, match="hands on a tuple"):
        convolutionize(Wrapped(Tail(lambda x, fc: (fc(FLAT(x)), fc(FLAT(x)).tanh()))), 16, average=True)


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    ("size", "error"),
    [
        ("16", TypeError),
        (16.0, TypeError),
        (True, TypeError),
        (None, TypeError),
        (0, ValueError),
        ((16,), ValueError),
        ((1, 2, 3, 4), ValueError),
    ],
)
def test_input_size(size: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="input_size must be"):
        convolutionize(sequential(nn.Flatten(), nn.Linear(125, 4)), size)


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        convolutionize(lambda x: x, 16)
    flat = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(ValueError, match="no Conv2d to tell the channels"):
        convolutionize(flat, 4)
    assert convolutionize(flat, (3, 4, 4))(torch.randn(1, 3, 8, 6)).shape == (1, 4, 3, 2)
