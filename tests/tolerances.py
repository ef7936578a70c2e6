"""The one tolerance table: how far a result may lie from the float64 oracle.

With inputs of unit scale, a sum of K products in float32 has a relative rounding error of about u32 · sqrt(K / 2), whatever
the order of summation; each rounding to the output's dtype adds half a unit in the last place, at most `u` of the value.
At most two such roundings are allowed: one of the convolution, one after the residual. Bounds hold for the largest and for
the root-mean-square error, the latter catching what a generous maximum would hide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Unit roundoff of each dtype, and of the float32 (float64) accumulation behind it.
_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_TF32_UNIT = 2.0**-11  # operands rounded (not truncated) to ten bits of mantissa


def bounds(dtype: torch.dtype, reduction: int, tf32: bool = False) -> tuple[float, float, float]:
    """(relative maximum per element, maximum in units of the expected RMS, RMS error in the same units)."""
    unit = _UNIT[dtype]
    accumulation = max(_UNIT[torch.float64], _UNIT[torch.float32] if dtype != torch.float64 else 0.0)
    summed = accumulation * (2 + math.sqrt(reduction)) + (2 * _TF32_UNIT if tf32 else 0.0)
    return 2 * unit, 2 * unit + 6 * summed, unit + summed


def assert_close(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    reduction: int,
    what: str = "",
    tf32: bool = False,
    scale: float = 0.0,
) -> None:
    """`actual` (of `dtype`) against the float64 `expected`; NaN and infinities must lie at the same places.

    Args:
        scale: the least size to measure errors by, where few elements are expected and their terms may cancel.
        reduction: the number of products summed into an element (taps · channels for a convolution; 1 for a pool).
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.dtype == dtype, f"{what}: dtype {actual.dtype} != {dtype}"
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    torch.testing.assert_close(actual[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True, msg=f"{what}: non-finite")
    actual, expected = actual[finite], expected[finite]
    if expected.numel() == 0:
        return
    assert actual.isfinite().all(), f"{what}: {(~actual.isfinite()).sum()} of {actual.numel()} elements are not finite"
    error = (actual - expected).abs()
    scale = max(scale, expected.square().mean().sqrt().item())
    relative, absolute, rms = bounds(dtype, reduction, tf32)
    excess = error - relative * expected.abs()
    assert excess.max().item() <= absolute * scale, (
        f"{what}: maximum error {error.max():.3e} over {relative:.1e} · |expected| + {absolute:.1e} · {scale:.3e} (RMS)"
    )
    measured = error.square().mean().sqrt().item()
    assert measured <= rms * scale, f"{what}: RMS error {measured:.3e} over {rms:.1e} · {scale:.3e}"
