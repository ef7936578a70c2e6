"""Launchers of the pointer kernels, which serve every convolution: any stride, dilation, groups and channels."""

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
    precision,
    processors,
    residues,
    sum_rows,
    window,
)
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
    blocks = _blocks(plan, policy)
    launch(
        kernels().conv_fprop.conv_fprop_kernel,
        (cdiv(g.out_pixels, blocks["BLOCK_M"]) * _tiles(g, g.group_out_channels, blocks),),
        x_ptr=nhwc(x),
        weight_ptr=nhwc(weight),
        bias_ptr=None if bias is None else bias.contiguous(),
        residual_ptr=None if residual is None else nhwc(residual),
        y_ptr=y,
        pixels=g.out_pixels,
        steps=g.taps * cdiv(blocks["PACK"] * g.group_in_channels, blocks["BLOCK_K"]),
        RELU=relu,
        **_conv_arguments(g),
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
    blocks = _blocks(plan, policy)
    launch(
        kernels().conv_fprop.conv_fprop_pool_kernel,
        (cdiv(4 * pooled_pixels, blocks["BLOCK_M"]) * _tiles(g, g.group_out_channels, blocks),),
        x_ptr=nhwc(x),
        weight_ptr=nhwc(weight),
        bias_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        code_ptr=code,
        pooled_pixels=pooled_pixels,
        steps=g.taps * cdiv(blocks["PACK"] * g.group_in_channels, blocks["BLOCK_K"]),
        **_conv_arguments(g),
        **blocks,
    )
    return y, code


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate) -> Tensor:
    grad_x = empty(g.input_shape, grad)
    phase_height, phase_width = cdiv(g.height, g.stride_h), cdiv(g.width, g.stride_w)
    phase_pixels = g.batch * phase_height * phase_width
    blocks = _blocks(plan, policy)
    phase_tiles = cdiv(phase_pixels, blocks["BLOCK_M"])
    others = g.stride_h * g.stride_w * _tiles(g, g.group_in_channels, blocks)
    launch(
        kernels().conv_dgrad.conv_dgrad_kernel,
        (phase_tiles * others,),
        grad_ptr=nhwc(grad),
        weight_ptr=nhwc(weight),
        grad_x_ptr=grad_x,
        phase_height=phase_height,
        phase_width=phase_width,
        phase_pixels=phase_pixels,
        phase_tiles=phase_tiles,
        blocks_k=cdiv(blocks["PACK"] * g.group_out_channels, blocks["BLOCK_K"]),
        **_conv_arguments(g),
        **residues(g),
        **blocks,
    )
    return grad_x


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, plan: Candidate) -> Tensor:
    grad_weight = empty(g.weight_shape, grad)
    blocks = _blocks(plan, policy)
    columns = g.taps * g.group_in_channels
    others = _tiles(g, g.group_out_channels, blocks) * cdiv(blocks["PACK"] * columns, blocks["BLOCK_C"])
    pixel_blocks = cdiv(g.out_pixels, blocks["BLOCK_P"])
    splits, split_blocks = tiles.split_product(pixel_blocks, blocks["BLOCK_P"], others, processors(grad.device))
    slabs = grad_weight if splits == 1 else float32((splits, g.out_channels * columns), grad)
    launch(
        kernels().conv_wgrad.conv_wgrad_kernel,
        (others, splits),
        grad_ptr=nhwc(grad),
        x_ptr=nhwc(x),
        slab_ptr=slabs,
        pixels=g.out_pixels,
        split_pixels=split_blocks * blocks["BLOCK_P"],
        **_conv_arguments(g),
        **blocks,
    )
    return grad_weight if splits == 1 else sum_rows(slabs, grad_weight)


def _tiles(g: ConvGeometry, group_channels: int, blocks: dict[str, Any]) -> int:
    """Tiles of BLOCK_N channels: each within a pack of groups."""
    return cdiv(g.groups, blocks["PACK"]) * cdiv(blocks["PACK"] * group_channels, blocks["BLOCK_N"])


def _blocks(plan: Candidate, policy: Policy) -> dict[str, Any]:
    """A plan's tile, with groups one by one and output channels as the product's rows where it says nothing else."""
    return {"PACK": 1, "SWAP": 1, **dict(plan.config), "PRECISION": precision(policy)}


def _conv_arguments(g: ConvGeometry) -> dict[str, int]:
    channels = {"CHANNELS": g.in_channels, "OUT_CHANNELS": g.out_channels, "GROUPS": g.groups}
    return {**map_sizes(g), **channels, **window(g), **dilation(g)}
