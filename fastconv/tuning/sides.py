"""Sides of tiles, how many programs there should be, and what a chip has room for."""

from __future__ import annotations

from functools import lru_cache

import torch

from fastconv.precision import Policy

# Programs that a split reduction makes for each processor: enough that one more or less evens out.
PROGRAMS_PER_PROCESSOR = 4
INTERPRETED_PROGRAMS = 2

# What one load of a thread takes; addresses and strides that are multiples of it suit wide loads and descriptors.
VECTOR_BYTES = 16

# That sm_90's tensor cores multiply at a time; tiles of fewer run on those of sm_80, at half the rate.
WGMMA_ROWS = 64

# What the parts of a split product cost, in pixels of its depth; by an H100's measured 600 TFLOP/s and 3.0 TB/s over its 132
# processors, a pixel of a 128 × 128 tile is 7 ns. A slab in float32 is written and read again: 8 bytes an element at 23 GB/s
# a processor. A program begins and ends with trips to memory of 600 ns each.
_SLAB, _FILL = 800, 170

# Bytes of shared memory that one program may have, by compute capability (CUDA programming guide, technical specifications).
_SHARED_MEMORY = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def round_up(size: int, side: int) -> int:
    return cdiv(size, side) * side


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def side(size: int, largest: int) -> int:
    """A tile's side for `size`: tl.dot takes powers of two from 16 on."""
    return min(max(power_of_two(size), 16), largest)


def divisor_side(size: int, largest: int) -> int | None:
    """The largest side that divides `size`, which makes masks unnecessary; None where that would be a narrow tile."""
    largest_divisor = min(size & -size, largest)
    return largest_divisor if largest_divisor >= 32 else None


def has_tensor_cores(policy: Policy) -> bool:
    return policy.tf32 or policy.dtype != torch.float32


def swap(block_n: int, policy: Policy, capability: int | None) -> int:
    """SWAP of a tile: 1, output channels are the product's rows; 0, its columns, where they are too few for sm_90."""
    return int(not has_tensor_cores(policy) or capability is None or capability < 90 or block_n >= WGMMA_ROWS)


@lru_cache(4096)
def product_splits(blocks: int, block: int, others: int, processors: int) -> int:
    """Into how many parts to cut a reduction over `blocks` × `block` pixels, each of `others` tiles being summed by its own.

    More parts keep all processors busy to the end; each part costs a slab.
    """

    def pixels(parts: int) -> int:  # of the busiest processor
        each = cdiv(blocks, parts) * block + _FILL + (_SLAB if parts > 1 else 0)
        return cdiv(others * parts, processors) * each

    most = min(blocks, cdiv(PROGRAMS_PER_PROCESSOR * processors, others))
    return min(range(1, most + 1), key=pixels)


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that one program may have; of an unknown generation, as the one before it."""
    return _SHARED_MEMORY[max((c for c in _SHARED_MEMORY if c <= capability), default=80)]


def shared_bytes(config: dict[str, int], itemsize: int) -> int:
    """Shared memory of a program: the stages of both operands, or what of the result lies there after them.

    That is the pointer kernels' transposed float32 accumulators, or two tiles of a map that descriptors read and store.
    """
    if "NUM_STAGES" not in config:
        return 0  # no product of matrices
    box = config.get("BLOCK_B", 1) * config.get("BLOCK_H", 1) * config.get("BLOCK_W", 1)
    columns = config.get("BLOCK_C") or config.get("BLOCK_M") or box
    depth = config.get("BLOCK_K") or config.get("BLOCK_P") or box
    rows = config["BLOCK_N"]
    return max(config["NUM_STAGES"] * (rows + columns) * depth * itemsize, 4 * rows * columns)
