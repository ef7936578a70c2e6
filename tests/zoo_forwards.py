"""The zoo's forwards that a rewriter of graphs gets wrong: what one trace does not show, or what order must not change."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo_case import Net, conv, image, scores


class Layers(nn.Module):
    """Two convolutions, each with a normalisation, and one ReLU; forwards are given by the functions below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()


def _class(name: str, forward: Callable[..., Any]) -> type[Layers]:
    """A class whose forward has a plain signature, so that nothing keeps a rewriter from it."""
    return type(name, (Layers,), {"forward": forward, "__module__": __name__})


class Tap(nn.Module):
    """What lies between a convolution, its normalisation and its ReLU is used elsewhere as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn2 = conv(3), conv(4), nn.BatchNorm2d(4)
        self.conv3, self.bn3, self.relu, self.pool = conv(4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = self.conv1(x)
        x = self.relu(a)
        b = self.conv2(x)
        c = self.bn2(b)
        x = F.relu(c)
        d = self.relu(self.bn3(self.conv3(x)))
        return a * 2, b.sigmoid(), c + 1, d, self.pool(d)


class OptionalArguments(nn.Module):
    """A flag and a mask, and a block that one forward calls with both settings of its flag."""

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv, self.bn = conv(channels), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, activate: bool = True, mask: Tensor | None = None) -> Tensor:
            x = self.bn(self.conv(x))
            if mask is not None:
                x = x * mask
            return F.relu(x) if activate else x

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = self.Block(3), self.Block(4)

    def forward(self, x: Tensor, activate: bool = True, mask: Tensor | None = None) -> Tensor:
        x = self.first(x, activate, mask=mask)
        return self.twice(self.twice(x), activate=False) + x


class Mask(nn.Module):
    """An optional map, which a trace that hands a stand-in for it takes for given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        x = self.bn(self.conv(x))
        if mask is not None:
            x = x * mask
        return F.relu(x + scale)


class Flag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.use_relu, self.slope = conv(3), nn.BatchNorm2d(4), True, 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        x = F.relu(x) if self.use_relu else x
        return self.slope * x


class SideEffects(nn.Module):
    """Counts calls, keeps features, prints: each once in every call, and never in a conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3), nn.BatchNorm2d(4)
        self.calls, self.features, self.feature = 0, [], torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        print("call", self.calls)
        self.feature = self.conv(x)
        x = F.relu(self.bn(self.feature))
        self.features.append(x.detach())
        return x / self.calls


def _printed(net: nn.Module, *args: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        result = net(*args)
    return result, out.getvalue()


class Features(nn.Module):
    """Methods besides forward use the same layers, and users call them; a ReLU at two sites, or one for each site."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.relu1 = conv(3), nn.BatchNorm2d(4), conv(4), nn.ReLU()
        self.relu2 = self.relu1 if shared else nn.ReLU()

    def features(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu1(self.bn1(self.conv1(x))))

    def before(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))

    def forward(self, x: Tensor) -> Tensor:
        return scores(self.relu2(self.features(x)))


def _features_too(net: nn.Module, x: Tensor) -> Any:
    return net(x), net.features(x), net.before(x)  # type: ignore[operator]


class Aliases(nn.Module):
    """Layers that the net holds by plain references as well, which forward goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3), nn.ReLU(), nn.MaxPool2d(2))
        self.conv, self.bn, self.relu = conv(3), nn.BatchNorm2d(4), nn.ReLU()
        self.first, self.rest = [self.stem[0]], {"norm": self.bn, "relu": self.relu}

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.stem(x), self.first[0](x), self.rest["relu"](self.rest["norm"](self.conv(x)))]


class TiedDecoder(nn.Module):
    """An autoencoder whose decoder reads the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bias = conv(3), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return F.conv_transpose2d(y, self.conv.weight, self.bias, padding=1)


