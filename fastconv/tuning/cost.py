"""Seconds that a convolution should take on a GPU: what orders candidates where nothing was measured.

A product takes as long as its busiest processor computes or its memory moves, whichever is longer; what torch does around
cuDNN's convolution, and kernels of ours fuse, comes on top. No constant was fitted: each is a specification or a published
measurement, with its source beside it. `fastconv tune` measures instead.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning.candidates import Candidate, capability
from fastconv.tuning.pointer import is_wide, product_sizes
from fastconv.tuning.sides import PROGRAMS_PER_PROCESSOR, cdiv


class Chip(NamedTuple):
    """A GPU's speed: FLOP/s of large products by kind of operand, bytes/s of its memory, and boost clock in Hz."""

    processors: int
    half: float
    tf32: float
    single: float
    memory: float
    clock: float


# Large products reach 0.79 of an H100's specified 989 TFLOP/s in bfloat16 (769–798 measured), a device copy 0.9 of its
# specified 3.35 TB/s (3.0 measured); other chips are taken to reach the same shares of their data sheets' figures.
_PRODUCT, _COPY = 0.79, 0.9
_CHIPS = {
    80: Chip(108, 312e12 * _PRODUCT, 156e12 * _PRODUCT, 19.5e12, 2.04e12 * _COPY, 1.41e9),  # A100 80 GB
    86: Chip(84, 75e12 * _PRODUCT, 37e12 * _PRODUCT, 37e12, 0.70e12 * _COPY, 1.74e9),  # A40
    89: Chip(142, 181e12 * _PRODUCT, 90e12 * _PRODUCT, 90e12, 0.86e12 * _COPY, 2.5e9),  # L40
    90: Chip(132, 989e12 * _PRODUCT, 495e12 * _PRODUCT, 67e12, 3.35e12 * _COPY, 1.75e9),  # H100 SXM
    100: Chip(148, 2250e12 * _PRODUCT, 1125e12 * _PRODUCT, 75e12, 8.0e12 * _COPY, 1.85e9),  # B200
}
_H200_MEMORY = 4.3e12  # measured

# Share of a large product's speed that a family's main loop reaches with the tiles that it has. Loads by pointers keep up
# with sm_80's tensor cores; sm_90's want bulk copies, which descriptors give. Nobody has published 0.9 of cuDNN's main loop
# in Triton on an H100. Plain products on the CUDA cores reach half, as their operands pass through registers twice.
_SHARE = {"pointer": {80: 0.8, 90: 0.55}, "tma": {90: 0.8}}
_SHARE_OTHERS = 0.55
_SHARE_ATEN = 0.85  # cuDNN's main loop is hand-written; a convolution's addresses cost it something against a product
_SHARE_ATEN_WEIGHT_GRAD = 0.7  # both of its operands come transposed
_SHARE_SINGLE = 0.5
# Of a family that reads a group at a time with tiles for many channels; a rule until it is measured. cuDNN has kernels for groups.
_GROUPED = 8.0
# CUDA cores that cuDNN's direct kernels for few channels a group keep busy, and their share of memory's speed.
_DIRECT, _DIRECT_MEMORY = 0.25, 0.5

_LAUNCH = 4e-6  # from the end of a kernel to the start of the next on the same stream, and its first and last trip to memory
_FILL = 1.2e-6  # of a program: two trips to memory, before the first product and behind the last, 600 ns each
# From the L2 cache to one processor in a clock: 5120 bytes for a full A100's 128 (white paper).
_CACHE_BYTES = 40
# Where a row of channels is not a multiple of 16 bytes, loads are of single elements: 32 lanes a clock, of whose
# instructions a third are loads and the rest addresses and masks.
_SINGLE_ELEMENTS = 32 / 3
_RESIDENT_SHARED = 167_936  # bytes of a processor's shared memory, of which programs beside each other take their part
_RESIDENT_THREADS = 512  # at about 128 registers a thread


