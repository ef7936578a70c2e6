"""Candidates of the pointer kernels for narrow groups, some of which are packed into one tile."""

from __future__ import annotations

from collections.abc import Iterator

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning.sides import INTERPRETED_PROGRAMS, VECTOR_BYTES, cdiv, has_tensor_cores, power_of_two, side, swap

FAMILY = "pointer"

_WIDTHS = (16, 32, 64)  # channels of a tile
_MOST_GROUPS = 16  # of a tile: of n groups' products one n-th counts


def candidates(direction: str, g: ConvGeometry, policy: Policy, capability: int | None) -> Iterator[dict[str, int]]:
    """Configurations for groups of 2 to 63 channels, the likely best first; a single channel's have kernels of their own.

    Args:
        capability: of the chip; None under the interpreter, for which tiles are as large as the call.
    """
    widest = max(g.group_in_channels, g.group_out_channels)
    if g.groups == 1 or widest == 1 or widest >= _WIDTHS[-1]:
        return
    # Without tensor cores a product of 64 channels a step is too long a program, where groups are few and wide anyway.
    largest = _WIDTHS[-1] if capability is None or has_tensor_cores(policy) else _WIDTHS[-2]
    for pack in _packs(g, widest, largest, policy.dtype.itemsize):
        if direction == "weight_grad":
            yield _weight_grad(g, policy, pack, capability)
        elif direction == "input_grad":
            phase_pixels = g.batch * cdiv(g.height, g.stride_h) * cdiv(g.width, g.stride_w)
            yield _product(pack, g.group_out_channels, g.group_in_channels, phase_pixels, policy, capability)
        else:
            yield _product(pack, g.group_in_channels, g.group_out_channels, g.out_pixels, policy, capability)


def _packs(g: ConvGeometry, widest: int, largest: int, itemsize: int) -> list[int]:
    """Groups to a tile. Few multiply few zeros; but a tile should begin at a whole vector of 16 bytes."""
    most = min(power_of_two(g.groups), _MOST_GROUPS)
    packs = dict.fromkeys(
        min(most, power_of_two(width // widest + 1) // 2) for width in _WIDTHS if widest <= width <= largest
    )

    def is_unaligned(pack: int) -> bool:
        return any(pack * channels * itemsize % VECTOR_BYTES for channels in (g.group_in_channels, g.group_out_channels))

    return sorted(packs, key=is_unaligned)


def _product(pack: int, reduction: int, outputs: int, pixels: int, policy: Policy, capability: int | None) -> dict[str, int]:
    sides = {"PACK": pack, "BLOCK_N": side(pack * outputs, 64), "BLOCK_K": side(pack * reduction, 64)}
    if capability is None:
        return {**sides, "SWAP": 0, "BLOCK_M": side(pixels, 512), "NUM_STAGES": 1}
    if not has_tensor_cores(policy):
        return {**sides, "SWAP": 1, "BLOCK_M": 64, "NUM_STAGES": 3, "num_warps": 4}
    swapped = swap(sides["BLOCK_N"], policy, capability)
    warps = 8 if sides["BLOCK_N"] == 64 else 4  # registers for the weights' addresses, one for each element
    # As many bytes in either precision, which every chip's registers and shared memory hold.
    block_m, stages = 256 // policy.dtype.itemsize, 8 // policy.dtype.itemsize
    return {**sides, "SWAP": swapped, "BLOCK_M": block_m, "NUM_STAGES": stages, "num_warps": warps}


def _weight_grad(g: ConvGeometry, policy: Policy, pack: int, capability: int | None) -> dict[str, int]:
    block_n = side(pack * g.group_out_channels, 64)
    if capability is None:
        pixels = side(cdiv(g.out_pixels, INTERPRETED_PROGRAMS), 512)
        sides = {"BLOCK_N": block_n, "BLOCK_C": side(g.taps * pack * g.group_in_channels, 512), "BLOCK_P": pixels}
        return {"PACK": pack, "SWAP": 1, **sides, "NUM_STAGES": 1}
    sides = {"BLOCK_N": block_n, "BLOCK_C": 64, "BLOCK_P": 128 // policy.dtype.itemsize}
    return {"PACK": pack, "SWAP": swap(block_n, policy, capability), **sides, "NUM_STAGES": 3, "num_warps": 4}
