"""Sides of tiles, and how many programs there should be."""

from __future__ import annotations

import torch

from fastconv.precision import Policy

# Programs that a split reduction makes for each processor: enough that one more or less evens out.
PROGRAMS_PER_PROCESSOR = 4
INTERPRETED_PROGRAMS = 2

# What one load of a thread takes.
VECTOR_BYTES = 16

# That sm_90's tensor cores multiply at a time; tiles of fewer run on those of sm_80, at half the rate.
WGMMA_ROWS = 64


def cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


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
