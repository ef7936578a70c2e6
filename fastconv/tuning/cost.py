"""Seconds that a convolution should take on a GPU: what orders candidates where nothing was measured.

A product takes as long as its busiest processor computes or the memory moves, whichever is longer; copies before it, passes
after it and sums of partial results come on top. Constants are specifications, published or own measurements, or, where it
says so, assumptions; none was fitted. `fastconv tune` measures instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning import depthwise, first, fused, pointer, tma
from fastconv.tuning.candidates import Candidate, capability
from fastconv.tuning.sides import PROGRAMS_PER_PROCESSOR, cdiv, product_splits, shared_memory

Config = dict[str, int]
T = TypeVar("T")


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
    86: Chip(84, 150e12 * _PRODUCT, 75e12 * _PRODUCT, 37e12, 0.70e12 * _COPY, 1.74e9),  # A40
    89: Chip(142, 181e12 * _PRODUCT, 90e12 * _PRODUCT, 90e12, 0.86e12 * _COPY, 2.5e9),  # L40
    90: Chip(132, 989e12 * _PRODUCT, 495e12 * _PRODUCT, 67e12, 3.35e12 * _COPY, 1.75e9),  # H100 SXM
    100: Chip(148, 2250e12 * _PRODUCT, 1125e12 * _PRODUCT, 75e12, 8.0e12 * _COPY, 1.85e9),  # B200
    # RTX 5090 (white paper of RTX Blackwell): dense, accumulated in float32
    120: Chip(170, 210e12 * _PRODUCT, 105e12 * _PRODUCT, 105e12, 1.79e12 * _COPY, 2.41e9),
}
# What chips of a generation have otherwise than the one above, by a pattern of their names; data sheets' figures.
_NAMED: dict[str, dict[str, Any]] = {
    r"H200": {"memory": 4.3e12},  # measured
    r"\bH20\b": {
        "processors": 78,
        "half": 148e12 * _PRODUCT,
        "tf32": 74e12 * _PRODUCT,
        "single": 44e12,
        "memory": 4.0e12 * _COPY,
    },
    r"H100 PCIe": {
        "processors": 114,
        "half": 756e12 * _PRODUCT,
        "tf32": 378e12 * _PRODUCT,
        "single": 51e12,
        "memory": 2.0e12 * _COPY,
    },
    r"A100.*40GB": {"memory": 1.555e12 * _COPY},
}

# Assumptions: the share of a large product's speed that a main loop reaches. cp.async keeps sm_80's tensor cores busy,
# and sm_120's, which are of that kind; sm_90's want bulk copies, and kernels of the older kind reach little more than half.
# Descriptors: the share of cuDNN's main loop below which fusing does not pay. cuDNN's own is hand-written; its weight
# gradient has both operands transposed.
_SHARE_CP_ASYNC = {80: 0.8, 90: 0.55, 120: 0.8}
_SHARE_DESCRIPTORS = 0.8
_SHARE_ATEN, _SHARE_ATEN_WEIGHT_GRAD = 0.85, 0.7
# Of a group, and of its taps and channels: up to which the native backend's direct kernels serve (csrc/cuda/conv_direct.h).
_DIRECT_CHANNELS, _DIRECT_DEPTH = 8, 2000
_LARGEST_TILE = (128, 256)  # whose accumulators fill a processor's registers by half
# Without tensor cores every product needs its operands in registers: half of the instructions are no products.
_SHARE_SINGLE = 0.5
# Assumptions: of the CUDA cores and of the memory that cuDNN's direct kernels for few channels a group keep busy.
_SHARE_DIRECT, _SHARE_DIRECT_MEMORY = 0.25, 0.5

# From the end of a kernel to the start of the next on the same stream, with its first and last trip to memory: about what
# an empty kernel takes.
_LAUNCH = 4e-6
_FILL = 1.2e-6  # of a program: two trips to memory of 600 ns, before the first product and behind the last
# From the L2 cache to one processor in a clock: 5120 bytes for a full A100's 128 (white paper).
_CACHE_BYTES = 40
# From the L1 cache: 32 load units of 4 bytes (white papers of sm_80 and sm_90).
_L1_BYTES = 128
# Where a row of channels is not a multiple of 16 bytes, loads are of single elements: 32 lanes a clock, of whose
# instructions a third are loads and the rest addresses and masks.
_SINGLE_ELEMENTS = 32 / 3
# Accumulators, operands and addresses take about 128 registers a thread, of which a processor has 65,536.
_RESIDENT_THREADS = 512


class _Call(NamedTuple):
    """What is to be computed, and how fast the chip is; the FLOP/s are those of the call's operands."""

    op: str
    direction: str
    g: ConvGeometry
    policy: Policy
    chip: Chip
    capability: int
    flops: float

    @property
    def itemsize(self) -> int:
        return self.policy.dtype.itemsize

    def sweep(self, moved: float) -> float:
        """A pass over `moved` bytes, in a kernel of its own."""
        return _LAUNCH + moved / self.chip.memory


