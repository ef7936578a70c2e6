"""Launchers of the kernels that read by tensor descriptors (sm_90 and later)."""

from __future__ import annotations

import dataclasses
import logging
import math
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fastconv.backends import triton_tiles as tiles
from fastconv.backends.triton_launch import (
    dilation,
    empty,
    float32,
    is_recording,
    kernels,
    launch,
    nhwc,
    processors,
    sum_rows,
    window,
)
from fastconv.backends.triton_tiles import cdiv
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import Candidate
from fastconv.tuning.sides import VECTOR_BYTES

FAMILY = "tma"
Box = tuple[int, int, int]

_CACHE_SIZE = 4096

_log = logging.getLogger("fastconv")


def reads(plan: Candidate, *operands: Tensor | None) -> bool:
    """Whether descriptors can express the operands, wherever they lie in memory."""
    if any(operand is not None and operand.data_ptr() % VECTOR_BYTES for operand in operands):
        return False
    return not dict(plan.config).get("BATCH_INNER") or _reads_batch_inner(operands[0].device)  # type: ignore[union-attr]


def _reads_batch_inner(device: torch.device) -> bool:
    """Whether descriptors whose strides do not grow work on a device: CUDA documents those that do."""
    if is_recording() or kernels().interpreted:
        return True
    if device.index in _batch_inner_works:
        return _batch_inner_works[device.index]
    if torch.cuda.is_current_stream_capturing():
        _log.info("descriptors of (H, N, W, C) were not tried on %s before a capture: pointer kernels serve in it", device)
        return False  # a comparison would wait for the device
    g = ConvGeometry.of("conv2d", (32, 64, 4, 4), (64, 64, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
    pool = PoolGeometry.of("max_pool2d", g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), False)
    policy = Policy(torch.bfloat16)
    config = {"BLOCK_B": 32, "BLOCK_H": 2, "BLOCK_W": 2, "BLOCK_N": 64, "BLOCK_K": 64, "BATCH_INNER": 1, "NUM_STAGES": 3}
    # Sums of small integers are exact, in whatever order.
    numbers = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randint(-2, 3, shape, device=device, generator=numbers).to(torch.bfloat16)
        for shape in (g.input_shape, g.weight_shape)
    )
    results = []
    try:
        for inner in (1, 0):
            plan = Candidate("triton", FAMILY, tuple({**config, "BATCH_INNER": inner, "num_warps": 4}.items()))
            results.append(conv2d_relu_max_pool2d(nhwc(x), nhwc(weight), None, g, pool, policy, plan))
        works = all(torch.equal(actual, expected) for actual, expected in zip(*results, strict=True))
    except RuntimeError as error:  # the driver encodes descriptors, and may refuse to
        _log.info("descriptors of (H, N, W, C) on %s: %s", device, error)
        works = False
    if not works:
        _log.warning("descriptors of (H, N, W, C) do not work on %s: pointer kernels serve instead", device)
    _batch_inner_works[device.index] = works
    return works


_batch_inner_works: dict[int | None, bool] = {}


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    g: ConvGeometry,
    policy: Policy,
    relu: bool,
    plan: Candidate,
) -> Tensor:
    y = empty(g.output_shape, x)
    config = dict(plan.config)
    box, block_n = _box(config), config["BLOCK_N"]
    boxes_h, boxes_w, boxes = _boxes(g.batch, g.out_height, g.out_width, box)
    launch(
        kernels().conv_tma.conv_tma_kernel,
        (boxes * cdiv(g.out_channels, block_n),),
        x_desc=_map(nhwc(x), box, config["BLOCK_K"], policy, g.stride),
        weight_desc=_weight(nhwc(weight), (block_n, config["BLOCK_K"]), policy),
        bias_ptr=None if bias is None else bias.contiguous(),
        residual_desc=None if residual is None else _map(nhwc(residual), box, block_n),
        gate_desc=None,
        y_desc=_map(y, box, block_n),
        code_desc=None,
        partial_ptr=None,
        boxes_h=boxes_h,
        boxes_w=boxes_w,
        steps=g.taps * cdiv(g.in_channels, config["BLOCK_K"]),
        TRANSPOSED=False,
        RELU=relu,
        **_channels(g),
        **window(g),
        **dilation(g),
        **config,
        PRECISION="tf32",
    )
    return y


