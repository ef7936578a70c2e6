"""How the passes of the Triton backend are cut into tiles: plain rules, one function for each family of kernels.

Under the interpreter a step costs the same whatever its tile, so that tiles are as large as the call. The tiles of
convolutions are tuning's.
"""

from __future__ import annotations

import torch

from fastconv.tuning.sides import INTERPRETED_PROGRAMS, PROGRAMS_PER_PROCESSOR, cdiv, power_of_two, product_splits, side

# The update of running statistics.
UPDATE = {"BLOCK_C": 128}


def elementwise(channels: int, pixels: int, dtype: torch.dtype, interpreted: bool) -> dict[str, int]:
    """A pass over a map's pixels × channels: 16 bytes for each thread of four warps."""
    if interpreted:
        return {"BLOCK_M": side(pixels, 1024), "BLOCK_C": side(channels, 128)}
    block_c = min(power_of_two(channels), 64)
    return {"BLOCK_M": 128 * 16 // dtype.itemsize // block_c, "BLOCK_C": block_c}


def normalised(channels: int, pixels: int, dtype: torch.dtype, interpreted: bool) -> dict[str, int]:
    """As `elementwise`, with 16 values for each thread: it reads its channels' parameters for each tile anew."""
    blocks = elementwise(channels, pixels, dtype, interpreted)
    return blocks if interpreted else {**blocks, "BLOCK_M": blocks["BLOCK_M"] * dtype.itemsize}


def padded_pixels(channels: int, interpreted: bool) -> int:
    """Pixels to a program that copies into `channels`, a power of two."""
    return (16384 if interpreted else 2048) // channels


def rows(interpreted: bool) -> dict[str, int]:
    """A sum over rows of partial sums."""
    return {"BLOCK_R": 64, "BLOCK_C": 1024} if interpreted else {"BLOCK_R": 16, "BLOCK_C": 64}


def split(pixels: int, block: int, others: int, processors: int | None) -> tuple[int, int]:
    """(programs, pixels of each): whole blocks, and enough programs to fill the device with the grid's `others`.

    Args:
        processors: of the device; None under the interpreter.
    """
    wanted = INTERPRETED_PROGRAMS if processors is None else cdiv(PROGRAMS_PER_PROCESSOR * processors, others)
    each = cdiv(cdiv(pixels, wanted), block) * block
    return cdiv(pixels, each), each


def split_product(blocks: int, block: int, others: int, processors: int | None) -> tuple[int, int]:
    """(programs, blocks of each) of a weight gradient: a product of matrices, summed over `blocks` × `block` pixels."""
    wanted = INTERPRETED_PROGRAMS if processors is None else product_splits(blocks, block, others, processors)
    each = cdiv(blocks, wanted)
    return cdiv(blocks, each), each
