"""Every way to run a convolution that its sizes, its arithmetic and the chip allow: kernels and tiles."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning import depthwise, first, grouped, tma
from fastconv.tuning.sides import cdiv, divisor_side, side

_INTERPRETED_PROGRAMS = 2
_MANY_PIXELS = 4096


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


def capability(chip: str) -> int | None:
    """90 for a chip whose name ends in sm_90; None for 'cpu' and 'interpreter'."""
    found = re.search(r"sm_(\d+)$", chip)
    return int(found[1]) if found else None


def triton_candidates(op: str, direction: str, g: ConvGeometry, policy: Policy, chip: str) -> tuple[Candidate, ...]:
    """The Triton kernels for a convolution in one direction, the likely best first."""
    arch = capability(chip)
    special = ((f.FAMILY, c) for f in (first, depthwise, grouped) for c in f.candidates(direction, g, policy, arch))
    by_descriptors = ((tma.FAMILY, config) for config in tma.candidates(op, direction, g, policy, arch))
    rest = _pointer(direction, g, policy, chip)
    return (*(_candidate(family, config) for family, config in (*special, *by_descriptors)), *rest)


def _pointer(direction: str, g: ConvGeometry, policy: Policy, chip: str) -> tuple[Candidate, ...]:
    if direction == "weight_grad":
        return (_candidate("pointer", _weight_grad(g, policy, chip == "interpreter")),)
    if direction == "input_grad":
        phase_pixels = g.batch * cdiv(g.height, g.stride_h) * cdiv(g.width, g.stride_w)
        sizes = (g.group_out_channels, g.group_in_channels, phase_pixels)
    else:
        sizes = (g.group_in_channels, g.group_out_channels, g.out_pixels)
    return (_candidate("pointer", _product(*sizes, policy, chip == "interpreter")),)


def _candidate(kernel: str, config: dict[str, int]) -> Candidate:
    return Candidate("triton", kernel, tuple(config.items()))


def _product(reduction: int, outputs: int, pixels: int, policy: Policy, interpreted: bool) -> dict[str, int]:
    """Forward and input gradient: `outputs` channels × `pixels`, summed over taps × `reduction` channels."""
    if interpreted:
        sides = {"BLOCK_N": side(outputs, 128), "BLOCK_M": side(pixels, 512), "BLOCK_K": side(reduction, 128)}
        return {**sides, "NUM_STAGES": 1}
    if policy.dtype == torch.float32 and not policy.tf32:
        return {"BLOCK_N": side(outputs, 64), "BLOCK_M": 64, "BLOCK_K": 16, "NUM_STAGES": 3, "num_warps": 4}
    block_n = side(outputs, 256 // policy.dtype.itemsize)
    block_m = 128 if pixels > _MANY_PIXELS else 64
    block_k = divisor_side(reduction, 128 // policy.dtype.itemsize) or side(reduction, 32)
    sides = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_K": block_k}
    return {**sides, "NUM_STAGES": 3, "num_warps": _warps(block_n * block_m)}


def _weight_grad(g: ConvGeometry, policy: Policy, interpreted: bool) -> dict[str, int]:
    """Weight gradient: output channels × columns (taps × channels), summed over pixels."""
    columns = g.taps * g.group_in_channels
    if interpreted:
        sides = {
            "BLOCK_N": side(g.group_out_channels, 128),
            "BLOCK_C": divisor_side(g.group_in_channels, 128) or side(columns, 128),
            "BLOCK_P": side(cdiv(g.out_pixels, _INTERPRETED_PROGRAMS), 512),
        }
        return {**sides, "NUM_STAGES": 1}
    largest = 64 if policy.dtype == torch.float32 else 128
    block_n = side(g.group_out_channels, largest)
    block_c = divisor_side(g.group_in_channels, largest)
    # A tile of several taps computes an address for each element, which takes registers.
    warps = 8 if block_c is None else _warps(block_n * block_c)
    block_c = block_c or side(columns, 64)
    sides = {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_P": 128 // policy.dtype.itemsize}
    return {**sides, "NUM_STAGES": 3, "num_warps": warps}


def _warps(elements: int) -> int:
    """At most 64 accumulators a thread, mostly 32: addresses take as many registers."""
    return 8 if elements >= 64 * 128 else 4
