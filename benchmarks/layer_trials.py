"""Single layers: forward, each gradient by itself, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.cases import LayerCase
from benchmarks.measure import Trial, Verdict, ours
from fastconv import backends, functional, reference
from fastconv.bench import gate, layers

Call = Callable[[], object]


def trials(suite: str, case: LayerCase, dtype: str, directions: tuple[str, ...]) -> Iterator[Trial]:
    """The directions asked for; a first layer's input gradient, which no training wants, is left out."""
    layer = case.layer
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    x, weight, bias, grad = operands = layers.operands(layer, case.batch, getattr(torch, dtype), torch.device("cpu"), layout)
    modules = {ours(): functional, "eager_channels_last" if case.channels_last else "eager_nchw": reference}

    def fresh() -> None:
        with torch.no_grad():
            x.normal_()
            grad.normal_()

    def forward(module: object, x: Tensor = x) -> Tensor:
        with torch.inference_mode():
            return layers.forward(module, layer, x, weight, bias)

    def trial(direction: str, calls: dict[str, Call], check: Callable[[str], Verdict], draw: Call = fresh) -> Trial:
        return Trial(suite, case.case, direction, dtype, calls, check, draw)

    # Copies, which no trial draws anew: float64 takes longer than all else.
    held = layers.untied(layer, *(t.detach().clone().requires_grad_(t.requires_grad) for t in operands))
    exact = layers.both_exact(layer, *held)
    products = layer.in_channels * layer.kernel**2
    if "forward" in directions:
        calls = _each(modules, forward)
        yield trial(
            "forward",
            calls,
            lambda name: _verdict(forward(modules[name], held[0]), exact[0], products, layers.transformed(layer, x)),
        )
    yield from _gradients(case, x, weight, dtype, directions, trial)
    if "both" in directions:
        calls = _each(modules, lambda module: layers.both(module, layer, *operands))
        yield trial("both", calls, lambda name: Verdict(*layers.check(modules[name], layer, held, exact)))


def _gradients(
    case: LayerCase, x: Tensor, weight: Tensor, dtype: str, directions: tuple[str, ...], trial: Callable[..., Trial]
) -> Iterator[Trial]:
    """The convolution's gradients, of a map before its ReLU and pool."""
    layer = case.layer
    wanted = [name for name in ("input_grad", "weight_grad") if name in directions]
    if layer.in_channels <= 3:
        wanted = [name for name in wanted if name != "input_grad"]
    if not wanted:
        return
    x, weight = x.detach(), weight.detach()
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    shape = layers.unpooled_shape(layer, case.batch)
    grad = torch.randn(shape).to(x.dtype).contiguous(memory_format=layout)
    pairs = ([layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1])
    eager = "eager_channels_last" if case.channels_last else "eager_nchw"

    def stock(direction: str, g: Tensor, a: Tensor, w: Tensor) -> Tensor:
        mask = [direction == "input_grad", direction == "weight_grad", False]
        results = torch.ops.aten.convolution_backward(g, a, w, None, *pairs, False, [0, 0], 1, mask)
        return results[0] if mask[0] else results[1]

    def own(direction: str) -> Tensor:
        operands = (None, weight) if direction == "input_grad" else (x, None)
        shapes = (x.shape, weight.shape, case.channels_last)
        results = torch.ops.fastconv.conv2d_backward(grad, *operands, *shapes, *pairs, 1, backends.requested())
        return results[0] if direction == "input_grad" else results[1]

    def fresh() -> None:
        grad.normal_()
        x.normal_()

    for direction in wanted:
        calls: dict[str, Callable[[], Tensor]] = {
            ours(): lambda direction=direction: own(direction),  # type: ignore[misc]
            eager: lambda direction=direction: stock(direction, grad, x, weight),  # type: ignore[misc]
        }
        exact = stock(direction, grad.double(), x.double(), weight.double())
        reduction = layer.out_channels * layer.kernel**2 if direction == "input_grad" else math.prod(shape) // shape[1]

        def check(name: str, calls=calls, exact=exact, reduction=reduction) -> Verdict:  # type: ignore[no-untyped-def]
            return _verdict(calls[name](), exact, reduction, layers.transformed(layer, x))

        yield trial(direction, calls, check, fresh)


def _each(modules: dict[str, object], run: Callable[[object], object]) -> dict[str, Call]:
    return {name: lambda module=module: run(module) for name, module in modules.items()}  # type: ignore[misc]


def _verdict(actual: Tensor, exact: Tensor, reduction: int, transformed: bool) -> Verdict:
    return Verdict(gate.deviation(actual, exact, reduction, transformed=transformed), *gate.errors(actual, exact))