class Siblings(nn.Module):
    """Instances of one class that differ in a flag, one of them put into eval by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Flag(), Flag(), Flag()])
        self.blocks[1].use_relu = False
        self.blocks[2].slope = 0.5

    def forward(self, x: Tensor) -> list[Tensor]:
        return [block(x) for block in self.blocks]


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv(3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Child(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bn(self.conv(x))


def _control_flow(net: Any, x: Tensor) -> Tensor:
    y = net.bn1(net.conv1(x))
    return F.relu(y) if x.mean() > 0 else net.relu(net.conv2(y)) * 3


def _shifted(mean: float) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(2, 3, 8, 8) + mean,)


def _shapes(net: Any, x: Tensor) -> Tensor:
    y = net.conv1(x)
    y = net.relu(y) if x.shape[-1] > 8 else y
    return scores(y).view(len(x), -1) * x.shape[2]


def _asks_modes(net: Any, x: Tensor) -> Any:
    """What forward does depends on the modes of its net and of torch."""
    y = net.bn1(net.conv1(x))
    y = net.relu(y) if torch.is_grad_enabled() else y
    z = net.conv2(y)
    return z if net.training else F.relu(z), torch.is_autocast_enabled("cpu")


def _asks_tensors(net: Any, x: Tensor) -> Any:
    y = net.relu(net.bn1(net.conv1(x)))
    z = net.conv2(y if x.requires_grad else y * 2)
    z = F.relu(z) if isinstance(x, Tensor) else z
    return z, (z.dtype == x.dtype, type(y) is Tensor, z.dim(), z.is_floating_point())


def _random_branch(net: Any, x: Tensor) -> Tensor:
    y = net.conv1(x)
    if torch.rand(1) < 0.5:
        y = net.relu(y)
    y = net.bn2(net.conv2(y))
    return F.relu(y) if random.random() < 0.5 else y


def _no_grad(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.relu(net.bn1(net.conv1(x)))
    return F.relu(net.conv2(y)) + F.relu(net.bn2(net.conv2(y.detach())))


def _checkpoint(net: Any, x: Tensor) -> Tensor:
    y = checkpoint(lambda t: net.relu(net.bn1(net.conv1(t))), x, use_reentrant=False)
    return checkpoint(net.conv2, y, use_reentrant=False).relu()


def _autocast_off(net: Any, x: Tensor) -> Tensor:
    y = net.relu(net.bn1(net.conv1(x)))
    with torch.autocast("cpu", enabled=False):
        return F.relu(net.conv2(y.to(net.conv2.weight.dtype)))


def _in_place_residual(net: Any, x: Tensor) -> Tensor:
    y = net.conv1(x)
    z = F.relu_(y)
    return F.relu(net.bn2(net.conv2(z)) + y, inplace=True)


def _late_write(net: Any, x: Tensor) -> Tensor:
    """One skip is written to between the convolution and the sum, the other made between them."""
    skip = torch.cat([x, x[:, :1]], 1)
    y = net.bn1(net.conv1(x))
    skip.mul_(2)
    y = F.relu(y + skip)
    z = net.conv2(y)
    return (z + F.avg_pool2d(y, 3, 1, 1)).relu_()


def _residuals(net: Any, x: Tensor) -> list[Tensor]:
    """Sums that broadcast, scale, subtract, repeat, have two candidates or another type."""
    y, z = net.conv1(x), net.bn2(net.conv2(net.conv1(x)))
    gate, row = y.mean((2, 3), keepdim=True), z.mean((0, 2), keepdim=True)
    return [
        *(F.relu(net.conv1(x) + gate), F.relu(row + net.bn1(net.conv1(x))), (net.conv1(x) + 0.5).relu()),
        *(F.relu(torch.add(net.conv1(x), z, alpha=0.5)), F.relu(net.conv1(x).add_(z)), F.relu(net.conv1(x) - z)),
        *(F.relu(y + y), F.relu(net.conv1(x) + net.bn2(net.conv2(y))), F.relu(sum([y, z, y])) + z),
        *(F.relu(z * 2 + net.conv1(x)), F.relu(net.conv1(x) + z.to(torch.float64))),
    ]


def _other_dtype(net: Any, x: Tensor) -> list[Tensor]:
    """Under autocast the skip has the parameters' dtype and the convolution autocast's; in place, the first decides."""
    skip = x[:, :1].expand(-1, 4, -1, -1)
    y, z = net.bn1(net.conv1(x)), net.conv1(x)
    y += skip
    return [F.relu(y), F.relu(z + skip), F.relu(skip + net.bn2(net.conv1(x))), net.relu(skip.clone().add_(z))]


def _tensor_hooks(net: Any, x: Tensor) -> Tensor:
    """A hook on a map between the layers, and one that is kept for a picture of what the net looks at."""
    y = net.conv1(x)
    if y.requires_grad:
        y.register_hook(lambda grad: grad * 2)
    z = net.conv2(net.relu(y))
    net.kept = z
    if z.requires_grad:
        z.retain_grad()
    return scores(F.relu(z))


def _structures(net: Any, batch: dict[str, Any]) -> dict[str, Any]:
    a, b = (net.relu(net.conv1(x)) for x in batch["images"])
    return {"sum": a + b, "maps": [a, (net.bn2(net.conv2(b)), None)], "name": batch["name"]}


def _slices(net: Any, x: Tensor) -> list[Tensor]:
    """In-place ReLU on a part of a map; a map that is overwritten; a ReLU whose input is written to later."""
    y = net.conv1(x)
    y[:, :2].relu_()
    a, b = net.bn2(net.conv2(y)).chunk(2, 1)
    z = net.conv1(x)
    r = F.relu(z)
    z.add_(1.0)
    return [F.relu(a), b, r, z]


def _clamped(net: Any, x: Tensor) -> Tensor:
    """Weights written in forward, and a penalty that reads those of a normalisation."""
    with torch.no_grad():
        net.conv1.weight.clamp_(-0.2, 0.2)
    return scores(net.relu(net.bn1(net.conv1(x)))) + net.bn1.weight.abs().sum()


def _functional_norm(net: Any, x: Tensor) -> Tensor:
    """Layers' tensors handed to functions, beside the layers themselves."""
    bn, y = net.bn1, net.conv1(x)
    y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, net.training, 0.2, bn.eps)
    z = F.relu(F.conv2d(x, net.conv1.weight, net.conv1.bias, padding=1))
    return F.relu(y) + net.relu(net.bn1(z))


