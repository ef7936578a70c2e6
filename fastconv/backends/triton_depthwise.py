"""Launchers of the depthwise kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastconv.backends import triton_tiles as tiles
from fastconv.backends.triton_launch import (
    dilation,
    empty,
    float32,
    kernels,
    launch,
    map_sizes,
    nhwc,
    processors,
    residues,
    sum_rows,
    window,
)
from fastconv.backends.triton_pool import max_pool2d
from fastconv.backends.triton_tiles import cdiv
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import Candidate


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
    terms = {
        "bias_ptr": None if bias is None else bias.contiguous(),
        "residual_ptr": None if residual is None else nhwc(residual),
    }
    arguments = {**map_sizes(g), **window(g), **dilation(g), **terms}
    _launch(nhwc(x), weight, y, plan, {**arguments, "FLIP": False, "RELU": relu})
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
    return max_pool2d(conv2d(x, weight, bias, None, g, policy, False, plan), pool, relu=True)


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate) -> Tensor:
    grad_x = empty(g.input_shape, grad)
    if g.stride == (1, 1):
        arguments: dict[str, Any] = {**window(g), **dilation(g), "bias_ptr": None, "residual_ptr": None}
        arguments |= {"height": g.out_height, "width": g.out_width, "out_height": g.height, "out_width": g.width}
        arguments["PAD_H"] = g.dilation_h * (g.kernel_height - 1) - g.pad_h
        arguments["PAD_W"] = g.dilation_w * (g.kernel_width - 1) - g.pad_w
        _launch(nhwc(grad), weight, grad_x, plan, {**arguments, "FLIP": True, "RELU": False})
        return grad_x
    blocks = dict(plan.config)
    del blocks["ROWS"]
    phase_height, phase_width = cdiv(g.height, g.stride_h), cdiv(g.width, g.stride_w)
    phase_pixels = g.batch * phase_height * phase_width
    phase_tiles = cdiv(phase_pixels, blocks["BLOCK_M"])
    launch(
        kernels().depthwise.depthwise_dgrad_kernel,
        (g.stride_h * g.stride_w * phase_tiles, cdiv(g.in_channels, blocks["BLOCK_C"])),
        grad_ptr=nhwc(grad),
        weight_ptr=_by_tap(weight),
        grad_x_ptr=grad_x,
        phase_height=phase_height,
        phase_width=phase_width,
        phase_pixels=phase_pixels,
        phase_tiles=phase_tiles,
        CHANNELS=g.in_channels,
        **map_sizes(g),
        **window(g),
        **dilation(g),
        **residues(g),
        **blocks,
    )
    return grad_x


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate) -> Tensor:
    grad_weight = empty(g.weight_shape, grad)
    blocks = dict(plan.config)
    del blocks["ROWS"]
    arguments = {**map_sizes(g), **window(g), **dilation(g), **blocks}
    others: tuple[int, ...] = (cdiv(g.in_channels, blocks["BLOCK_C"]),)
    if (g.kernel_height, g.kernel_width) == (3, 3):
        kernel = kernels().depthwise.depthwise_wgrad_3x3_kernel
        del arguments["KH"], arguments["KW"]
    else:
        kernel = kernels().depthwise.depthwise_wgrad_kernel
        others = (*others, g.taps)
    programs = others[0] * (others[1] if len(others) > 1 else 1)
    splits, split_pixels = tiles.split(g.out_pixels, blocks["BLOCK_M"], programs, processors(grad.device))
    slabs = float32((splits, g.in_channels * g.taps), grad)
    launch(
        kernel,
        (splits, *others),
        grad_ptr=nhwc(grad),
        x_ptr=nhwc(x),
        slab_ptr=slabs,
        pixels=g.out_pixels,
        split_pixels=split_pixels,
        CHANNELS=g.in_channels,
        **arguments,
    )
    return sum_rows(slabs, grad_weight)


def _by_tap(weight: Tensor) -> Tensor:
    """[C, 1, KH, KW] as [KH · KW, C]."""
    return weight.flatten(1).t().contiguous()


def _launch(x: Tensor, weight: Tensor, y: Tensor, plan: Candidate, arguments: dict[str, Any]) -> None:
    """Forward, or the input gradient as the forward of a window turned by 180°: `x` and `y` lie NHWC."""
    blocks = dict(plan.config)
    rows = blocks.pop("ROWS")
    batch, channels, out_height, out_width = y.shape
    arguments |= {"x_ptr": x, "weight_ptr": _by_tap(weight), "y_ptr": y, "CHANNELS": channels, **blocks}
    others = cdiv(channels, blocks["BLOCK_C"])
    if rows == 1:
        pixels = batch * out_height * out_width
        grid = (cdiv(pixels, blocks["BLOCK_M"]), others)
        launch(kernels().depthwise.depthwise_kernel, grid, pixels=pixels, **arguments)
        return
    for name in ("KH", "KW", "STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W"):
        del arguments[name]
    tiles_h, tiles_w = cdiv(out_height, rows), cdiv(out_width, blocks["BLOCK_M"])
    grid = (batch * tiles_h * tiles_w, others)
    launch(kernels().depthwise.depthwise_rows_kernel, grid, tiles_h=tiles_h, tiles_w=tiles_w, **arguments)
