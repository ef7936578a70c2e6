"""Sides of tiles, and how many programs there should be."""

from __future__ import annotations

# Programs that a split reduction makes for each processor: enough that one more or less evens out.
PROGRAMS_PER_PROCESSOR = 4


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