class _Program(NamedTuple):
    """A program's tile: rows × columns of a product that is summed in steps.

    Attributes:
        gathered: the rows and columns whose operands are read element by element.
    """

    rows: int
    columns: int
    step: int
    gathered: int
    stages: int
    warps: int


def seconds(op: str, direction: str, g: ConvGeometry, policy: Policy, chip: str, candidate: Candidate) -> float:
    """What a candidate for a channels_last call should take on `chip`; for CUDA chips only."""
    speeds = _speeds(chip)
    call = _Call(op, direction, g, policy, speeds, capability(chip) or 0, _flops(policy, speeds))
    if candidate.backend == "aten":
        return _aten(call, fused.is_fused(chip, g, policy))
    if candidate.backend == "native":
        return _native(call)
    return _FAMILIES[candidate.kernel](call, dict(candidate.config))


@cache
def _speeds(chip: str) -> Chip:
    speeds = _of_generation(_CHIPS, capability(chip) or 0)
    return next((speeds._replace(**own) for name, own in _NAMED.items() if re.search(name, chip)), speeds)


def _of_generation(known: dict[int, T], capability: int) -> T:
    """Of an unknown generation, what is known of the one before it."""
    return known[max((c for c in known if c <= capability), default=80)]


def _flops(policy: Policy, speeds: Chip) -> float:
    if policy.dtype == torch.float32:
        return speeds.tf32 if policy.tf32 else speeds.single
    return speeds.half


def _share(call: _Call, of_tensor_cores: float) -> float:
    return _SHARE_SINGLE if call.policy.dtype == torch.float32 and not call.policy.tf32 else of_tensor_cores


