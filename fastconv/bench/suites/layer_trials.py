"""Single layers: forward, backward, each gradient of the convolution by itself, forward and backward together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastconv import backends
from fastconv.bench import gate
from fastconv.bench.records import is_ours
from fastconv.bench.suites import layers
from fastconv.bench.suites.cases import LayerCase
from fastconv.bench.suites.layers import Run
from fastconv.bench.suites.providers import forget_compiled, laid_out, resolve
from fastconv.bench.trial import Trial, Verdict, ours, torch_dtype
from fastconv.precision import policy

Call = Callable[[], object]
Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def trials(
    suite: str, case: LayerCase, dtype: str, device: torch.device, directions: tuple[str, ...], providers: tuple[str, ...]
) -> Iterator[Trial]:
    """The directions asked for, each by those of `providers` that can; a first layer has no input gradient.

    Every provider reads the same values, in the memory format that is its own; what NCHW callers get is measured in NCHW.
    """
    layer, kind = case.layer, torch_dtype(dtype)
    last = torch.channels_last if case.channels_last else torch.contiguous_format
    given = layers.operands(layer, case.batch, kind, device, last)
    held = layers.untied(layer, *(t.detach().clone().requires_grad_(t.requires_grad) for t in given))
    exact = layers.both_exact(layer, *held)
    runs = {name: runner(name, layer) for name in providers}
    if not case.channels_last:
        runs.pop("eager_channels_last", None)
    needs_copies = case.channels_last and "eager_nchw" in runs
    copies = _nchw(given) if needs_copies else given
    held_copies = _nchw(held) if needs_copies else held

    def operands(name: str, of: Operands, laid_out: Operands) -> Operands:
        return laid_out if name == "eager_nchw" else of

    def fresh(grad_only: bool = False) -> None:
        with torch.no_grad():
            for i in (3,) if grad_only else (0, 3):
                given[i].normal_()
                if needs_copies:
                    copies[i].copy_(given[i])

    def trial(direction: str, calls: dict[str, Call], check: Callable[[str], Verdict], draw: Call = fresh) -> Trial:
        work = layer.work(case.batch, direction, kind.itemsize)
        records = direction == "both"
        what = (suite, case.case, direction, dtype)
        return Trial(*what, device, calls, check, draw, work, records=records, close=forget_compiled(calls))

    products, transformed = layer.in_channels * layer.kernel**2, layers.transformed(layer, given[0])

    if "forward" in directions:

        def forward(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            with torch.inference_mode():
                return runs[name](x, weight, bias)

        def forward_right(name: str) -> Verdict:
            return verdict(forward(name, *operands(name, held, held_copies)[:3]), exact[0], products, transformed)

        yield trial(
            "forward", {name: _call(forward, name, operands(name, given, copies)[:3]) for name in runs}, forward_right
        )

    def both_right(name: str) -> Verdict:
        return Verdict(*layers.check(runs[name], layer, operands(name, held, held_copies), exact))

    differentiable = [name for name in runs if name != "cudnn_fused"]
    if "backward" in directions:
        # A compiled backward may run once only, and gives its buffers away.
        graphs = {
            name: _recorded(runs[name], operands(name, given, copies))
            for name in differentiable
            if not name.startswith("compile")
        }
        yield trial("backward", graphs, both_right, lambda: fresh(grad_only=True))
        del graphs
    if "both" in directions:

        def both(name: str, *tensors: Tensor) -> list[Tensor]:
            return layers.both(runs[name], *tensors)

        yield trial("both", {name: _call(both, name, operands(name, given, copies)) for name in differentiable}, both_right)
    yield from _gradients(case, given[0], given[1], directions, trial, [name for name in providers if is_ours(name)])


def runner(name: str, layer: layers.Layer) -> Run:
    """What the provider `name` computes a layer by."""
    return layers.cudnn_fused(layer) if name == "cudnn_fused" else resolve(name, lambda module: layers.run_by(module, layer))


def _nchw(operands: Operands) -> Operands:
    x, weight, bias, grad = laid_out("eager_nchw", operands)
    return x, weight, bias, grad


def _call(function: Callable[..., object], name: str, operands: tuple[Tensor, ...]) -> Call:
    return lambda: function(name, *operands)


def _recorded(run: Run, operands: Operands) -> Call:
    """The backward of a forward that runs when it is first wanted."""
    x, weight, bias, grad = operands
    outputs: list[Tensor] = []

    def call() -> object:
        if not outputs:
            outputs.append(run(x, weight, bias))
        return torch.autograd.grad(outputs[0], layers.wanted(x, weight, bias), grad, retain_graph=True)

    return call


def _gradients(
    case: LayerCase, x: Tensor, weight: Tensor, directions: tuple[str, ...], trial: Callable[..., Trial], names: list[str]
) -> Iterator[Trial]:
    """The convolution's gradients, of a map before its ReLU and pool."""
    layer = case.layer
    wanted = [name for name in ("input_grad", "weight_grad") if name in directions]
    if layer.is_first:
        wanted = [name for name in wanted if name != "input_grad"]
    if not wanted:
        return
    x, weight = x.detach(), weight.detach()
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    shape = layer.conv(case.batch).output_shape
    grad = torch.randn(shape, device=x.device).to(x.dtype).contiguous(memory_format=layout)
    pairs = ([layer.stride] * 2, [layer.pads] * 2, [1, 1])
    eager = "eager_channels_last" if case.channels_last else "eager_nchw"

    def stock(direction: str, g: Tensor, a: Tensor, w: Tensor) -> Tensor:
        mask = [direction == "input_grad", direction == "weight_grad", False]
        results = torch.ops.aten.convolution_backward(g, a, w, None, *pairs, False, [0, 0], 1, mask)
        return results[0] if mask[0] else results[1]

    def own(direction: str, name: str) -> Tensor:
        operands = (None, weight) if direction == "input_grad" else (x, None)
        shapes = (x.shape, weight.shape, case.channels_last)
        backend = backends.requested() if name == ours() else name.partition("_")[2]
        results = torch.ops.fastconv.conv2d_backward(grad, *operands, *shapes, *pairs, 1, backend)
        return results[0] if direction == "input_grad" else results[1]

    def fresh() -> None:
        grad.normal_()
        x.normal_()

    for direction in wanted:
        calls: dict[str, Callable[[], Tensor]] = {
            name: lambda direction=direction, name=name: own(direction, name)  # type: ignore[misc]
            for name in names
        }
        calls[eager] = lambda direction=direction: stock(direction, grad, x, weight)  # type: ignore[misc]
        exact = stock(direction, grad.double(), x.double(), weight.double())
        reduction = layer.out_channels * layer.kernel**2 if direction == "input_grad" else math.prod(shape) // shape[1]

        def check(name: str, calls=calls, exact=exact, reduction=reduction) -> Verdict:  # type: ignore[no-untyped-def]
            return verdict(calls[name](), exact, reduction, layers.transformed(layer, x))

        yield trial(direction, calls, check, fresh)


def verdict(actual: Tensor, exact: Tensor, reduction: int, transformed: bool = False, rounded: bool = False) -> Verdict:
    """A result against the float64 `exact`, in the precision in force."""
    tf32 = policy(actual.dtype, actual.device.type).tf32
    reason = gate.deviation(actual, exact, reduction, tf32, transformed=transformed, rounded=rounded)
    return Verdict(reason, *gate.errors(actual, exact))
