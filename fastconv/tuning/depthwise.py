"""Candidates of the depthwise kernels: tiles of pixels × channels, 16 bytes for each thread of four warps."""

from __future__ import annotations

from collections.abc import Iterator

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning.sides import VECTOR_BYTES, cdiv, power_of_two

FAMILY = "depthwise"

_TILE_BYTES = 128 * VECTOR_BYTES
_LARGEST_CHANNELS = 64
ROWS = 4  # of outputs in a program of the kernel for 3×3 windows of stride 1


def candidates(direction: str, g: ConvGeometry, policy: Policy, capability: int | None) -> Iterator[dict[str, int]]:
    """Configurations for one output channel a group, the likely best first; none for other convolutions.

    With ROWS the kernel is the one that reads a row for several rows of outputs.

    Args:
        capability: of the chip; None under the interpreter, for which tiles are as large as the call.
    """
    if g.groups == 1 or g.in_channels != g.groups or g.out_channels != g.groups:
        return
    height, width = (g.height, g.width) if direction == "input_grad" else (g.out_height, g.out_width)
    elements = 2**16 if capability is None else _TILE_BYTES // policy.dtype.itemsize
    block_c = min(power_of_two(g.in_channels), 128 if capability is None else _LARGEST_CHANNELS)
    block_m = min(elements // block_c, power_of_two(g.batch * height * width))
    if direction != "weight_grad" and g.stride == g.dilation == (1, 1) and (g.kernel_height, g.kernel_width) == (3, 3):
        columns = min(block_m, power_of_two(width))
        # A narrow map leaves room for more channels, or for nothing.
        channels = min(power_of_two(g.in_channels), elements // columns)
        if 2 * cdiv(height, ROWS) * ROWS * cdiv(width, columns) * columns <= 3 * height * width:
            yield {"ROWS": ROWS, "BLOCK_M": columns, "BLOCK_C": channels, **_warps(columns * channels, policy, capability)}
    yield {"ROWS": 1, "BLOCK_M": block_m, "BLOCK_C": block_c, **_warps(block_m * block_c, policy, capability)}


def _warps(elements: int, policy: Policy, capability: int | None) -> dict[str, int]:
    if capability is None:
        return {}
    return {"num_warps": max(1, min(4, elements * policy.dtype.itemsize // (32 * VECTOR_BYTES)))}