def conv2d_relu_max_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    pool: PoolGeometry,
    policy: Policy,
    plan: Candidate,
) -> tuple[Tensor, Tensor]:
    y, code = empty(pool.output_shape, x), empty(pool.output_shape, x, pool.code_dtype)
    config = dict(plan.config)
    box, block_n = _box(config), config["BLOCK_N"]
    pooled_box = (box[0], box[1] // 2, box[2] // 2)
    inner = bool(config["BATCH_INNER"])
    boxes_h, boxes_w, boxes = _boxes(g.batch, pool.out_height, pool.out_width, pooled_box)
    launch(
        kernels().conv_tma.conv_tma_kernel,
        (boxes * cdiv(g.out_channels, block_n),),
        x_desc=_map(nhwc(x), box, config["BLOCK_K"], policy, g.stride, inner),
        weight_desc=_weight(nhwc(weight), (block_n, config["BLOCK_K"]), policy),
        bias_ptr=None if bias is None else bias.contiguous(),
        residual_desc=None,
        gate_desc=None,
        y_desc=_map(y, pooled_box, block_n, batch_inner=inner),
        code_desc=_map(code, pooled_box, block_n, batch_inner=inner),
        partial_ptr=None,
        boxes_h=boxes_h,
        boxes_w=boxes_w,
        steps=g.taps * cdiv(g.in_channels, config["BLOCK_K"]),
        TRANSPOSED=False,
        RELU=True,
        **_channels(g),
        **window(g),
        **dilation(g),
        **config,
        PRECISION="tf32",
    )
    return y, code


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate) -> Tensor:
    return _input_grad(grad, weight, None, g, policy, False, plan)[0]


def conv2d_input_grad_relu(
    grad: Tensor, weight: Tensor, gate: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool, plan: Candidate
) -> tuple[Tensor, Tensor | None]:
    """The mask and the sums of a layer below, in the epilogue of the product."""
    return _input_grad(grad, weight, gate, g, policy, with_bias, plan)


def _input_grad(
    grad: Tensor, weight: Tensor, gate: Tensor | None, g: ConvGeometry, policy: Policy, with_bias: bool, plan: Candidate
) -> tuple[Tensor, Tensor | None]:
    grad_x = empty(g.input_shape, grad)
    config = dict(plan.config)
    box, block_n, block_k = _box(config), config["BLOCK_N"], config["BLOCK_K"]
    boxes_h, boxes_w, phase_boxes = _boxes(g.batch, g.height // g.stride_h, g.width // g.stride_w, box)
    boxes = phase_boxes * g.stride_h * g.stride_w
    partial = float32((boxes, g.in_channels), grad) if with_bias else None
    grid = (boxes * cdiv(g.in_channels, block_n),)
    shared = {
        "weight_desc": _weight(nhwc(weight), (block_k, block_n), policy),
        "gate_desc": None if gate is None else _map(nhwc(gate), box, block_n, stride=g.stride),
        "partial_ptr": partial,
        "boxes_h": boxes_h,
        "boxes_w": boxes_w,
        **_channels(g),
        **window(g),
        **config,
        "PRECISION": "tf32",
    }
    grad_desc = _map(nhwc(grad), box, block_k, policy)
    grad_x_desc = _map(grad_x, box, block_n, stride=g.stride)
    if g.stride == (1, 1):
        # The gradient of a convolution is one too, of the transposed weight.
        shared |= {"CHANNELS": g.out_channels, "OUT_CHANNELS": g.in_channels}
        shared |= {"PAD_H": g.dilation_h * (g.kernel_height - 1) - g.pad_h}
        shared |= {"PAD_W": g.dilation_w * (g.kernel_width - 1) - g.pad_w}
        launch(
            kernels().conv_tma.conv_tma_kernel,
            grid,
            x_desc=grad_desc,
            bias_ptr=None,
            residual_desc=None,
            y_desc=grad_x_desc,
            code_desc=None,
            steps=g.taps * cdiv(g.out_channels, block_k),
            TRANSPOSED=True,
            RELU=False,
            **dilation(g),
            **shared,
        )
    else:
        del shared["BATCH_INNER"]
        launch(
            kernels().conv_tma.conv_dgrad_strided_tma_kernel,
            grid,
            grad_desc=grad_desc,
            grad_x_desc=grad_x_desc,
            phase_boxes=phase_boxes,
            blocks_k=cdiv(g.out_channels, block_k),
            **shared,
        )
    return grad_x, None if partial is None else sum_rows(partial, grad.new_empty(g.in_channels))


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate) -> Tensor:
    grad_weight = empty(g.weight_shape, grad)
    config = dict(plan.config)
    box, block_n, block_c = _box(config), config["BLOCK_N"], config["BLOCK_C"]
    boxes_h, boxes_w, boxes = _boxes(g.batch, g.out_height, g.out_width, box)
    others = g.taps * cdiv(g.out_channels, block_n) * cdiv(g.in_channels, block_c)
    splits, split_boxes = tiles.split_product(boxes, math.prod(box), others, processors(grad.device))
    columns = g.taps * g.in_channels
    slabs = grad_weight if splits == 1 else float32((splits, g.out_channels * columns), grad)
    images, rows, columns_side = box
    # Pixels that follow each other in memory are one side of a box.
    rows_join = columns_side == g.out_width and g.out_height % rows == 0 and (images == 1 or rows == g.out_height)
    launch(
        kernels().conv_tma.conv_wgrad_tma_kernel,
        (others, splits),
        grad_desc=_rows(nhwc(grad), math.prod(box), block_n, policy)
        if rows_join
        else _map(nhwc(grad), box, block_n, policy),
        ROWS_JOIN=rows_join,
        OVERHANGS=g.out_height % rows > 0 or g.out_width % columns_side > 0,
        x_desc=_map(nhwc(x), box, block_c, policy, g.stride),
        slab_ptr=slabs,
        boxes_h=boxes_h,
        boxes_w=boxes_w,
        boxes=boxes,
        split_boxes=split_boxes,
        out_height=g.out_height,
        out_width=g.out_width,
        **_channels(g),
        **window(g),
        **dilation(g),
        **config,
        PRECISION="tf32",
    )
    return grad_weight if splits == 1 else sum_rows(slabs, grad_weight)


