"""Candidates of the kernels that read by tensor descriptors: which convolutions they take, and maps cut into boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import torch

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning.sides import VECTOR_BYTES, power_of_two, round_up

FAMILY = "tma"
Box = tuple[int, int, int]

_ROW_BYTES = 128  # of a box's innermost side: what one line of shared memory swizzles
_SIDES = (1, 2, 4, 8, 16)
_LARGEST_SIDE = 256  # of a box
_BOX_PIXELS = 64  # of a weight gradient's step, in 16 bits
_INTERPRETED_PIXELS = 512
_SLACK = 1.05  # of what a box covers, against the least

# (output channels, pixels, warps, stages) of a forward or input gradient tile, the likely best first. Operands of 16 bits;
# three or four stages of them fit the shared memory of sm_90 beside the tile that is stored.
_HALF_TILES = ((128, 256, 8, 3), (128, 128, 4, 4), (64, 256, 8, 4), (64, 128, 4, 4), (64, 64, 4, 4), (128, 64, 4, 4))
# tf32: operands of 32 bits, 32 of them to a line.
_SINGLE_TILES = ((128, 128, 8, 3), (64, 128, 4, 4), (64, 64, 4, 4))
# (output channels, input channels) of a weight gradient's tile: the wider, the less is loaded for each product.
_WEIGHT_TILES = ((128, 256), (256, 128), (128, 128), (64, 128), (128, 64), (64, 64))


def candidates(op: str, direction: str, g: ConvGeometry, policy: Policy, capability: int | None) -> Iterator[dict[str, int]]:
    """Configurations for a call, the likely best first; none where descriptors cannot express it.

    Args:
        capability: of the chip; None under the interpreter, for which tiles are as large as the call.
    """
    itemsize = policy.dtype.itemsize
    if not _takes(op, direction, g, policy, capability):
        return
    line = _ROW_BYTES // itemsize
    if direction == "weight_grad":
        yield from _weight_grad(g, policy, capability)
        return
    is_input_grad = direction == "input_grad"
    reduction, outputs = (g.out_channels, g.in_channels) if is_input_grad else (g.in_channels, g.out_channels)
    is_pooled = op == "conv2d_relu_max_pool2d"
    if is_pooled:
        height, width = g.out_height // 2 * 2, g.out_width // 2 * 2
    elif is_input_grad:
        height, width = g.height // g.stride_h, g.width // g.stride_w
    else:
        height, width = g.out_height, g.out_width
    block_k = min(line, power_of_two(reduction))
    # With a stride over columns the channels of the next column follow: a block must not reach into them.
    if g.stride_w > 1 and not is_input_grad:
        block_k = min(block_k, reduction & -reduction)
    tiles: tuple[tuple[int, int, int, int], ...] = _HALF_TILES if itemsize == 2 else _SINGLE_TILES
    if capability is None:
        pixels = min(power_of_two(g.batch * height * width), _INTERPRETED_PIXELS)
        tiles = ((min(128, max(16, power_of_two(outputs))), max(16, pixels), 4, 1),)
    seen = set()
    for block_n, pixels, warps, stages in tiles:
        if capability is not None:
            block_n = min(block_n, max(64, power_of_two(outputs)))
        if g.stride_w > 1 and is_input_grad:
            block_n = min(block_n, outputs & -outputs)
        sides = box(pixels, g.batch, height, width, is_pooled)
        if sides is None or (block_n, sides) in seen:
            continue
        seen.add((block_n, sides))
        block_b, block_h, block_w = sides
        config = {"BLOCK_B": block_b, "BLOCK_H": block_h, "BLOCK_W": block_w, "BLOCK_N": block_n, "BLOCK_K": block_k}
        # A 2×2 window of a box that is two columns wide lies in one thread only if images come inside of rows.
        config["BATCH_INNER"] = int(is_pooled and block_w == 2 and g.stride == (1, 1))
        # sm_100 keeps sums in a memory of their own, out of which four warps read more of a mask's tile than registers hold.
        is_starved = capability is not None and capability >= 100 and is_input_grad and block_n * pixels == 128 * 128
        yield {**config, "NUM_STAGES": stages, "num_warps": 8 if is_starved else warps}


def _takes(op: str, direction: str, g: ConvGeometry, policy: Policy, capability: int | None) -> bool:
    if capability is not None and (capability < 90 or (policy.dtype == torch.float32 and not policy.tf32)):
        return False
    itemsize = policy.dtype.itemsize
    if (
        g.groups != 1
        or g.in_channels < 16
        or g.in_channels * itemsize % VECTOR_BYTES
        or g.out_channels * itemsize % VECTOR_BYTES
    ):
        return False
    if op == "conv2d_relu_max_pool2d" and g.out_channels % VECTOR_BYTES:  # its codes are bytes
        return False
    if g.stride == (1, 1):
        return True
    if g.height % g.stride_h or g.width % g.stride_w or (g.stride_w > 1 and g.in_channels % 16):
        return False
    return direction != "input_grad" or g.dilation == (1, 1)


def _weight_grad(g: ConvGeometry, policy: Policy, capability: int | None) -> Iterator[dict[str, int]]:
    pixels = _BOX_PIXELS * 2 // policy.dtype.itemsize
    tiles: tuple[tuple[int, int], ...] = _WEIGHT_TILES if policy.dtype.itemsize == 2 else ((64, 64),)
    if capability is None:
        pixels = min(max(16, power_of_two(g.out_pixels // 2)), _INTERPRETED_PIXELS)
        tiles = ((128, 128),)
    least = 16 if capability is None else 64
    seen = set()
    for largest_n, largest_c in tiles:
        block_n = min(largest_n, max(least, power_of_two(g.out_channels)))
        block_c = min(largest_c, max(16, power_of_two(g.in_channels)))
        # 128 × 256 loads as little as 256 × 128, and keeps the gradient out of registers.
        if max(block_n, block_c) > 128 and (min(block_n, block_c) < 128 or block_n > 128 < g.in_channels):
            continue
        for block_b, block_h, block_w in _weight_boxes(pixels, g):
            if (block_n, block_c, block_h, block_w) not in seen:
                seen.add((block_n, block_c, block_h, block_w))
                sides = {"BLOCK_B": block_b, "BLOCK_H": block_h, "BLOCK_W": block_w, "BLOCK_N": block_n, "BLOCK_C": block_c}
                stages = 1 if capability is None else 3 if block_n * block_c > 128 * 128 else 4
                # A tile that few channels have made smaller is too small for so many.
                is_large = capability is not None and block_n * block_c >= 128 * 128
                yield {**sides, "NUM_STAGES": stages, "num_warps": 8 if is_large else 4}


def _weight_boxes(pixels: int, g: ConvGeometry) -> Iterator[Box]:
    """Of the gradient's map: those that the tensor cores read without registers, whole rows or one, and the least waste."""
    width = g.out_width
    if width <= pixels and width & (width - 1) == 0:
        rows = pixels // width
        if g.out_height % rows == 0:
            yield 1, rows, width
        elif rows % g.out_height == 0 and rows // g.out_height <= _LARGEST_SIDE:
            yield rows // g.out_height, g.out_height, width
    best = box(pixels, g.batch, g.out_height, width, False)
    if best is not None:
        yield best
    if 2 * width > pixels:
        yield 1, 1, pixels


@lru_cache(4096)
def box(pixels: int, batch: int, height: int, width: int, is_pooled: bool) -> Box | None:
    """(images, rows, columns) of a box of `pixels` that covers a batch of maps with the least waste.

    Sides are powers of two, so that there are few of them whatever the batch and the map. Of boxes that cover about as
    little the squarest, then the one with the fewest images, is taken: a kernel is compiled for each box, and neighbours in
    a map share what they read. None where no box has room.
    """
    least = 2 if is_pooled else 1
    covered: dict[Box, int] = {}
    for rows, columns in product(_SIDES, _SIDES):
        images = pixels // (rows * columns)
        if min(rows, columns) >= least and 1 <= images <= _LARGEST_SIDE:
            covered[images, rows, columns] = round_up(batch, images) * round_up(height, rows) * round_up(width, columns)
    limit = _SLACK * min(covered.values(), default=0)
    near = (sides for sides, size in covered.items() if size <= limit)
    return min(near, key=lambda sides: (abs(math.log2(sides[1] / sides[2])), sides[0], -sides[2]), default=None)
