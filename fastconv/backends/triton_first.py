"""Launchers of the kernels for few input channels: the input is copied with its padding, then one product reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv.backends import triton_tiles as tiles
from fastconv.backends.triton_launch import empty, float32, kernels, launch, nhwc, precision, processors, sum_rows
from fastconv.backends.triton_tiles import cdiv
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import Candidate
from fastconv.tuning.first import padded_shape


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
    blocks: dict[str, Any] = {**dict(plan.config), "PRECISION": precision(policy)}
    launch(
        kernels().conv_first.conv_first_kernel,
        (cdiv(g.out_pixels, blocks["BLOCK_M"]) * cdiv(g.out_channels, blocks["BLOCK_N"]),),
        bias_ptr=None if bias is None else bias.contiguous(),
        residual_ptr=None if residual is None else nhwc(residual),
        y_ptr=y,
        pixels=g.out_pixels,
        RELU=relu,
        **_forward_arguments(x, weight, g, blocks),
        **blocks,
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
    pooled_pixels = pool.batch * pool.out_height * pool.out_width
    blocks: dict[str, Any] = {**dict(plan.config), "PRECISION": precision(policy)}
    launch(
        kernels().conv_first.conv_first_pool_kernel,
        (cdiv(4 * pooled_pixels, blocks["BLOCK_M"]) * cdiv(g.out_channels, blocks["BLOCK_N"]),),
        bias_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        code_ptr=code,
        pooled_pixels=pooled_pixels,
        **_forward_arguments(x, weight, g, blocks),
        **blocks,
    )
    return y, code


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate) -> Tensor:
    grad_weight = empty(g.weight_shape, grad)
    padded, _ = _pack(x, None, g, 16)
    blocks = dict(plan.config)
    others = cdiv(g.out_channels, blocks["BLOCK_N"]) * cdiv(g.taps * padded.shape[-1], blocks["BLOCK_C"])
    tiles_h, tiles_w = cdiv(g.out_height, blocks["BLOCK_H"]), cdiv(g.out_width, blocks["BLOCK_W"])
    all_tiles = g.batch * tiles_h * tiles_w
    tile = blocks["BLOCK_H"] * blocks["BLOCK_W"]
    splits, split_tiles = tiles.split_product(all_tiles, tile, others, processors(grad.device))
    slabs = grad_weight if splits == 1 else float32((splits, g.out_channels * g.taps * g.in_channels), grad)
    launch(
        kernels().conv_first.conv_first_wgrad_kernel,
        (others, splits),
        grad_ptr=nhwc(grad),
        padded_ptr=padded,
        slab_ptr=slabs,
        tiles_h=tiles_h,
        tiles_w=tiles_w,
        tiles=all_tiles,
        split_tiles=split_tiles,
        CHANNELS=g.in_channels,
        KH=g.kernel_height,
        **_sizes(g, padded),
        **blocks,
        PRECISION=precision(policy),
    )
    return grad_weight if splits == 1 else sum_rows(slabs, grad_weight)


def _forward_arguments(x: Tensor, weight: Tensor, g: ConvGeometry, blocks: dict[str, Any]) -> dict[str, Any]:
    padded, packed = _pack(x, weight, g, blocks["BLOCK_K"])
    assert packed is not None
    return {"padded_ptr": padded, "packed_ptr": packed, "steps": packed.shape[0], **_sizes(g, padded)}


def _sizes(g: ConvGeometry, padded: Tensor) -> dict[str, int]:
    _, height, width, channels = padded.shape
    return {
        "padded_height": height,
        "padded_width": width,
        "out_height": g.out_height,
        "out_width": g.out_width,
        "PADDED_CHANNELS": channels,
        "OUT_CHANNELS": g.out_channels,
        "KW": g.kernel_width,
        "STRIDE_H": g.stride_h,
        "STRIDE_W": g.stride_w,
        "DILATION_H": g.dilation_h,
    }


def _pack(x: Tensor, weight: Tensor | None, g: ConvGeometry, block_k: int) -> tuple[Tensor, Tensor | None]:
    """x as [N, HP, WP, CP] and, unless it is None, the weight as [KH · blocks of a row, O, block_k]."""
    jitted = kernels()
    batch, height, width, channels = padded_shape(g, x.dtype.itemsize)
    padded = torch.empty((batch, height, width, channels), dtype=x.dtype, device=x.device)
    packed = None
    if weight is not None:
        steps = g.kernel_height * cdiv(g.kernel_width * channels, block_k)
        packed = torch.empty((steps, g.out_channels, block_k), dtype=x.dtype, device=x.device)
    pixels = batch * height * width
    block_m = tiles.padded_pixels(channels, jitted.interpreted)
    x_tiles = cdiv(pixels, block_m)
    launch(
        jitted.conv_first.pack_first_kernel,
        (x_tiles + (0 if packed is None else cdiv(packed.numel(), block_m * channels)),),
        x_ptr=nhwc(x),
        weight_ptr=None if weight is None else nhwc(weight),
        padded_ptr=padded,
        packed_ptr=packed,
        height=g.height,
        width=g.width,
        padded_height=height,
        padded_width=width,
        pixels=pixels,
        x_tiles=x_tiles,
        CHANNELS=g.in_channels,
        PADDED_CHANNELS=channels,
        OUT_CHANNELS=g.out_channels,
        KH=g.kernel_height,
        KW=g.kernel_width,
        PAD_H=g.pad_h,
        PAD_W=g.pad_w,
        BLOCK_K=block_k,
        BLOCK_M=block_m,
    )
    return padded, packed
