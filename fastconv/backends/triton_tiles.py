"""How a call of the Triton backend is cut into tiles: plain rules, one function for each family of kernels.

Under the interpreter a step costs the same whatever its tile, so that tiles are as large as the call.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy

_PROGRAMS_PER_PROCESSOR = 4
_INTERPRETED_PROGRAMS = 2
_MANY_PIXELS = 4096


def product(reduction: int, outputs: int, pixels: int, policy: Policy, interpreted: bool) -> dict[str, Any]:
    """Forward and input gradient: `outputs` channels × `pixels`, summed over taps × `reduction` channels."""
    if interpreted:
        sides = {"BLOCK_N": _side(outputs, 128), "BLOCK_M": _side(pixels, 512), "BLOCK_K": _side(reduction, 128)}
        return {**sides, "NUM_STAGES": 1, "PRECISION": "ieee"}
    if policy.dtype == torch.float32 and not policy.tf32:
        sides = {"BLOCK_N": _side(outputs, 64), "BLOCK_M": 64, "BLOCK_K": 16}
        return {**sides, "NUM_STAGES": 3, "PRECISION": "ieee", "num_warps": 4}
    block_n = _side(outputs, 256 // policy.dtype.itemsize)
    block_m = 128 if pixels > _MANY_PIXELS else 64
    block_k = _divisor_side(reduction, 128 // policy.dtype.itemsize) or _side(reduction, 32)
    sides = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_K": block_k}
    return {**sides, "NUM_STAGES": 3, "PRECISION": "tf32", "num_warps": _warps(block_n * block_m)}


def weight_grad(g: ConvGeometry, policy: Policy, interpreted: bool) -> dict[str, Any]:
    """Weight gradient: output channels × columns (taps × channels), summed over pixels."""
    columns = g.taps * g.group_in_channels
    if interpreted:
        sides = {
            "BLOCK_N": _side(g.group_out_channels, 128),
            "BLOCK_C": _divisor_side(g.group_in_channels, 128) or _side(columns, 128),
            "BLOCK_P": _side(cdiv(g.out_pixels, _INTERPRETED_PROGRAMS), 512),
        }
        return {**sides, "NUM_STAGES": 1, "PRECISION": "ieee"}
    is_ieee = policy.dtype == torch.float32 and not policy.tf32
    largest = 64 if policy.dtype == torch.float32 else 128
    block_n = _side(g.group_out_channels, largest)
    block_c = _divisor_side(g.group_in_channels, largest)
    # A tile of several taps computes an address for each element, which takes registers.
    warps = 8 if block_c is None else _warps(block_n * block_c)
    block_c = block_c or _side(columns, 64)
    sides = {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_P": 128 // policy.dtype.itemsize}
    precision = "ieee" if is_ieee else "tf32"
    return {**sides, "NUM_STAGES": 3, "PRECISION": precision, "num_warps": warps}


def elementwise(channels: int, pixels: int, dtype: torch.dtype, interpreted: bool) -> dict[str, int]:
    """A pass over a map's pixels × channels: 16 bytes for each thread of four warps."""
    if interpreted:
        return {"BLOCK_M": _side(pixels, 1024), "BLOCK_C": _side(channels, 128)}
    block_c = min(_power_of_two(channels), 64)
    return {"BLOCK_M": 128 * 16 // dtype.itemsize // block_c, "BLOCK_C": block_c}


def rows(interpreted: bool) -> dict[str, int]:
    """A sum over rows of partial sums."""
    return {"BLOCK_R": 64, "BLOCK_C": 1024} if interpreted else {"BLOCK_R": 16, "BLOCK_C": 64}


def split(pixels: int, block: int, others: int, device: torch.device) -> tuple[int, int]:
    """(programs, pixels of each): whole blocks, and enough programs to fill the device with the grid's `others`."""
    wanted = _INTERPRETED_PROGRAMS
    if device.type == "cuda":
        wanted = cdiv(_PROGRAMS_PER_PROCESSOR * _processors(device.index), others)
    each = cdiv(cdiv(pixels, wanted), block) * block
    return cdiv(pixels, each), each


def cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


@cache
def _processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def _warps(elements: int) -> int:
    """At most 64 accumulators a thread, mostly 32: addresses take as many registers."""
    return 8 if elements >= 64 * 128 else 4


def _side(size: int, largest: int) -> int:
    """A tile's side for `size`: tl.dot takes powers of two from 16 on."""
    return min(max(_power_of_two(size), 16), largest)


def _divisor_side(size: int, largest: int) -> int | None:
    """The largest side that divides `size`, which makes masks unnecessary; None where that would be a narrow tile."""
    side = min(size & -size, largest)
    return side if side >= 32 else None


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