def seconds(op: str, direction: str, g: ConvGeometry, policy: Policy, chip: str, candidate: Candidate) -> float:
    """What a candidate for a channels_last call should take on `chip`; for CUDA chips only."""
    speeds = _speeds(chip)
    if candidate.backend == "aten":
        return _aten(op, direction, g, policy, speeds)
    config = dict(candidate.config)
    rate = _rate(policy, speeds) * _share(candidate.kernel, policy, chip)
    if "BLOCK_N" not in config:
        computing = g.flops() / rate
        return _LAUNCH + max(computing, _traffic(op, direction, g, policy) / speeds.memory)
    product = _weight_grad if direction == "weight_grad" else _product
    result = product(op, direction, g, policy, speeds, rate, config)
    return result * _GROUPED if g.groups > 1 and candidate.kernel == "pointer" else result


@cache
def _speeds(chip: str) -> Chip:
    known = capability(chip) or 0
    speeds = _CHIPS[max((c for c in _CHIPS if c <= known), default=80)]
    return speeds._replace(memory=_H200_MEMORY) if "H200" in chip else speeds


def _rate(policy: Policy, speeds: Chip) -> float:
    if policy.dtype == torch.float32:
        return speeds.tf32 if policy.tf32 else speeds.single
    return speeds.half


def _share(kernel: str, policy: Policy, chip: str) -> float:
    if policy.dtype == torch.float32 and not policy.tf32:
        return _SHARE_SINGLE
    by_generation = _SHARE.get(kernel, {})
    known = capability(chip) or 0
    return by_generation.get(max((c for c in by_generation if c <= known), default=0), _SHARE_OTHERS)


def _traffic(op: str, direction: str, g: ConvGeometry, policy: Policy) -> float:
    """Bytes that a kernel of ours moves: each operand once. A fused pool writes a quarter, and one byte for each of it."""
    total = float(g.bytes_moved(policy.dtype.itemsize))
    if op == "conv2d_relu_max_pool2d":
        outputs = math.prod(g.output_shape)
        total -= outputs * policy.dtype.itemsize * 3 / 4 - outputs / 4
    return total


def _tiles(config: dict[str, int], g: ConvGeometry, direction: str) -> tuple[int, int]:
    """(tiles over a result's pixels, pixels of each): runs of BLOCK_M pixels, or patches of images × rows × columns."""
    if "BLOCK_M" in config:
        pixels = product_sizes(direction, g)[2]
        return cdiv(pixels, config["BLOCK_M"]), config["BLOCK_M"]
    height, width = (g.height, g.width) if direction == "input_grad" else (g.out_height, g.out_width)
    sides = [config.get(name, 1) for name in ("BLOCK_B", "BLOCK_H", "BLOCK_W")]
    counts = [cdiv(size, side) for size, side in zip((g.batch, height, width), sides, strict=True)]
    return math.prod(counts), math.prod(sides)


def _product(
    op: str, direction: str, g: ConvGeometry, policy: Policy, speeds: Chip, rate: float, config: dict[str, int]
) -> float:
    """Forward and input gradient: one program for each tile of channels × pixels; an input gradient's phases share the taps."""
    reduction, outputs, _ = product_sizes(direction, g)
    phases = g.stride_h * g.stride_w if direction == "input_grad" else 1
    tiles, block_m = _tiles(config, g, direction)
    programs = phases * g.groups * tiles * cdiv(outputs, config["BLOCK_N"])
    block_k = config.get("BLOCK_K", 64)
    depth = max(g.taps / phases, 1.0) * cdiv(reduction, block_k) * block_k
    sides = (config["BLOCK_N"], block_m)
    computing = _programs(programs, sides, depth, block_m, is_wide(reduction, policy), policy, speeds, rate, config, block_k)
    return _LAUNCH + max(computing, _traffic(op, direction, g, policy) / speeds.memory)


