"""Every call of our operators within a step, held against float64 on the call's own operands.

The gradients of a whole net say little about its kernels: an output that differs in its last bits opens another ReLU here
and there and elects other winners of pools, and a gradient misses or gains those terms. A call of an operator of the
backward pass is handed masks and winners, so that its result can be held to a few roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastconv.backends import aten
from fastconv.bench import gate
from fastconv.geometry import PoolGeometry
from fastconv.ops.define import IMPLEMENTATIONS
from fastconv.precision import Policy, policy


class Audit(TorchDispatchMode):
    """Checks calls of torch.ops.fastconv while it is entered.

    Attributes:
        calls: how many were checked.
        wrong: what is wrong with the first call that is, else None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.wrong: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace != "fastconv":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        exact_args = [_exact(arg) for arg in args]  # copies, made before a call may write to its arguments
        result = func(*args)
        self.calls += 1
        if self.wrong is None:
            with gate.searching(False):
                exact = IMPLEMENTATIONS[name](*exact_args)
            named = dict(zip((argument.name for argument in func._schema.arguments), exact_args, strict=True))
            written = [(args[i], exact_args[i]) for i, a in enumerate(func._schema.arguments) if a.is_write]
            pairs = written or list(zip(_listed(result), _listed(exact), strict=True))
            wrong = _compare(name, named, pairs, policy(args[0].dtype, args[0].device.type))
            self.wrong = wrong and f"{name}{tuple(args[0].shape)}: {wrong}"
        return result


def winners(
    output: Tensor,
    code: Tensor,
    maxima: Tensor,
    unpooled: Tensor,
    pool: PoolGeometry,
    relu: bool,
    reduction: int,
    tf32: bool = False,
    transformed: bool = False,
) -> str | None:
    """None where the elements that codes name, which may differ in near ties, are the maxima; else what is wrong.

    Args:
        output: its dtype is the one whose rounding is allowed.
        maxima, unpooled: in float64, behind and before the pool.
        reduction, tf32, transformed: as in gate.deviation.
    """
    if code.numel() == 0:
        return None
    if code.max() > pool.positions:
        return f"a winner's code is {code.max()}, of {pool.positions} positions"
    indices = aten.code_to_indices(code, pool)
    if indices.min() < 0 or indices.max() >= pool.height * pool.width:  # which gather must not see on a GPU
        return "winners: a code names an element outside of the map"
    named = unpooled.flatten(2).gather(2, indices.flatten(2)).view(maxima.shape)
    if relu:
        named = named.masked_fill(code == 0, 0)
    named = torch.where(maxima.isfinite(), named, maxima)  # a window outside the map has no winner
    wrong = gate.deviation(named.to(output.dtype), maxima, reduction, tf32, transformed=transformed)
    return None if wrong is None else f"winners: {wrong}"


