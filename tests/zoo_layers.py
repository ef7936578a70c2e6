"""The zoo's layers with settings, places or attachments out of the ordinary."""

from __future__ import annotations

import types
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo_case import Net, conv, conv_bn, image, scores


class Twice(nn.Module):
    """One convolution, one normalisation and one block, each at two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3), conv(4)
        self.bn, self.block = nn.BatchNorm2d(4), nn.Sequential(*conv_bn(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        x = F.relu(self.conv2(x))
        x = F.relu(self.bn(self.conv2(x)))
        return self.block(self.block(x) + x)


class ConvBNActivation(nn.Sequential):
    """A Sequential of its own name, without a forward of its own."""

    def __init__(self, channels: int, out_channels: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(*conv_bn(channels, out_channels), activation(inplace=True))
        self.out_channels = out_channels


class PartsInForward(nn.Module):
    """A Sequential called as a whole, by slices and member by member."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3), nn.ReLU(), nn.MaxPool2d(2))
        self.whole = nn.Sequential(conv(4), nn.ReLU(), conv(4), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        taps = []
        for layer in self.stem:
            x = layer(x)
            taps.append(x)
        return taps, self.whole(x), self.whole[:3](x), self.whole[0](x)


class Settings(nn.Module):
    """Convolutions with every setting, each with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                *(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode) for mode in ("reflect", "replicate", "circular")),
                nn.Conv2d(4, 8, (3, 1), padding="same", groups=4, bias=False),
                nn.Conv2d(4, 4, 3, stride=(2, 1), padding=(2, 0), dilation=(2, 1), groups=2),
                nn.Conv2d(4, 4, 2, padding="valid", padding_mode="reflect"),
                nn.Conv2d(4, 4, 3, padding="same", dilation=2, padding_mode="circular"),
            ]
        )
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.relu(layer(x)) for layer in self.convs] + [F.relu(self.bn(layer(x))) for layer in self.convs[:3]]


class Norms(nn.Module):
    """Normalisations with every setting, each with ReLU, one with a pool as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, bias=False)
        settings: list[dict[str, Any]] = [
            *({"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.9, "eps": 0.1}),
            {"affine": False, "track_running_stats": False},
        ]
        self.bns = nn.ModuleList(nn.BatchNorm2d(4, **setting) for setting in settings)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(4), nn.BatchNorm2d(4, **setting), nn.ReLU(inplace=True), nn.MaxPool2d(2))
            for setting in settings
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.conv(x)
        maps = [self.relu(bn(x)) for bn in self.bns]
        return [block(y) for block, y in zip(self.blocks, maps, strict=True)]


class Pools(nn.Module):
    """Pools with every setting, and averages in every spelling, of maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3), nn.BatchNorm2d(4)
        self.pools = nn.ModuleList(
            [
                *(
                    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
                    nn.MaxPool2d(2, stride=1, dilation=2),
                    nn.MaxPool2d((2, 3), (3, 2)),
                ),
                *(nn.AvgPool2d(8), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, divisor_override=3)),
                *(nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((None, 1))),
                *(nn.AdaptiveMaxPool2d(1), nn.LPPool2d(2, 2), nn.AdaptiveAvgPool2d((2, 1))),
            ]
        )
        self.blocks = nn.ModuleList(nn.Sequential(conv(4), nn.BatchNorm2d(4), nn.ReLU(), pool) for pool in self.pools[:4])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn(self.conv(x)))
        maps = [pool(x) for pool in self.pools] + [block(x) for block in self.blocks]
        averages = [
            *(
                x.mean((2, 3)),
                x.mean([-1, -2]),
                x.mean(dim=(2, 3), keepdim=True),
                torch.mean(x, (-2, -1)),
                x.mean(3).mean(2),
            ),
            *(x.mean((1, 2)), x.mean(2), x.mean(), x.mean((2, 3), dtype=torch.float64), x.flatten(2).mean(-1)),
            *(F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (1, 1)), F.avg_pool2d(x, x.size()[2:])),
        ]
        return [*maps, *averages, F.max_pool2d(F.relu(x.mT - 0.5), 2, 1)]


class SegNet(nn.Module):
    """Badrinarayanan et al., 2015 (arXiv:1511.00561): the winners of the pool are used as well."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*conv_bn(3), nn.ReLU())
        self.pool, self.unpool, self.up = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), conv(4)

    def forward(self, x: Tensor) -> Tensor:
        x, winners = self.pool(self.down(x))
        return F.relu(self.up(self.unpool(x, winners)))


class Recorder:
    """A forward hook that keeps what it sees; copied with the module that it hangs on."""

    def __init__(self) -> None:
        self.recorded: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.recorded.append(output.detach().clone())


