"""Where cuDNN runs convolution, bias and ReLU as one kernel that keeps NaN: what the model of cost is told of a chip.

Only on the chip itself can that be seen. Whoever has tried it tells; until then torch's passes are counted.
"""

from __future__ import annotations

import math

import torch

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning.calls import forget
from fastconv.tuning.sides import VECTOR_BYTES

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_ELEMENTS = 2**31  # that cuDNN's engines may number in 32 bits

Window = tuple[tuple[int, int], ...]

_fused: dict[tuple[str, Policy, Window], bool] = {}


def window(g: ConvGeometry) -> Window:
    """What of a geometry an answer is kept for: sizes of the map and channels are left to `suits`."""
    return ((g.kernel_height, g.kernel_width), g.stride, g.padding, g.dilation)


def suits(g: ConvGeometry, policy: Policy) -> bool:
    """Whether cuDNN has a fused kernel for these sizes in NHWC: whole vectors of channels, no groups, 32-bit offsets."""
    if g.is_empty or g.groups != 1 or policy.dtype not in _DTYPES:
        return False
    size = policy.dtype.itemsize
    if g.in_channels * size % VECTOR_BYTES or g.out_channels * size % VECTOR_BYTES:
        return False
    return max(math.prod(g.input_shape), math.prod(g.output_shape)) < _MOST_ELEMENTS


def note_fused(chip: str, g: ConvGeometry, policy: Policy, fuses: bool) -> None:
    """`chip` runs forwards with the window of `g` fused, or does not; choices are made anew where that is news."""
    key = (chip, policy, window(g))
    if _fused.get(key, False) != fuses:
        _fused[key] = fuses
        forget()


def is_fused(chip: str, g: ConvGeometry, policy: Policy) -> bool:
    return _fused.get((chip, policy, window(g)), False) and suits(g, policy)
