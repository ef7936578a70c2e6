"""When a result is right: the one table of tolerances, for tests and for what a search may time.

With inputs of unit scale, a sum of K products in float32 has a relative rounding error of about u32 · sqrt(K / 2), whatever
the order of summation; each rounding to the output's dtype adds half a unit in the last place, at most `u` of the value.
At most two such roundings are allowed: one of the convolution, one after the residual. Bounds hold for the largest and for
the root-mean-square error, the latter catching what a generous maximum would hide.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastconv.precision import get_precision

# Unit roundoff of each dtype, and of the float32 (float64) accumulation behind it.
_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Ten bits of mantissa. Operands may be truncated to them, as tensor cores do of what nobody rounded before: up to two units.
_TF32_UNIT = 2.0**-11


# Of Winograd's F(4×4, 3×3), against the bounds of a direct sum: 1.0 to 1.6 times the error in the root mean square (2.1 with
# fewer than 16 channels), but up to 60 times in the worst of some million elements: corners of a tile weigh most.
_TRANSFORMED_RMS, _TRANSFORMED_MAXIMUM = 2.5, 12.0


def bounds(
    dtype: torch.dtype, reduction: int, tf32: bool = False, transformed: bool = False, rounded: bool = False
) -> tuple[float, float, float]:
    """(relative maximum per element, maximum in units of the expected RMS, RMS error in the same units)."""
    unit = _UNIT[dtype]
    accumulation = max(_UNIT[torch.float64], _UNIT[torch.float32] if dtype != torch.float64 else 0.0)
    summed = accumulation * (2 + math.sqrt(reduction)) + (2 * _TF32_UNIT if tf32 else 0.0) + (unit if rounded else 0.0)
    rms, maximum = (_TRANSFORMED_RMS, _TRANSFORMED_MAXIMUM) if transformed else (1.0, 1.0)
    # A sum of few products, all of which truncation makes smaller, is off by a share of itself.
    relative = 2 * unit + (4 * _TF32_UNIT if tf32 else 0.0)
    return relative, 2 * unit + 6 * maximum * summed, unit + rms * summed


def may_transform(device_type: str, kernel_size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether Winograd's transforms may serve a convolution under the precision in force."""
    return (device_type, get_precision(), tuple(kernel_size), tuple(stride)) == ("cpu", "fast", (3, 3), (1, 1))


def deviation(
    actual: Tensor,
    expected: Tensor,
    reduction: int,
    tf32: bool = False,
    scale: float = 0.0,
    dtype: torch.dtype | None = None,
    transformed: bool = False,
    rounded: bool = False,
) -> str | None:
    """None where `actual` is as near to the float64 `expected` as its dtype allows; else how far off it is.

    Args:
        reduction: the number of products summed into an element (taps · channels for a convolution; 1 for a pool).
        tf32: products may round their operands to TF32.
        scale: the least size to measure errors by, where few elements are expected and their terms may cancel.
        dtype: whose rounding is allowed, where terms were rounded to another one than the result's.
        transformed: products may be regrouped by Winograd's transforms.
        rounded: the terms of the sum were themselves sums and rounded to `dtype`, such as the gradients of elements that
            several windows of a pool share (stock torch rounds after each addition).
    """
    dtype = actual.dtype if dtype is None else dtype
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach(), expected.detach()
    relative, absolute, rms = bounds(dtype, reduction, tf32, transformed, rounded)
    count, size = 0, 0.0  # of what is finite
    for _, part in _parts(actual, expected):
        finite = part.isfinite()
        count += int(finite.sum())
        size += part.where(finite, 0.0).square().sum().item()
    if count == 0:
        size = 1.0
    scale = max(scale, math.sqrt(size / max(count, 1)))
    largest = excess = squares = 0.0
    for result, exact in _parts(actual, expected):
        finite = exact.isfinite()
        if not finite.all():
            odd, wanted = result[~finite], exact[~finite]
            if not ((odd == wanted) | (odd.isnan() & wanted.isnan())).all():
                return "NaN or infinities are not where they are expected"
            result, exact = result.where(finite, 0.0), exact.where(finite, 0.0)
        if not result.isfinite().all():
            return f"{(~result.isfinite()).sum()} of {actual.numel()} elements are not finite"
        if result.numel() == 0:
            continue
        error = (result - exact).abs()
        largest, squares = max(largest, error.max().item()), squares + error.square().sum().item()
        excess = max(excess, error.sub_(exact.abs(), alpha=relative).max().item())
    if not excess <= absolute * scale:
        return f"maximum error {largest:.3e} over {relative:.1e} · |expected| + {absolute:.1e} · {scale:.3e} (RMS)"
    measured = math.sqrt(squares / max(count, 1))
    if not measured <= rms * scale:
        return f"RMS error {measured:.3e} over {rms:.1e} · {scale:.3e}"
    return None


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest, root mean square) error, in units of the float64 `expected`'s root mean square."""
    largest = squares = size = 0.0
    for result, exact in _parts(actual.detach(), expected.detach()):
        if result.numel() == 0:
            continue
        error = result - exact
        largest, squares = max(largest, error.abs().max().item()), squares + error.square().sum().item()
        size += exact.square().sum().item()
    count = max(expected.numel(), 1)
    scale = math.sqrt(size / count) or 1.0
    return largest / scale, math.sqrt(squares / count) / scale


_PART = 2**27  # elements of a map that are compared at a time, of which several copies in float64 lie in memory


def _parts(actual: Tensor, expected: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in float64, some images at a time: what a GPU can hold once, it cannot hold six times in float64."""
    if actual.dim() == 0:
        yield actual.double(), expected.double()
        return
    rows = max(1, _PART // max(actual[:1].numel(), 1))
    for start in range(0, len(actual), rows):
        part = slice(start, start + rows)
        yield actual[part].double(), expected[part].double()


@contextlib.contextmanager
def searching(wanted: bool) -> Iterator[None]:
    """A block in which cuDNN searches its algorithms, as for what is timed, or does not, as for what runs once."""
    # Not by torch.backends.cudnn.benchmark, which refuses once torch's own tests' utilities have been imported.
    before = torch._C._get_cudnn_benchmark()
    torch._C._set_cudnn_benchmark(wanted)
    try:
        yield
    finally:
        torch._C._set_cudnn_benchmark(before)


def net_bounds(
    dtype: torch.dtype, reductions: Sequence[int], transformed: bool = False, tf32: bool = False
) -> tuple[float, float]:
    """(relative norm allowed to the error of a net's output, of a gradient of its parameters).

    Each layer adds an error of its own to the output: ReLUs and pools do not enlarge one, random weights hardly. An error e
    of the maps turns the sign of some share e of their elements and the winners of as many windows; each turn takes a
    term from a gradient or adds one, and those terms are √e of its norm. So this finds gradients that are lost,
    doubled or mixed up; what kernels compute is told apart by fastconv.bench.audit only.

    Args:
        dtype: of the maps.
        reductions: of each layer with weights, the number of products summed into an element.
        transformed, tf32: as in `deviation`, of any layer.
    """
    output = sum(bounds(dtype, reduction, tf32, transformed)[2] for reduction in reductions)
    return output, 2 * math.sqrt(output)