def _weight_grad(
    op: str, direction: str, g: ConvGeometry, policy: Policy, speeds: Chip, rate: float, config: dict[str, int]
) -> float:
    """Programs for tiles of channels × columns and splits of the pixels; more than one split writes slabs, which a second kernel adds up."""
    columns = g.taps * g.group_in_channels
    block_c = config.get("BLOCK_C", 64)
    tiles = g.groups * cdiv(g.group_out_channels, config["BLOCK_N"]) * cdiv(columns, block_c)
    block_p = config.get("BLOCK_P", 64)
    most_splits = cdiv(g.out_pixels, block_p)
    splits = min(cdiv(PROGRAMS_PER_PROCESSOR * speeds.processors, tiles), most_splits)
    depth = cdiv(most_splits, splits) * block_p
    sides = (config["BLOCK_N"], block_c)
    computing = _programs(
        tiles * splits, sides, depth, block_c, is_wide(g.group_in_channels, policy), policy, speeds, rate, config, block_p
    )
    total = _LAUNCH + max(computing, _traffic(op, direction, g, policy) / speeds.memory)
    if splits > 1:
        total += _LAUNCH + 2 * 4 * splits * g.out_channels * columns / speeds.memory  # written and read, in float32
    return total


def _programs(
    programs: int,
    sides: tuple[int, int],
    depth: float,
    narrow_side: int,
    wide: bool,
    policy: Policy,
    speeds: Chip,
    rate: float,
    config: dict[str, int],
    step: int,
) -> float:
    """The busiest processor's time: its share of the programs, each bound by products or by loads from the cache.

    Args:
        sides, depth: of a program's product.
        narrow_side: the side whose operand is read element by element where not `wide`.
        step: of the depth, in one stage.
    """
    rows, columns = sides
    itemsize = policy.dtype.itemsize
    products = 2 * rows * columns * depth / (rate / speeds.processors)
    loads = (rows + columns) * depth * itemsize / (_CACHE_BYTES * speeds.clock)
    if not wide:
        loads += narrow_side * depth / (_SINGLE_ELEMENTS * speeds.clock)
    shared = max(config.get("NUM_STAGES", 3) * (rows + columns) * step * itemsize, 1)
    resident = max(1, min(_RESIDENT_SHARED // shared, _RESIDENT_THREADS // (32 * config.get("num_warps", 4))))
    waves = cdiv(programs, speeds.processors)
    return waves * max(products, loads) + cdiv(waves, resident) * _FILL


def _aten(op: str, direction: str, g: ConvGeometry, policy: Policy, speeds: Chip) -> float:
    """cuDNN's convolution, then torch's passes over its output.

    cuDNN picks among many tiles and splits long sums, so that neither waves nor a map's borders are rounded up; channels
    are, to the 16 and 32 of its tensor-core kernels, or few of a group go through a direct kernel.
    """
    itemsize = policy.dtype.itemsize
    traffic = g.bytes_moved(itemsize) / speeds.memory
    reduction, outputs, _ = product_sizes(direction, g)
    if g.groups > 1 and min(reduction, outputs) < 16:
        computing = g.flops() / (speeds.single * _DIRECT)
        traffic /= _DIRECT_MEMORY
    else:
        share = _SHARE_ATEN_WEIGHT_GRAD if direction == "weight_grad" else _SHARE_ATEN
        waste = cdiv(reduction, 16) * 16 / reduction * cdiv(outputs, 32) * 32 / outputs
        computing = g.flops() * waste / (_rate(policy, speeds) * share)
    total = _LAUNCH + _FILL + max(computing, traffic)
    output = math.prod(g.output_shape)
    if op == "conv2d_relu":  # bias and ReLU each read and write the output
        total += 2 * _LAUNCH + 4 * output * itemsize / speeds.memory
    elif (
        op == "conv2d_relu_max_pool2d"
    ):  # the bias so too; ReLU and pool are one kernel, which also writes a byte for each winner
        total += 2 * _LAUNCH + (3.25 * itemsize + 0.25) * output / speeds.memory
    return total
