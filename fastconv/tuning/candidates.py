"""Every way to run a call that its sizes, its arithmetic and the chip allow: backends, kernels and tiles."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import torch

from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import cpu, depthwise, first, grouped, pointer, tma
from fastconv.tuning.sides import shared_bytes, shared_memory


class Candidate(NamedTuple):
    """One way to run a call.

    Attributes:
        backend: 'triton', 'native' or 'aten' (cuDNN on a GPU, oneDNN on a CPU).
        kernel: the family of kernels within the backend; '' where it has only one way.
        config: the kernel's tile sides, stages and warps, by the names of its parameters.
    """

    backend: str
    kernel: str = ""
    config: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return " ".join([self.backend, *([self.kernel] if self.kernel else []), *(f"{k}={v}" for k, v in self.config)])


_CONVOLUTIONS = ("conv2d", "conv2d_relu", "conv2d_relu_max_pool2d")
ATEN, NATIVE, TRITON = Candidate("aten"), Candidate("native"), Candidate("triton")
LEAST_CAPABILITY = 80  # of the native backend's CUDA kernels


@cache
def capability(chip: str) -> int | None:
    """90 for a chip whose name ends in sm_90; None for a CPU and for 'interpreter'."""
    found = re.search(r"sm_(\d+)$", chip)
    return int(found[1]) if found else None


@cache
def is_cpu(chip: str) -> bool:
    """Whether `chip` is 'cpu', or a CPU's name and threads ('AMD EPYC 9B14 cpu-2')."""
    return re.search(r"(^cpu|cpu-\d+)$", chip) is not None


def candidates(
    op: str, direction: str, g: ConvGeometry | PoolGeometry, policy: Policy, chip: str, channels_last: bool
) -> tuple[Candidate, ...]:
    """Every candidate for a call, in the order of a plain rule; aten is always among them.

    Kernels of ours read and write NHWC, so that an NCHW call pays one more pass over its input and one over its output,
    as much as fusing bias, ReLU or pool saves: such calls stay with torch's own. But for max-pools on a CPU, where torch's
    codes, computed from its indices, cost more than those passes, and for forwards that Winograd makes faster still.
    Torch's own come first, too, where `tuning.cpu` knows them to be faster.
    """
    if is_cpu(chip):
        native: tuple[Candidate, ...] = (NATIVE,)
        is_first = (channels_last or "max_pool2d" in op) and not cpu.loses_in_float16(op, policy)
        if isinstance(g, ConvGeometry) and op in _CONVOLUTIONS and direction != "bias_grad":
            algorithms = cpu.algorithms(direction, g, policy)
            native = tuple(Candidate("native", algorithm) for algorithm in algorithms)
            is_first = is_first or cpu.gains_in_nchw(direction, g, policy, algorithms[0])
        return (*native, ATEN) if is_first else (ATEN, *native)
    ours: tuple[Candidate, ...] = (TRITON,)
    if isinstance(g, ConvGeometry):
        ours = () if policy.dtype == torch.float64 else triton_candidates(op, direction, g, policy, chip)
    if policy.dtype != torch.float64 and (capability(chip) or 0) >= LEAST_CAPABILITY:
        ours = (*ours, NATIVE)
    return (*ours, ATEN) if channels_last else (ATEN, *ours)


def triton_candidates(op: str, direction: str, g: ConvGeometry, policy: Policy, chip: str) -> tuple[Candidate, ...]:
    """The Triton kernels for a convolution in one direction that the chip has room for, each family's likely best first."""
    arch = capability(chip)
    special = ((f.FAMILY, c) for f in (first, depthwise, grouped) for c in f.candidates(direction, g, policy, arch))
    by_descriptors = ((tma.FAMILY, config) for config in tma.candidates(op, direction, g, policy, arch))
    by_pointers = ((pointer.FAMILY, config) for config in pointer.candidates(direction, g, policy, arch))
    room = None if arch is None else shared_memory(arch)
    return tuple(
        Candidate("triton", family, tuple(config.items()))
        for family, config in (*special, *by_descriptors, *by_pointers)
        if room is None or shared_bytes(config, policy.dtype.itemsize) <= room
    )
