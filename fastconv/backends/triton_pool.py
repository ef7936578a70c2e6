"""Launchers of the pools and of the passes over a gradient."""

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
from fastconv.backends.triton_tiles import cdiv
from fastconv.geometry import PoolGeometry


def bias_grad(grad: Tensor) -> Tensor:
    return _gated_sums(grad, None)


def relu_backward(grad: Tensor, output: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    masked = empty(grad.shape, grad)
    partial = _gate(grad, output, masked, with_bias)
    return masked, None if partial is None else sum_rows(partial, grad.new_empty(grad.shape[1]))


def max_pool2d(x: Tensor, pool: PoolGeometry, relu: bool) -> tuple[Tensor, Tensor]:
    y, code = empty(pool.output_shape, x), empty(pool.output_shape, x, pool.code_dtype)
    arguments = {**_pool_arguments(pool), **dilation(pool)}
    kernel = kernels().max_pool.max_pool_kernel
    _launch_over(y, kernel, x_ptr=nhwc(x), y_ptr=y, code_ptr=code, RELU=relu, **arguments)
    return y, code


def max_pool2d_backward(grad: Tensor, code: Tensor, pool: PoolGeometry, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    if pool.is_2x2:
        return _unpool(grad, code, pool, with_bias)
    grad_x = empty(pool.input_shape, grad)
    arguments = {**_pool_arguments(pool), **dilation(pool), **residues(pool)}
    kernel = kernels().max_pool.max_pool_backward_kernel
    _launch_over(grad_x, kernel, grad_ptr=nhwc(grad), code_ptr=nhwc(code), grad_x_ptr=grad_x, **arguments)
    return grad_x, _gated_sums(grad, code) if with_bias else None


def _unpool(grad: Tensor, code: Tensor, pool: PoolGeometry, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    jitted = kernels()
    grad_x = empty(pool.input_shape, grad)
    window_height, window_width = cdiv(pool.height, 2), cdiv(pool.width, 2)
    windows = pool.batch * window_height * window_width
    blocks = tiles.elementwise(pool.channels, windows, grad.dtype, jitted.interpreted)
    others = cdiv(pool.channels, blocks["BLOCK_C"])
    programs, program_windows = tiles.split(windows, blocks["BLOCK_M"], others, processors(grad.device))
    partial = float32((programs, pool.channels), grad) if with_bias else None
    launch(
        jitted.prep.unpool_kernel,
        (programs, others),
        grad_ptr=nhwc(grad),
        code_ptr=nhwc(code),
        grad_x_ptr=grad_x,
        partial_ptr=partial,
        window_height=window_height,
        window_width=window_width,
        windows=windows,
        program_windows=program_windows,
        CHANNELS=pool.channels,
        **map_sizes(pool),
        **blocks,
    )
    return grad_x, None if partial is None else sum_rows(partial, grad.new_empty(pool.channels))


def avg_pool2d(x: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    y = empty(pool.output_shape, x)
    divisors = {"COUNT_INCLUDE_PAD": count_include_pad, "DIVISOR": divisor_override}
    _launch_over(y, kernels().avg_pool.avg_pool_kernel, x_ptr=nhwc(x), y_ptr=y, **divisors, **_pool_arguments(pool))
    return y


def avg_pool2d_backward(grad: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    grad_x = empty(pool.input_shape, grad)
    arguments = {"COUNT_INCLUDE_PAD": count_include_pad, "DIVISOR": divisor_override, **_pool_arguments(pool)}
    kernel = kernels().avg_pool.avg_pool_backward_kernel
    _launch_over(grad_x, kernel, grad_ptr=nhwc(grad), grad_x_ptr=grad_x, **arguments)
    return grad_x


def global_avg_pool2d(x: Tensor) -> Tensor:
    jitted = kernels()
    batch, channels, height, width = x.shape
    y = empty((batch, channels, 1, 1), x)
    blocks = tiles.elementwise(channels, height * width, x.dtype, jitted.interpreted)
    grid = (batch, cdiv(channels, blocks["BLOCK_C"]))
    kernel = jitted.global_pool.global_avg_pool_kernel
    launch(kernel, grid, x_ptr=nhwc(x), y_ptr=y, area=height * width, CHANNELS=channels, **blocks)
    return y


def global_avg_pool2d_backward(grad: Tensor, height: int, width: int) -> Tensor:
    grad_x = empty((*grad.shape[:2], height, width), grad)
    arguments = {"area": height * width, "CHANNELS": grad.shape[1]}
    kernel = kernels().global_pool.global_avg_pool_backward_kernel
    _launch_over(grad_x, kernel, grad_ptr=nhwc(grad), grad_x_ptr=grad_x, **arguments)
    return grad_x


def _gated_sums(grad: Tensor, gate: Tensor | None) -> Tensor:
    """where(gate <= 0, 0, grad).sum((0, 2, 3)); codes of a max-pool are a gate too."""
    rows = _gate(grad, gate, None, with_sums=True)
    assert rows is not None
    return sum_rows(rows, grad.new_empty(grad.shape[1]))


def _gate(grad: Tensor, gate: Tensor | None, masked: Tensor | None, with_sums: bool) -> Tensor | None:
    """Write where(gate <= 0, 0, grad) to `masked`, and return rows of its sums over (N, H, W)."""
    jitted = kernels()
    channels = grad.shape[1]
    pixels = grad.numel() // channels
    blocks = tiles.elementwise(channels, pixels, grad.dtype, jitted.interpreted)
    others = cdiv(channels, blocks["BLOCK_C"])
    programs, program_pixels = tiles.split(pixels, blocks["BLOCK_M"], others, processors(grad.device))
    partial = float32((programs, channels), grad) if with_sums else None
    launch(
        jitted.prep.relu_backward_kernel,
        (programs, others),
        grad_ptr=nhwc(grad),
        gate_ptr=None if gate is None else nhwc(gate),
        masked_ptr=masked,
        partial_ptr=partial,
        pixels=pixels,
        program_pixels=program_pixels,
        CHANNELS=channels,
        **blocks,
    )
    return partial


def _launch_over(output: Tensor, kernel: Any, **arguments: Any) -> None:
    """Launch over tiles of an output's pixels × channels."""
    channels = output.shape[1]
    pixels = output.numel() // channels
    blocks = tiles.elementwise(channels, pixels, output.dtype, kernels().interpreted)
    grid = (cdiv(pixels, blocks["BLOCK_M"]), cdiv(channels, blocks["BLOCK_C"]))
    launch(kernel, grid, pixels=pixels, **arguments, **blocks)


def _pool_arguments(pool: PoolGeometry) -> dict[str, int]:
    return {**map_sizes(pool), "CHANNELS": pool.channels, **window(pool)}