class Hooked(nn.Module):
    """Two convolutions, normalisations and ReLUs, and hooks of every kind on some of them."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv(3), nn.BatchNorm2d(4), nn.ReLU(inplace=not changes)
        self.block = nn.Sequential(*conv_bn(4), nn.ReLU(), nn.MaxPool2d(2))
        self.last, self.final = nn.Sequential(conv(4), nn.ReLU()), conv(4)
        if changes:
            self.conv1.register_forward_hook(_doubled)
            self.relu1.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
            self.block[1].register_forward_hook(_doubled)
            self.last[1].register_full_backward_hook(lambda module, grads, given: (grads[0] * 3,))
            self.final.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2,))
        else:
            for module in (self, self.conv1, self.bn1, self.block, self.block[2], self.last[0], self.final):
                module.register_forward_hook(Recorder())

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return F.relu(self.final(self.last(self.block(x))))


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2 - 0.5


def _recorded(net: nn.Module) -> dict[str, list[Tensor]]:
    return {
        name: hook.recorded
        for name, module in net.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, Recorder)
    }


def _hook_later(net: nn.Module) -> None:
    """A hook that the user adds to a converted net, on a block."""
    net.block.register_forward_hook(_doubled)  # type: ignore[union-attr]


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Between(nn.Module):
    """Dropout, other activations and normalisations between and behind the layers that are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(conv(3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.ReLU(), nn.Dropout2d(0.3), conv(4), nn.Dropout(0.2)),
            *(nn.ReLU(inplace=True), conv(4), nn.LeakyReLU(), conv(4), nn.ReLU6(inplace=True), conv(4), nn.SiLU()),
            *(conv(4), nn.GroupNorm(2, 4), nn.ReLU(), conv(4), nn.InstanceNorm2d(4), nn.ReLU(), conv(4), nn.PReLU()),
        )
        self.wide = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return F.relu(F.dropout(self.wide(x), 0.25, self.training))


def _patched() -> nn.Module:
    """A block whose forward was replaced on the instance."""
    net = nn.Sequential(OrderedDict(block=ConvBNActivation(3, 4), conv=conv(4), relu=nn.ReLU()))
    net.block.forward = types.MethodType(lambda self, x: self[2](self[0](x)) + 1, net.block)
    return net


def _shared_relu() -> nn.Sequential:
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(*conv_bn(3), relu, *conv_bn(4), relu, conv(4), relu, nn.MaxPool2d(2), relu)


def _tied() -> nn.Sequential:
    """Two convolutions with one weight, two normalisations with one buffer."""
    net = nn.Sequential(conv(3), nn.ReLU(), *conv_bn(4), nn.ReLU(), *conv_bn(4), nn.ReLU(), nn.MaxPool2d(2))
    net[5].weight = net[2].weight  # type: ignore[assignment]
    net[6].bias = net[3].bias  # type: ignore[assignment]
    return net


def _parametrized() -> nn.Sequential:
    first = parametrizations.weight_norm(conv(3))
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), Standardised(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), conv(4))


def _frozen_norms(net: nn.Module) -> None:
    """The usual fine-tuning: normalisations keep their statistics, some weights do not learn."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            if module.affine:
                module.weight.requires_grad_(False)


def _body(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*conv_bn(3), nn.ReLU(inplace=True), *layers)


class Scores(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scores(x)


def _deep() -> nn.Module:
    return _body(nn.MaxPool2d(2), ConvBNActivation(4, 6), ConvBNActivation(6, 4, nn.ReLU6), Scores())


def _unbatched() -> tuple[Any, ...]:
    return (torch.randn(3, 8, 8),)


NETS = [
    Net("twice", Twice),
    Net("sequential_subclass", _deep),
    Net("frozen_norms", _deep, alter=_frozen_norms),
    Net("relu_outside", lambda: nn.Sequential(nn.Sequential(*conv_bn(3)), nn.ReLU(), nn.Sequential(conv(4)), nn.ReLU())),
    Net("shared_relu", _shared_relu),
    Net("parts_in_forward", PartsInForward),
    Net("settings", Settings, image(4)),
    Net("norm_settings", Norms, image(3, 8, 4)),
    Net("norm_settings_frozen", Norms, image(3, 8, 4), alter=_frozen_norms),
    Net("pools", Pools, image(3, 8), image(3, 16)),
    Net("segnet", SegNet),
    Net("hooks_record", lambda: Hooked(changes=False), seen=_recorded),
    Net("hooks_change", lambda: Hooked(changes=True)),
    Net("hooked_later", lambda: Hooked(changes=False), seen=_recorded, alter=_hook_later),
    Net("between", Between, image(3, 8, 4), drops=True),
    Net("patched_forward", _patched),
    Net("tied_layers", _tied),
    Net("parametrized", _parametrized),
    Net("relu_first", lambda: nn.Sequential(nn.ReLU(inplace=True), conv(3), nn.ReLU(), nn.BatchNorm2d(4))),
    Net("unbatched", lambda: nn.Sequential(conv(3), nn.ReLU(), nn.MaxPool2d(2), conv(4), nn.ReLU()), _unbatched, image()),
    Net("no_convolution", lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), Scores())),
]