def _loops(net: Any, x: Tensor) -> Tensor:
    """Layers found by name, called in a comprehension, and from a function that is handed them."""
    layers = [getattr(net, f"{kind}{index}") for index in (1, 2) for kind in ("conv", "bn")]
    for index, layer in enumerate(layers):
        x = layer(x)
        x = net.relu(x) if index % 2 else x
    return F.relu(input=x, inplace=False)


def _samples(net: Any, x: Tensor) -> Tensor:
    """As many calls as there are images."""
    return torch.cat([net.relu(net.conv1(row[None])) for row in x])


def _image_and_flag() -> tuple[Any, ...]:
    return torch.randn(2, 3, 8, 8), False, torch.rand(2, 1, 8, 8).round()


def _frozen_part(net: Any) -> None:
    net.blocks[2].eval()


_FUNCTIONS: dict[str, Any] = {
    "asks_modes": _asks_modes,
    "asks_tensors": _asks_tensors,
    "random_branch": _random_branch,
    "no_grad_inside": _no_grad,
    "checkpoint_inside": _checkpoint,
    "autocast_off_inside": _autocast_off,
    "in_place_residual": _in_place_residual,
    "late_write": _late_write,
    "residuals": _residuals,
    "other_dtype": _other_dtype,
    "slices": _slices,
    "weights_written": _clamped,
    "functional_norm": _functional_norm,
    "loops": _loops,
    "samples": _samples,
}

NETS = [
    *(Net(name, _class(name, forward)) for name, forward in _FUNCTIONS.items()),
    Net("control_flow", _class("ControlFlow", _control_flow), _shifted(1.0), _shifted(-1.0)),
    Net("shapes", _class("Shapes", _shapes), again=image(3, 12, 3)),
    Net("tap", Tap),
    Net("optional_arguments", OptionalArguments, again=_image_and_flag),
    Net("keyword_only", Mask, tuple, kwargs=lambda: {"scale": 0.5, "x": torch.randn(2, 3, 8, 8)}),
    Net("mask", Mask, again=lambda: (torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8).round())),
    Net("flag_changed", Flag, alter=lambda net: vars(net).update(use_relu=False, slope=2.0)),
    Net("side_effects", SideEffects, call=_printed, seen=lambda net: (net.calls, net.features, net.feature)),
    Net("features", lambda: Features(shared=True), call=_features_too),
    Net("features_own_relus", lambda: Features(shared=False), call=_features_too),
    Net("aliases", Aliases),
    Net("tied_decoder", TiedDecoder),
    Net("siblings", Siblings, alter=_frozen_part),
    Net("super_forward", Child),
    Net("tensor_hooks", _class("TensorHooks", _tensor_hooks), seen=lambda net: (net.kept, net.kept.grad)),
    Net(
        "structures",
        _class("Structures", _structures),
        lambda: ({"images": (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)), "name": "two"},),
    ),
    Net("other_layout", _class("Loops", _loops), lambda: (torch.randn(2, 8, 9, 3).permute(0, 3, 2, 1),), image(3, 9, 1)),
]
