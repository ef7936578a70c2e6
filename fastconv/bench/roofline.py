"""What this machine can do at most, measured: bytes a second of a copy, operations a second of a matrix product."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastconv.bench.timing import compare


class Rates(NamedTuple):
    """Bytes read and written a second, and floating-point operations a second."""

    copy: float
    matmul: float

    def seconds(self, flops: int | None, bytes: int | None) -> float:
        """The least time for so many operations and bytes, each at the full rate: whichever takes longer."""
        return max((flops or 0) / self.matmul, (bytes or 0) / self.copy)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy that no cache holds: 1 GiB on a GPU, 256 MiB on a CPU, each way."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.full((size // 4,), 1.5, device=device)
    target = torch.empty_like(source)
    taken = compare({"copy": lambda: target.copy_(source)}, device=device, rounds=10, most_seconds=2.0)["copy"]
    return 2 * size / taken.median


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a product of square matrices of random numbers, in the precision in force.

    8192 a side on a GPU, 2048 on a CPU; a quarter of that where one product would take more than a second.
    """
    side = 8192 if device.type == "cuda" else 2048
    small = _product(side // 4, dtype, device, rounds=3)
    if 2 * side**3 / small > 1.0:
        return small
    return _product(side, dtype, device, rounds=10)


def _product(side: int, dtype: torch.dtype, device: torch.device, rounds: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    taken = compare({"matmul": lambda: a @ b}, device=device, rounds=rounds, warmup=1, most_seconds=2.0)["matmul"]
    return 2 * side**3 / taken.median