def _box(config: dict[str, int]) -> Box:
    return config["BLOCK_B"], config["BLOCK_H"], config["BLOCK_W"]


def _boxes(batch: int, height: int, width: int, box: Box) -> tuple[int, int, int]:
    """(boxes down a map, boxes across, boxes in all)."""
    down, across = cdiv(height, box[1]), cdiv(width, box[2])
    return down, across, cdiv(batch, box[0]) * down * across


def _map(
    tensor: Tensor,
    box: Box,
    channels: int,
    policy: Policy | None = None,
    stride: tuple[int, int] = (1, 1),
    batch_inner: bool = False,
) -> Any:
    """A descriptor of an NHWC map, as coords.load_box wants it.

    Args:
        channels: of a box.
        policy: of a factor, which is rounded to TF32 where the policy says so; None where values are kept.
    """
    rounds = policy is not None and policy.tf32
    return _descriptor(tensor, _map_layout(tensor.shape, box, channels, stride, batch_inner, tensor.dtype, rounds))


def _rows(tensor: Tensor, pixels: int, channels: int, policy: Policy) -> Any:
    """A descriptor of an NHWC map as (N · H · W, C)."""
    return _descriptor(tensor, _rows_layout(tensor.shape, pixels, channels, tensor.dtype, policy.tf32))


def _weight(weight: Tensor, block: tuple[int, int], policy: Policy) -> Any:
    """A descriptor of (taps, O, C), a strided view of a weight that lies (O, taps, C)."""
    return _descriptor(weight, _weight_layout(weight.shape, block, weight.dtype, policy.tf32))


@lru_cache(_CACHE_SIZE)
def _map_layout(
    shape: tuple[int, int, int, int],
    box: Box,
    channels: int,
    stride: tuple[int, int],
    batch_inner: bool,
    dtype: torch.dtype,
    rounds: bool,
) -> dict[str, Any]:
    n, c, h, w = shape
    images, rows, columns = box
    if stride != (1, 1):
        down, right = stride
        return _layout(
            [n, h // down, down, w // right, right * c],
            [h * w * c, down * w * c, w * c, right * c, 1],
            [images, rows, 1, columns, channels],
            dtype,
            rounds,
        )
    if batch_inner:
        return _layout([h, n, w, c], [w * c, h * w * c, c, 1], [rows, images, columns, channels], dtype, rounds)
    return _layout([n, h, w, c], [h * w * c, w * c, c, 1], [images, rows, columns, channels], dtype, rounds)


@lru_cache(_CACHE_SIZE)
def _rows_layout(
    shape: tuple[int, int, int, int], pixels: int, channels: int, dtype: torch.dtype, rounds: bool
) -> dict[str, Any]:
    n, c, h, w = shape
    return _layout([n * h * w, c], [c, 1], [pixels, channels], dtype, rounds)


@lru_cache(_CACHE_SIZE)
def _weight_layout(
    shape: tuple[int, int, int, int], block: tuple[int, int], dtype: torch.dtype, rounds: bool
) -> dict[str, Any]:
    o, c, kh, kw = shape
    return _layout([kh * kw, o, c], [c, kh * kw * c, 1], [1, *block], dtype, rounds)


def _layout(shape: list[int], strides: list[int], block: list[int], dtype: torch.dtype, rounds: bool) -> dict[str, Any]:
    """The fields of a descriptor that Triton has checked, all but the tensor that it is of."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    options = {"round_f32_to_tf32": True} if rounds and _rounds_tf32() else {}
    checked = TensorDescriptor(torch.empty(16, dtype=dtype), shape, strides, block, **options)
    return {name: value for name, value in vars(checked).items() if name != "base"}


def _descriptor(tensor: Tensor, layout: dict[str, Any]) -> Any:
    """A descriptor of `tensor`, which `reads` or the allocator has aligned: checks cost more than all the rest."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(layout, base=tensor)
    return descriptor


@cache
def _rounds_tf32() -> bool:
    """Whether this Triton's copies can round; elsewhere the tensor cores truncate."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return any(field.name == "round_f32_to_tf32" for field in dataclasses.fields(TensorDescriptor))


def _channels(g: ConvGeometry) -> dict[str, int]:
    return {"CHANNELS": g.in_channels, "OUT_CHANNELS": g.out_channels}