def _exact(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.double().clone() if argument.is_floating_point() else argument
    return "aten" if isinstance(argument, str) else argument  # the only text that operators take asks for a backend


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _compare(name: str, a: dict[str, Any], pairs: list[tuple[Tensor, Tensor]], policy: Policy) -> str | None:
    if name not in _REDUCTIONS:
        return "it is not known how many terms its results sum: see fastconv.bench.audit"
    transformed = _transformed(a)
    for at, ((actual, exact), reduction) in enumerate(zip(pairs, _REDUCTIONS[name](a), strict=False)):
        if not actual.is_floating_point():
            wrong = _codes(a, pairs[0], actual, reduction, policy.tf32, transformed) if name in _POOLED else None
        else:
            # Sums, which may be wider than the maps, are of gradients that may have been rounded.
            dtype = policy.dtype if "grad" in a else actual.dtype
            scale = _scale(name, a, exact, pairs[0][1])
            wrong = gate.deviation(actual, exact, reduction, policy.tf32, scale, dtype, transformed)
        if wrong is not None:
            return f"result {at}: {wrong}"
    return None


def _scale(name: str, a: dict[str, Any], exact: Tensor, first: Tensor) -> float:
    """Sums over maps may cancel down to their rounding: what counts is the size of as many independent terms' sum.

    Behind an average, terms of a map are equal, and so are their roundings: what a map's own sum is counts too.
    Pixels that no window of a strided convolution reaches have a gradient of zero, without an error: they do not count.
    """
    if exact.numel() == 0:
        return 0.0
    if exact.dim() > 2:
        is_strided = "grad" in a and max(a.get("stride", (1, 1))) > 1
        return _rms(exact[exact != 0]) if is_strided and exact.any() else 0.0
    if "grad" not in a:
        return _rms(a.get("input", exact))  # a mean's
    terms = first if name in _SUMMED else a["grad"]
    return math.hypot(_rms(terms) * math.sqrt(_pixels(terms)), _rms(terms.sum((2, 3))) * math.sqrt(terms.shape[0]))


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _codes(
    a: dict[str, Any], output: tuple[Tensor, Tensor], code: Tensor, reduction: int, tf32: bool, transformed: bool
) -> str | None:
    unpooled = _unpooled(a)
    prefix = "pool_" if "pool_kernel_size" in a else ""
    window = (a[f"{prefix}{key}"] for key in ("kernel_size", "stride", "padding", "dilation", "ceil_mode"))
    pool = PoolGeometry.of("audit", unpooled.shape, *window)
    return winners(*output[:1], code, output[1], unpooled, pool, a.get("relu", True), reduction, tf32, transformed)


def _unpooled(a: dict[str, Any]) -> Tensor:
    """What a pooling call pools, in float64, before ReLU where its codes tell what ReLU closed."""
    ops = torch.ops.fastconv
    if "groups" in a:
        operands = (a[key] for key in ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
        return ops.conv2d(*operands, "aten")
    if "eps" in a:
        keys = ("input", "running_mean", "running_var", "weight", "bias", "residual", "training", "eps")
        return ops.batch_norm_relu(*(a[key] for key in keys), "aten")[0]
    x: Tensor = a["input"]
    return x


def _transformed(a: dict[str, Any]) -> bool:
    if "groups" not in a:
        return False
    shape = a["weight_shape"] if "weight_shape" in a else a["weight"].shape
    return gate.may_transform(a["grad" if "grad" in a else "input"].device.type, shape[2:], a["stride"])


def _pixels(tensor: Tensor) -> int:
    return tensor.numel() // max(tensor.shape[1], 1)


def _window(a: dict[str, Any]) -> int:
    return math.prod(a["kernel_size"])


def _forward(a: dict[str, Any]) -> tuple[int, int]:
    products = math.prod(a["weight"].shape[1:])
    return products, products


def _backward(a: dict[str, Any]) -> tuple[int, int]:
    """Products of an input gradient and of a weight gradient."""
    shape = a["weight_shape"] if "weight_shape" in a else a["weight"].shape
    return shape[0] // a["groups"] * math.prod(shape[2:]), _pixels(a["grad"])


def _masked(a: dict[str, Any]) -> tuple[int, int, int]:
    products, pixels = _backward(a)
    return products, pixels, products + _pixels(a["input"])


def _norm(a: dict[str, Any]) -> tuple[int, ...]:
    return (_pixels(a["grad"] if "grad" in a else a["input"]),) * 4


# Operators whose last result is the sum of their first, and those whose second is a code.
_SUMMED = ("conv2d_backward_relu", "relu_backward", "max_pool2d_backward")
_POOLED = ("conv2d_relu_max_pool2d", "max_pool2d", "batch_norm_relu_max_pool2d")

# For each result of an operator the number of terms that are summed into one of its elements.
_REDUCTIONS: dict[str, Callable[[dict[str, Any]], tuple[int, ...]]] = {
    "conv2d": _forward,
    "conv2d_relu": _forward,
    "conv2d_relu_max_pool2d": _forward,
    "conv2d_prepared": _forward,
    "conv2d_backward": _backward,
    "conv2d_backward_relu": _masked,
    "conv2d_relu_weight_grad": lambda a: (_pixels(a["grad"]),) * 2,
    "conv2d_relu_max_pool2d_weight_grad": lambda a: (_pixels(a["grad"]),) * 2,
    "bias_grad": lambda a: (_pixels(a["grad"]),),
    "relu_backward": lambda a: (1, _pixels(a["grad"])),
    "max_pool2d": lambda a: (1, 1),
    "max_pool2d_backward": lambda a: (_window(a), _pixels(a["grad"])),
    "max_pool2d_indices": lambda a: (),
    "avg_pool2d": lambda a: (_window(a),),
    "avg_pool2d_backward": lambda a: (_window(a),),
    "global_avg_pool2d": lambda a: (math.prod(a["input"].shape[2:]),),
    "global_avg_pool2d_backward": lambda a: (1,),
    "batch_norm_relu": _norm,
    "batch_norm_relu_max_pool2d": _norm,
    "batch_norm_relu_backward": _norm,
    "batch_norm_relu_max_pool2d_backward": _norm,
    "batch_norm_update": lambda a: (1, 1),
}
