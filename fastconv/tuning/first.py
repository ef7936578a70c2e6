"""Candidates of the kernels for few input channels: which convolutions they take, and their tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning.sides import WGMMA_ROWS, cdiv, power_of_two, side, swap

FAMILY = "first"

_MOST_CHANNELS = 15
_VECTOR_BYTES = 16
_MAX_PIXELS = 2**31 - 2**16  # numbered in 32 bits, counting past the end
_INTERPRETED_PROGRAMS = 2

# (output channels, pixels, warps) of a forward tile of 16 bits, the likely best first.
_TILES = ((64, 128, 4), (64, 256, 8), (128, 128, 8), (64, 256, 4))


def padded_shape(g: ConvGeometry, itemsize: int) -> tuple[int, int, int, int]:
    """(N, HP, WP, CP) of the copy that the kernels read: all that the outputs' windows see, in whole vectors."""
    height = (g.out_height - 1) * g.stride_h + (g.kernel_height - 1) * g.dilation_h + 1
    width = (g.out_width - 1) * g.stride_w + g.kernel_width
    return (g.batch, height, width, max(power_of_two(g.in_channels), _VECTOR_BYTES // itemsize))


def candidates(direction: str, g: ConvGeometry, policy: Policy, capability: int | None) -> Iterator[dict[str, int]]:
    """Configurations for a call, the likely best first; none where a row of taps is not one run, or for input gradients.

    Args:
        capability: of the chip; None under the interpreter, for which tiles are as large as the call.
    """
    if g.groups > 1 or g.in_channels > _MOST_CHANNELS or (g.dilation_w > 1 and g.kernel_width > 1):
        return
    batch, height, width, channels = padded_shape(g, policy.dtype.itemsize)
    if direction == "input_grad" or batch * height * width > _MAX_PIXELS:
        return
    run = g.kernel_width * channels
    if direction == "weight_grad":
        yield _weight_grad(g, policy, g.kernel_height * run, capability)
    elif capability is None:
        sides = {"BLOCK_N": side(g.out_channels, 128), "BLOCK_M": side(g.out_pixels, 512), "BLOCK_K": side(run, 64)}
        yield {**sides, "SWAP": 1, "NUM_STAGES": 1}
    elif policy.dtype == torch.float32 and not policy.tf32:
        sides = {"BLOCK_N": side(g.out_channels, 64), "BLOCK_M": 64, "BLOCK_K": 16}
        yield {**sides, "SWAP": 1, "NUM_STAGES": 3, "num_warps": 4}
    else:
        tiles = _TILES if policy.dtype.itemsize == 2 else ((64, 128, 4), (64, 64, 4))
        if capability < 90:  # whose operands take registers as well as the sums
            tiles = tuple((n, m, warps) for n, m, warps in tiles if n * m <= 2048 * warps)
        # A run is filled up with zeros to whole blocks; and a step costs about as much as 16 more elements would.
        block_k = min((64, 32, 16), key=lambda block: cdiv(run, block) * (block + 16))
        seen = set()
        for largest_n, block_m, warps in tiles:
            block_n = side(g.out_channels, largest_n)
            if (block_n, block_m, warps) not in seen:
                seen.add((block_n, block_m, warps))
                sides = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_K": block_k}
                yield {**sides, "SWAP": swap(block_n, policy, capability), "NUM_STAGES": 3, "num_warps": warps}


def _weight_grad(g: ConvGeometry, policy: Policy, columns: int, capability: int | None) -> dict[str, int]:
    if capability is None:
        rows, cols = _pixel_tile(g, side(cdiv(g.out_pixels, _INTERPRETED_PROGRAMS), 512))
        sides = {"BLOCK_N": side(g.out_channels, 128), "BLOCK_C": side(columns, 512), "BLOCK_H": rows, "BLOCK_W": cols}
        return {**sides, "SWAP": 1, "NUM_STAGES": 1}
    block_n = side(g.out_channels, 64)
    block_c = side(columns, 128 if policy.dtype.itemsize == 2 else 64)
    swapped = swap(block_n, policy, capability)
    if not swapped:
        block_c = max(block_c, WGMMA_ROWS)
    rows, cols = _pixel_tile(g, 128 // policy.dtype.itemsize)
    sides = {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_H": rows, "BLOCK_W": cols}
    return {**sides, "SWAP": swapped, "NUM_STAGES": 3, "num_warps": 4}


def _pixel_tile(g: ConvGeometry, pixels: int) -> tuple[int, int]:
    """(rows, columns) of a tile of `pixels` that covers a map with the least waste; of equals the widest."""

    def covered(rows: int) -> int:
        columns = pixels // rows
        return cdiv(g.out_height, rows) * rows * cdiv(g.out_width, columns) * columns

    rows = min((1 << bit for bit in range(pixels.bit_length())), key=covered)
    return rows, pixels // rows
