"""Assertions by the one tolerance table, fastconv.bench.gate: how far a result may lie from the float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv.bench.gate import bounds, deviation

__all__ = ["assert_close", "bounds"]


def assert_close(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    reduction: int,
    what: str = "",
    tf32: bool = False,
    scale: float = 0.0,
    transformed: bool = False,
) -> None:
    """`actual` (of `dtype`) against the float64 `expected`; NaN and infinities must lie at the same places.

    Args:
        scale: the least size to measure errors by, where few elements are expected and their terms may cancel.
        transformed: products may be regrouped by Winograd's transforms.
        reduction: the number of products summed into an element (taps · channels for a convolution; 1 for a pool).
    """
    assert actual.dtype == dtype, f"{what}: dtype {actual.dtype} != {dtype}"
    wrong = deviation(actual, expected, reduction, tf32, scale, transformed=transformed)
    assert wrong is None, f"{what}: {wrong}"
