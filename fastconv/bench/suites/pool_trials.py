"""Single pools: forward, backward, forward and backward together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from fastconv.bench.records import is_ours
from fastconv.bench.suites.cases import PoolCase
from fastconv.bench.suites.layer_trials import verdict
from fastconv.bench.suites.providers import forget_compiled, laid_out, resolve
from fastconv.bench.trial import Trial, Verdict, Work, torch_dtype
from fastconv.geometry import PoolGeometry, global_pool

Run = Callable[[Tensor], Tensor]


def trials(
    case: PoolCase, dtype: str, device: torch.device, directions: tuple[str, ...], providers: tuple[str, ...]
) -> Iterator[Trial]:
    """The directions asked for, each by all of `providers`; each reads the same values in its own memory format."""
    runs = {name: _runner(name, case) for name in providers}
    pool = geometry(case)
    kind = torch_dtype(dtype)
    x, grad = (torch.randn(shape, device=device).to(kind) for shape in (pool.input_shape, pool.output_shape))
    given = {name: laid_out(name, (x.requires_grad_(), grad)) for name in providers}
    images = x.detach().double().requires_grad_()
    exact = _runner("eager_channels_last", case)(images)
    (exact_gradient,) = torch.autograd.grad(exact, images, grad.double())
    exact = exact.detach()
    del images
    first = next(iter(given.values()))

    def fresh(parts: tuple[int, ...] = (0, 1)) -> None:
        with torch.no_grad():
            for i in parts:
                first[i].normal_()
                for operands in given.values():
                    if operands is not first:
                        operands[i].copy_(first[i])

    def forward(name: str) -> Tensor:
        with torch.inference_mode():
            return runs[name](given[name][0])

    def both(name: str) -> tuple[Tensor, Tensor]:
        operand, g = given[name]
        output = runs[name](operand)
        return output, torch.autograd.grad(output, operand, g)[0]

    def forward_right(name: str) -> Verdict:
        return verdict(forward(name), exact, _terms(case))

    def both_right(name: str) -> Verdict:
        output, gradient = both(name)
        found = verdict(output, exact, _terms(case))
        if found.wrong is not None:
            return found
        rounds_sums = pool.is_overlapping and not is_ours(name)  # stock torch, after each addition in the maps' dtype
        return _worse(found, verdict(gradient, exact_gradient, _terms(case), rounded=rounds_sums))

    def recorded(name: str) -> Callable[[], object]:
        outputs: list[Tensor] = []

        def call() -> object:
            operand, g = given[name]
            if not outputs:
                outputs.append(runs[name](operand))
            return torch.autograd.grad(outputs[0], operand, g, retain_graph=True)

        return call

    def trial(direction: str, calls: dict[str, Callable[[], object]], check: Callable[[str], Verdict]) -> Trial:
        work = Work(None, _bytes(case, direction, kind.itemsize))
        draw = (lambda: fresh((1,))) if direction == "backward" else fresh
        what = ("pools", case.case, direction, dtype)
        is_recorded = direction == "both"
        return Trial(*what, device, calls, check, draw, work, records=is_recorded, close=forget_compiled(calls))

    # The gate is of the values drawn above: what is timed draws anew.
    for direction in directions:
        with torch.no_grad():
            for operands in given.values():
                operands[0].copy_(x)
                operands[1].copy_(grad)
        if direction == "backward":
            yield trial(direction, {n: recorded(n) for n in runs if not n.startswith("compile")}, both_right)
        else:
            function, right = (forward, forward_right) if direction == "forward" else (both, both_right)
            yield trial(direction, {n: lambda f=function, n=n: f(n) for n in runs}, right)  # type: ignore[misc]


def geometry(case: PoolCase) -> PoolGeometry:
    shape = (case.batch, case.channels, case.size, case.size)
    if case.window is None:
        return global_pool(case.op, shape)
    kernel, stride, padding = case.window
    return PoolGeometry.of(case.op, shape, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), False)


def _runner(name: str, case: PoolCase) -> Run:
    arguments = () if case.window is None else case.window

    def build(module: ModuleType) -> Run:
        function: Callable[..., Tensor] = getattr(module, case.op)
        return lambda x: function(x, *arguments)

    return resolve(name, build)


def _terms(case: PoolCase) -> int:
    """Summed into an element of an output or, where windows overlap, of a gradient."""
    if case.window is None:
        return case.size**2
    return case.window[0] ** 2


def _bytes(case: PoolCase, direction: str, itemsize: int) -> int:
    """Each map once; of a max-pool's winners a byte each."""
    pool = geometry(case)
    maps = (math.prod(pool.input_shape) + math.prod(pool.output_shape)) * itemsize
    codes = math.prod(pool.output_shape) if "max" in case.op else 0
    return {"forward": maps, "backward": maps + codes, "both": 2 * (maps + codes)}[direction]


def _worse(one: Verdict, other: Verdict) -> Verdict:
    return Verdict(other.wrong, max(one.max_error, other.max_error), max(one.rms_error, other.rms_error))
