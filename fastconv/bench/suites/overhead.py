"""The host's time a call: the way to a launcher that does nothing, beside an operator of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import functional, reference
from fastconv.backends import aten, native, triton
from fastconv.bench.suites.layer_trials import verdict
from fastconv.bench.trial import Trial, Verdict, ours, torch_dtype

_CHANNELS, _SIZE = 8, 4  # so small that torch's operator is its own overhead too
_LAUNCHERS = ("conv2d", "conv2d_relu_max_pool2d")

# By name: the function, and whether gradients are recorded.
CALLS = {
    "conv2d_relu, no_grad": ("conv2d_relu", False),
    "conv2d_relu, recorded for backward": ("conv2d_relu", True),
    "conv2d_relu_max_pool2d, recorded for backward": ("conv2d_relu_max_pool2d", True),
}


def trials(case: str, dtype: str, device: torch.device) -> Iterator[Trial]:
    """`case` by fastconv, whose launchers are replaced once its result was found right, and F.conv2d; one thread."""
    op, recorded = CALLS[case]
    kind, products = torch_dtype(dtype), 9 * _CHANNELS
    images = torch.randn(1, _CHANNELS, _SIZE, _SIZE, device=device).to(kind).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(_CHANNELS, _CHANNELS, 3, 3, device=device).to(kind).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(_CHANNELS, device=device).to(kind)
    exact = {module: _each(module, op)(*(t.double() for t in (images, weight, bias))) for module in (reference, F)}
    parameters = [t.requires_grad_(recorded) for t in (weight, bias)]
    functions = {ours(): _each(functional, op), "eager_channels_last": _each(F, op)}
    stubs = contextlib.ExitStack()

    def run(name: str) -> Tensor:
        with torch.set_grad_enabled(recorded):
            return functions[name](images, *parameters)

    def check(name: str) -> Verdict:
        found = verdict(run(name), exact[reference if name == ours() else F], products)
        if name == ours() and found.wrong is None:
            stubs.enter_context(launching_nothing())
            run(name)  # which the launchers repeat from now on
        return found

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def close() -> None:
        torch.set_num_threads(threads)
        stubs.close()

    calls: dict[str, Callable[[], object]] = {name: lambda name=name: run(name) for name in functions}  # type: ignore[misc]
    yield Trial("overhead", case, "forward", dtype, device, calls, check, lambda: None, on_host=True, close=close)


def _each(module: Any, op: str) -> Callable[..., Tensor]:
    if module is F:
        return lambda x, weight, bias: F.conv2d(x, weight, bias, 1, 1)
    function: Callable[..., Tensor] = getattr(module, op)
    return lambda x, weight, bias: function(x, weight, bias, 1, 1)


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Launchers of convolutions compute their first result, and from then on leave memory of its sizes as it is."""
    with contextlib.ExitStack() as stack:
        for backend in (triton, native, aten):
            for name in _LAUNCHERS:
                stack.enter_context(mock.patch.object(backend, name, _once(getattr(backend, name))))
        yield


def _once(launcher: Callable[..., Any]) -> Callable[..., Any]:
    made: list[Any] = []

    def repeat(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(launcher(*args, **kwargs))
        result = made[0]
        return torch.empty_like(result) if isinstance(result, Tensor) else tuple(map(torch.empty_like, result))

    return repeat