def _pointer(call: _Call, config: Config) -> float:
    """Groups by PACK, the zeros between them multiplied too."""
    g, pack = call.g, config.get("PACK", 1)
    packs = cdiv(g.groups, pack)
    share = _share(call, _of_generation(_SHARE_CP_ASYNC, call.capability))
    reduction, outputs, pixels = pointer.product_sizes(call.direction, g)

    def gathered(side: int, channels: int) -> int:
        return 0 if pointer.is_wide(channels, call.policy) else side

    rows = config["BLOCK_N"]
    if call.direction == "weight_grad":
        columns = config["BLOCK_C"]
        narrow = gathered(rows, pack * g.group_out_channels) + gathered(columns, pack * g.group_in_channels)
        program = _program(rows, columns, config["BLOCK_P"], config, narrow)
        tiles = packs * cdiv(pack * g.group_out_channels, rows) * cdiv(pack * g.taps * g.group_in_channels, columns)
        return _split_sum(call, tiles, program, cdiv(g.out_pixels, program.step), share)
    columns = config["BLOCK_M"]
    is_input_grad = call.direction == "input_grad"
    weight_run = outputs if is_input_grad else reduction
    program = _program(
        rows, columns, config["BLOCK_K"], config, gathered(rows, weight_run) + gathered(columns, pack * reduction)
    )
    phases = g.stride_h * g.stride_w if is_input_grad else 1
    if call.op == "conv2d_relu_max_pool2d":
        pixels = g.batch * (g.out_height // 2 * 2) * (g.out_width // 2 * 2)
    programs = phases * packs * cdiv(pixels, columns) * cdiv(pack * outputs, rows)
    depth = max(g.taps / phases, 1.0) * _up(pack * reduction, program.step)
    total = _LAUNCH + max(_busiest(call, programs, program, depth, share), _moved(call) / call.chip.memory)
    return total + (_mask(call) if _is_masked(call) else 0.0)


def _tma(call: _Call, config: Config) -> float:
    """Boxes of images × rows × columns, what overhangs a map computed too; the epilogue masks an input gradient."""
    g, direction = call.g, call.direction
    height, width = g.out_height, g.out_width
    if call.op == "conv2d_relu_max_pool2d":
        height, width = height // 2 * 2, width // 2 * 2
    phases = 1
    if direction == "input_grad":
        phases = g.stride_h * g.stride_w
        height, width = g.height // g.stride_h, g.width // g.stride_w
    box = [config[name] for name in ("BLOCK_B", "BLOCK_H", "BLOCK_W")]
    boxes = math.prod(cdiv(size, side) for size, side in zip((g.batch, height, width), box, strict=True))
    rows, pixels = config["BLOCK_N"], math.prod(box)
    share = _share(call, _SHARE_DESCRIPTORS)
    if direction == "weight_grad":
        columns = config["BLOCK_C"]
        tiles = g.taps * cdiv(g.out_channels, rows) * cdiv(g.in_channels, columns)
        return _split_sum(call, tiles, _program(rows, columns, pixels, config), boxes, share)
    reduction, outputs, _ = pointer.product_sizes(direction, g)
    program = _program(rows, pixels, config["BLOCK_K"], config)
    depth = max(g.taps / phases, 1.0) * _up(reduction, program.step)
    programs = phases * boxes * cdiv(outputs, rows)
    moved = _moved(call)
    total = _LAUNCH
    if _is_masked(call):
        sums = 4 * phases * boxes * g.in_channels
        moved += math.prod(g.input_shape) * call.itemsize + sums
        total += call.sweep(sums)
    return total + max(_busiest(call, programs, program, depth, share), moved / call.chip.memory)


def _first(call: _Call, config: Config) -> float:
    """A copy with padding and filled up channels, then a product over rows of taps, which are filled up to whole blocks."""
    g = call.g
    shape = first.padded_shape(g, call.itemsize)
    copied = math.prod(shape) * call.itemsize
    total = call.sweep(math.prod(g.input_shape) * call.itemsize + copied)
    moved = _moved(call) - math.prod(g.input_shape) * call.itemsize + copied
    share = _share(call, _of_generation(_SHARE_CP_ASYNC, call.capability))
    rows = config["BLOCK_N"]
    if call.direction == "weight_grad":
        columns = config["BLOCK_C"]
        tiles = cdiv(g.out_channels, rows) * cdiv(g.taps * shape[-1], columns)
        boxes = g.batch * cdiv(g.out_height, config["BLOCK_H"]) * cdiv(g.out_width, config["BLOCK_W"])
        program = _program(rows, columns, config["BLOCK_H"] * config["BLOCK_W"], config)
        return total + _split_sum(call, tiles, program, boxes, share, moved)
    program = _program(rows, config["BLOCK_M"], config["BLOCK_K"], config)
    pixels = g.out_pixels
    if call.op == "conv2d_relu_max_pool2d":
        pixels = 4 * g.batch * (g.out_height // 2) * (g.out_width // 2)
    programs = cdiv(pixels, program.columns) * cdiv(g.out_channels, rows)
    depth = g.kernel_height * _up(g.kernel_width * shape[-1], program.step)
    return total + _LAUNCH + max(_busiest(call, programs, program, depth, share), moved / call.chip.memory)


def _depthwise(call: _Call, config: Config) -> float:
    """No product of matrices: loads from the L1 cache and multiply-adds of CUDA cores, if memory is not slower."""
    g = call.g
    processors = call.chip.processors
    shape = g.input_shape if call.direction == "input_grad" else g.output_shape
    height, width = shape[2:]
    if config["ROWS"] > 1:  # a row is read once for all rows of outputs that it touches
        elements = g.batch * _up(height, config["ROWS"]) * _up(width, config["BLOCK_M"])
        loads = g.kernel_width * (config["ROWS"] + g.kernel_height - 1) / config["ROWS"]
    else:
        elements = _up(g.batch * height * width, config["BLOCK_M"])
        loads = float(g.taps)
    if call.direction == "weight_grad":
        loads += 1
    elements *= _up(g.in_channels, config["BLOCK_C"])
    loading = elements * loads * call.itemsize / (_L1_BYTES * call.chip.clock * processors)
    computing = g.flops() / (call.chip.single * _SHARE_SINGLE)
    unfused = _moved(call._replace(op="conv2d"))
    total = 2 * _LAUNCH + max(
        loading, computing, unfused / call.chip.memory
    )  # the weight is transposed, or slabs are summed
    if call.direction == "weight_grad":
        return total + 2 * 4 * PROGRAMS_PER_PROCESSOR * processors * config["BLOCK_C"] * g.taps / call.chip.memory
    if call.op == "conv2d_relu_max_pool2d":
        return total + _relu_pool(call)
    return total + (_mask(call) if _is_masked(call) else 0.0)


def _native(call: _Call) -> float:
    """The CUDA kernels' tiles, 128 × 128 or with 64 output channels, by groups: as Triton's pointer kernels of those sides.

    Groups of few channels go through direct kernels, which CUDA cores and the memory bound.
    """
    g = call.g
    most = max(g.group_in_channels, g.group_out_channels)
    if g.groups > 1 and most <= _DIRECT_CHANNELS and g.taps * most <= _DIRECT_DEPTH:
        computing = g.flops() / (call.chip.single * _SHARE_DIRECT)
        return 2 * _LAUNCH + max(computing, _moved(call) / (call.chip.memory * _SHARE_DIRECT_MEMORY))
    step = 64 // call.itemsize
    wide = g.group_in_channels if call.direction == "input_grad" else g.group_out_channels
    rows, warps = (128, 8) if wide > 64 else (64, 4)
    sides = {"BLOCK_N": rows, "BLOCK_M": 128, "BLOCK_C": 128, "BLOCK_K": step, "BLOCK_P": step}
    return _pointer(call, {**sides, "NUM_STAGES": 3, "num_warps": warps})


_FAMILIES: dict[str, Callable[[_Call, Config], float]] = {
    pointer.FAMILY: _pointer,
    tma.FAMILY: _tma,
    first.FAMILY: _first,
    depthwise.FAMILY: _depthwise,
}


def _aten(call: _Call, fuses: bool) -> float:
    """cuDNN's convolution, then torch's passes over its output, and kernels of ours for ReLU's backward and pools.

    cuDNN picks among many tiles and splits long sums, so that neither waves nor a map's borders are rounded up; channels
    are, to the 16 and 32 of its tensor-core kernels, or few of a group go through a direct kernel. Its tiles too are as
    narrow as the channels, and load as much for each product as ours of that size. Where it `fuses`, bias
    and ReLU are part of its kernel.
    """
    g = call.g
    traffic = g.bytes_moved(call.itemsize) / call.chip.memory
    reduction, outputs, _ = pointer.product_sizes(call.direction, g)
    if g.groups > 1 and min(reduction, outputs) < 16:
        computing = g.flops() / (call.chip.single * _SHARE_DIRECT)
        traffic /= _SHARE_DIRECT_MEMORY
    else:
        share = _SHARE_ATEN_WEIGHT_GRAD if call.direction == "weight_grad" else _SHARE_ATEN
        on_tensor_cores = call.policy.dtype != torch.float32 or call.policy.tf32
        waste = _up(reduction, 16) / reduction * _up(outputs, 32) / outputs if on_tensor_cores else 1.0
        products = g.flops() * waste
        rows, columns = min(_up(outputs, 32), _LARGEST_TILE[0]), _LARGEST_TILE[1]
        loads = products / (2 * rows * columns) * (rows + columns) * call.itemsize
        loading = loads / (_CACHE_BYTES * call.chip.clock * call.chip.processors)
        computing = max(products / (call.flops * share), loading)
    total = _LAUNCH + _FILL + max(computing, traffic)
    output = math.prod(g.output_shape) * call.itemsize
    if _is_masked(call):
        total += _mask(call)
    elif call.direction == "forward" and call.op == "conv2d":
        total += call.sweep(2 * output)  # a bias, which is usual, reads and writes it
    elif call.op == "conv2d_relu" and not fuses:
        total += 2 * call.sweep(2 * output)  # bias and ReLU each do
    elif call.op == "conv2d_relu_max_pool2d":
        total += call.sweep(2 * output) + _relu_pool(call)
    return total


def _is_masked(call: _Call) -> bool:
    """Whether the ReLU of the layer below closes an input gradient, whose sum is that layer's bias gradient."""
    return call.op == "conv2d_relu" and call.direction == "input_grad"


def _mask(call: _Call) -> float:
    """A pass that reads gradient and gate and writes one of them, and the sum of its partial sums."""
    return call.sweep(3 * math.prod(call.g.input_shape) * call.itemsize) + _LAUNCH


def _relu_pool(call: _Call) -> float:
    """A pass that reads a map and writes a quarter of it, with a byte for each winner."""
    output = math.prod(call.g.output_shape)
    return call.sweep(output * (1.25 * call.itemsize + 0.25))


def _moved(call: _Call) -> float:
    """Bytes that a kernel of ours moves: each operand once. A fused pool writes a quarter, and one byte for each of it."""
    total = float(call.g.bytes_moved(call.itemsize))
    if call.op == "conv2d_relu_max_pool2d":
        outputs = math.prod(call.g.output_shape)
        total -= outputs * call.itemsize * 3 / 4 - outputs / 4
    return total


def _program(rows: int, columns: int, step: int, config: Config, gathered: int = 0) -> _Program:
    return _Program(rows, columns, step, gathered, config["NUM_STAGES"], config.get("num_warps", 4))


def _split_sum(call: _Call, tiles: int, program: _Program, steps: int, share: float, moved: float | None = None) -> float:
    """A weight gradient, its pixels split as its launcher splits them; slabs of several splits take a kernel more."""
    chip = call.chip
    each = cdiv(steps, product_splits(steps, program.step, tiles, chip.processors))
    splits = cdiv(steps, each)
    computing = _busiest(call, tiles * splits, program, each * program.step, share)
    total = _LAUNCH + max(computing, (_moved(call) if moved is None else moved) / chip.memory)
    if splits > 1:
        total += call.sweep(2 * 4 * splits * math.prod(call.g.weight_shape))  # written and read, in float32
    return total


def _busiest(call: _Call, programs: int, program: _Program, depth: float, share: float) -> float:
    """The busiest processor's time: its share of the programs, each bound by products or by loads."""
    chip = call.chip
    sides = program.rows + program.columns
    products = 2 * program.rows * program.columns * depth / (call.flops * share / chip.processors)
    loads = sides * depth * call.itemsize / (_CACHE_BYTES * chip.clock)
    loads += program.gathered * depth / (_SINGLE_ELEMENTS * chip.clock)
    shared = program.stages * sides * program.step * call.itemsize
    resident = max(1, min(shared_memory(call.capability) // shared, _RESIDENT_THREADS // (32 * program.warps)))
    waves = cdiv(programs, chip.processors)
    return waves * max(products, loads) + cdiv(waves, resident) * _FILL


def _up(size: int, side: int) -> int:
    return cdiv(size, side) * side
