"""What convert made of each layer, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from fastconv import nn as fast
from fastconv.convert.layers import runs_in_order, why_not
from fastconv.convert.program import plain_class
from fastconv.convert.rewrite import Rewritten
from fastconv.nn.fused import relu_and_pool

LAYERS = (
    *(nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.ReLU),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)


class Layer(NamedTuple):
    """What became of a layer.

    Attributes:
        path: its name in the model, as in named_modules.
        kind: its class before, such as 'Conv2d'.
        done: 'fused' with what follows it, 'absorbed' by a fused layer before it, 'swapped' for fastconv's, or 'left'.
        detail: what runs together ('Conv2d + ReLU'), the path of the layer that absorbed it, or why there is no more to it.
    """

    path: str
    kind: str
    done: str
    detail: str


def before(model: nn.Module, shared: Collection[int]) -> dict[str, tuple[str, str | None]]:
    """By path: the class of each layer, and why it cannot be replaced."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LAYERS)}
    return {path: (plain_class(module).__name__, why_not(module, shared)) for path, module in layers.items()}


def after(model: nn.Module, found: Mapping[str, tuple[str, str | None]], reasons: Mapping[str, str]) -> Iterator[Layer]:
    """Each layer of `found` in the converted model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    fused, absorbed = _fusions(modules)
    for path, (kind, obstacle) in found.items():
        module = modules[path]
        if path in fused:
            yield Layer(path, kind, "fused", fused[path])
        elif path in absorbed:
            yield Layer(path, kind, "absorbed", absorbed[path])
        elif isinstance(module, _OURS):
            yield Layer(path, kind, "swapped", reasons.get(path, ""))
        else:
            yield Layer(path, kind, "left", obstacle or reasons.get(path) or _untouched(module))


_OURS = (fast.Conv2d, fast.MaxPool2d, fast.AvgPool2d, fast.GlobalAvgPool2d, fast.BatchNormReLU2d)


def _untouched(module: nn.Module) -> str:
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return f"output_size={module.output_size!r}: fastconv has that of 1"
    return "nothing beside it that it could be fused with"


def _fusions(modules: Mapping[str, nn.Module]) -> tuple[dict[str, str], dict[str, str]]:
    """What runs together, by the path of its first layer, and that path by those of the others."""
    fused: dict[str, str] = {}
    absorbed: dict[str, str] = {}
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        if isinstance(module, Rewritten):
            modes = [
                {fusion.layer: fusion for fusion in written.fusions} if written else {} for written in module.rewriting.modes
            ]
            for layer, fusion in {**modes[1], **modes[0]}.items():
                only = [mode for mode, other in (("training", 1), ("evaluation", 0)) if layer not in modes[other]]
                fused[prefix + layer] = fusion.parts + (f" (in {only[0]} only)" if only else "")
                absorbed |= {prefix + other: prefix + layer for other in fusion.absorbed}
        elif isinstance(module, nn.Sequential) and runs_in_order(module):
            _in_order(module, prefix, fused, absorbed)
    return fused, absorbed


def _in_order(sequence: nn.Sequential, prefix: str, fused: dict[str, str], absorbed: dict[str, str]) -> None:
    """The same of a Sequential: fused modules, and the norms that a ConvChain folds."""
    names = {id(member): prefix + name for name, member in sequence.named_children()}
    folds = isinstance(sequence, fast.ConvChain) and sequence.fold_batch_norm
    first = ""
    for name, member in sequence._modules.items():
        path = prefix + name
        if isinstance(member, nn.Identity) and "absorbed" in vars(member):
            absorbed[path] = first
        elif isinstance(member, (fast.ConvReLU2d, fast.ConvReLUMaxPool2d)):
            first, fused[path] = (
                path,
                "Conv2d + ReLU" + (" + MaxPool2d" if isinstance(member, fast.ConvReLUMaxPool2d) else ""),
            )
        elif isinstance(member, fast.BatchNormReLU2d):
            first, fused[path] = path, "BatchNorm2d + ReLU" + (" + MaxPool2d" if relu_and_pool(member)[1] else "")
    for part in fast.ConvChain.parts(sequence) if folds else ():
        if len(part) == 2 and isinstance(part[1], nn.BatchNorm2d):
            conv, norm = names[id(part[0])], names[id(part[1])]
            behind = fused.pop(norm, "BatchNorm2d")
            fused[conv] = f"Conv2d + {behind} (in training the convolution by itself)"
            absorbed |= {path: conv for path, by in absorbed.items() if by == norm} | {norm: conv}
