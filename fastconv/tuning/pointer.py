"""Candidates of the kernels that gather by pointers: any stride, dilation, groups and channels."""

from __future__ import annotations

import torch

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning.sides import (
    INTERPRETED_PROGRAMS,
    VECTOR_BYTES,
    WGMMA_ROWS,
    cdiv,
    divisor_side,
    has_tensor_cores,
    side,
    swap,
)

FAMILY = "pointer"

_MANY_PIXELS = 4096


def candidates(direction: str, g: ConvGeometry, policy: Policy, capability: int | None) -> list[dict[str, int]]:
    """Configurations for a call, the likely best first.

    Args:
        capability: of the chip; None under the interpreter, for which tiles are as large as the call.
    """
    if direction == "weight_grad":
        return _weight_grad(g, policy, capability)
    return _product(direction, g, policy, capability)


def product_sizes(direction: str, g: ConvGeometry) -> tuple[int, int, int]:
    """(channels summed over for each tap, channels of the result, its pixels) of a group's product.

    Of an input gradient with a stride, the pixels of one phase: those with the same remainder by the stride.
    """
    if direction == "input_grad":
        phase_pixels = g.batch * cdiv(g.height, g.stride_h) * cdiv(g.width, g.stride_w)
        return g.group_out_channels, g.group_in_channels, phase_pixels
    return g.group_in_channels, g.group_out_channels, g.out_pixels


def _product(direction: str, g: ConvGeometry, policy: Policy, capability: int | None) -> list[dict[str, int]]:
    """Forward and input gradient: channels × pixels, summed over taps × channels."""
    reduction, outputs, pixels = product_sizes(direction, g)
    if capability is None:
        sides = {"BLOCK_N": side(outputs, 128), "BLOCK_M": side(pixels, 512), "BLOCK_K": side(reduction, 128)}
        return [{**sides, "SWAP": 1, "NUM_STAGES": 1}]
    if not has_tensor_cores(policy):
        # No tensor cores: operands travel through registers, which leaves room for 32 accumulators a thread.
        shapes = [(64, 64, 16, 3, 4), (32, 64, 16, 3, 4), (64, 128, 16, 3, 8)]
    else:
        likely_n = 256 // policy.dtype.itemsize
        likely_m = 128 if pixels > _MANY_PIXELS else 64
        block_k = divisor_side(reduction, 128 // policy.dtype.itemsize) or side(reduction, 32)
        sides_nm = [(likely_n, likely_m), (128, 128), (128, 64), (64, 128), (64, 64), (32, 128), (32, 64)]
        # Addresses of single elements take the registers of 64 accumulators a thread, TF32's operands those of 128.
        if is_wide(reduction, policy):
            sides_nm.append((64, 256))
            # 128 accumulators a thread, which spill where operands come through registers.
            if policy.dtype.itemsize == 2 and capability >= 90:
                sides_nm.append((128, 256))
        shapes = [(n, m, block_k, 3, 0) for n, m in sides_nm]
        shapes += [(likely_n, likely_m, block_k, 4, 0)]
    # To 8 warps that step over a 1 × 1 window ptxas gives 80 registers on sm_80, and spills.
    is_starved = capability < 90 and direction == "forward" and g.taps == 1 and g.stride != (1, 1)
    configs = []
    for block_n, block_m, block_k, stages, warps in shapes:
        block_n = side(outputs, block_n)
        sides = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_K": block_k}
        config = {**sides, "SWAP": swap(block_n, policy, capability), "NUM_STAGES": stages}
        accumulators = block_n * block_m * (1 if is_wide(reduction, policy) else 2)
        config["num_warps"] = warps or (4 if is_starved and accumulators == 64 * 128 else _warps(accumulators))
        configs.append(config)
    return _valid(configs, pixels)


def _weight_grad(g: ConvGeometry, policy: Policy, capability: int | None) -> list[dict[str, int]]:
    """Weight gradient: output channels × columns (taps × channels), summed over pixels."""
    columns = g.taps * g.group_in_channels
    if capability is None:
        sides = {
            "BLOCK_N": side(g.group_out_channels, 128),
            "BLOCK_C": divisor_side(g.group_in_channels, 128) or side(columns, 128),
            "BLOCK_P": side(cdiv(g.out_pixels, INTERPRETED_PROGRAMS), 512),
        }
        return [{**sides, "SWAP": 1, "NUM_STAGES": 1}]
    largest = 64 if policy.dtype == torch.float32 else 128
    block_p = 128 // policy.dtype.itemsize
    configs = []
    for most_n, most_c, stages in (
        (largest, largest, 3),
        (64, 64, 3),
        (64, largest, 3),
        (largest, 64, 3),
        (32, 64, 3),
        (largest, largest, 4),
    ):
        block_n = side(g.group_out_channels, most_n)
        swapped = swap(block_n, policy, capability)
        block_c = divisor_side(g.group_in_channels, most_c)
        # A tile of several taps computes an address for each element, which takes registers.
        warps = 8 if block_c is None else _warps(block_n * block_c)
        block_c = block_c or side(columns, 64)
        if not swapped:
            block_c = max(block_c, WGMMA_ROWS)
        sides = {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_P": block_p}
        configs.append({**sides, "SWAP": swapped, "NUM_STAGES": stages, "num_warps": warps})
    return _valid(configs, None)


def _valid(configs: list[dict[str, int]], pixels: int | None) -> list[dict[str, int]]:
    """Each config once, and but for the first only those that are not larger than the map."""
    found: list[dict[str, int]] = []
    for config in configs:
        if config in found or (found and pixels is not None and config["BLOCK_M"] > side(pixels, 256)):
            continue
        found.append(config)
    return found


def is_wide(channels: int, policy: Policy) -> bool:
    """Whether rows of channels are whole multiples of the 16 bytes that one load takes; else it takes single elements."""
    return channels * policy.dtype.itemsize % VECTOR_BYTES == 0


def _warps(elements: int) -> int:
    """At most 64 accumulators a thread, mostly 32: addresses take as many registers."""
    return 8 if elements >= 64 * 128 else 4
