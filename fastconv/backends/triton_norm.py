"""Launchers of batch normalisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastconv.backends import Statistics
from fastconv.backends import triton_tiles as tiles
from fastconv.backends.triton_launch import empty, float32, kernels, launch, map_sizes, nhwc, processors, sum_rows
from fastconv.backends.triton_pool import max_pool2d, max_pool2d_backward, relu_backward
from fastconv.backends.triton_tiles import cdiv
from fastconv.geometry import PoolGeometry

# A gradient, what closes it (the output, or the code of a pool), and the pool: None where it is closed already.
_Source = tuple[Tensor, Tensor | None, PoolGeometry | None]


def batch_norm_relu(
    x: Tensor,
    statistics: Statistics | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Statistics]:
    statistics = statistics or _batch_statistics(x)
    return _normalised(x, statistics, weight, bias, residual, eps, relu=True), statistics


def batch_norm_relu_max_pool2d(
    x: Tensor,
    statistics: Statistics | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    pool: PoolGeometry,
) -> tuple[Tensor, Tensor, Statistics]:
    statistics = statistics or _batch_statistics(x)
    if not pool.is_2x2:
        normalised = _normalised(x, statistics, weight, bias, residual, eps, relu=False)
        return *max_pool2d(normalised, pool, relu=True), statistics
    y, code = empty(pool.output_shape, x), empty(pool.output_shape, x, pool.code_dtype)
    blocks, grid = _tiles(y, y.numel() // pool.channels)
    launch(
        kernels().batch_norm.batch_norm_pool_kernel,
        grid,
        x_ptr=nhwc(x),
        y_ptr=y,
        code_ptr=code,
        residual_ptr=None if residual is None else nhwc(residual),
        pixels=y.numel() // pool.channels,
        **_channel_arguments(statistics, weight, eps),
        bias_ptr=None if bias is None else bias.contiguous(),
        **map_sizes(pool),
        CHANNELS=pool.channels,
        **blocks,
    )
    return y, code, statistics


def batch_norm_relu_backward(
    grad: Tensor,
    gate: Tensor,
    x: Tensor | None,
    statistics: Statistics,
    weight: Tensor | None,
    eps: float,
    training: bool,
    pool: PoolGeometry | None,
    with_input: bool,
    with_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    source: _Source = (grad, gate, pool)
    closed = None  # the closed gradient, where it is written before the kernels that otherwise close it by themselves
    if pool is not None and (not pool.is_2x2 or (with_residual and not with_input)):
        closed, _ = max_pool2d_backward(grad, gate, pool, with_bias=False)
    elif with_residual and not with_input:
        closed, _ = relu_backward(grad, gate, with_bias=False)
    if closed is not None:
        source = (closed, None, None)
    sums = None if x is None else _sums(source, x, statistics, eps)
    if not with_input:
        return None, sums, closed if with_residual else None
    shape = grad.shape if pool is None else pool.input_shape
    written = empty(shape, grad) if with_residual and closed is None else None
    varying = (x, sums) if training else (None, None)
    grad_x = _input_grad(source, *varying, statistics, weight, eps, empty(shape, grad), written)
    return grad_x, sums, (closed if written is None else written) if with_residual else None


def batch_norm_update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    channels = mean.shape[0]
    dense_mean, dense_var = running_mean.contiguous(), running_var.contiguous()
    launch(
        kernels().batch_norm.update_statistics_kernel,
        (cdiv(channels, tiles.UPDATE["BLOCK_C"]),),
        running_mean_ptr=dense_mean,
        running_var_ptr=dense_var,
        mean_ptr=mean.contiguous(),
        var_ptr=var.contiguous(),
        momentum=float(momentum),
        unbiased=count / (count - 1),
        channels=channels,
        **tiles.UPDATE,
    )
    for running, dense in ((running_mean, dense_mean), (running_var, dense_var)):
        if dense is not running:
            running.copy_(dense)


def _batch_statistics(x: Tensor) -> Statistics:
    """(mean, biased variance) over (N, H, W), float32."""
    jitted = kernels()
    channels = x.shape[1]
    pixels = x.numel() // channels
    blocks, programs, others, program_pixels = _split(x, pixels)
    rows = float32((2, programs, channels), x)
    x = nhwc(x)
    sizes = {"pixels": pixels, "program_pixels": program_pixels}
    row_ptrs = {"mean_rows_ptr": rows[0], "squares_rows_ptr": rows[1]}
    kernel = jitted.batch_norm.batch_statistics_kernel
    launch(kernel, (programs, others), x_ptr=x, CHANNELS=channels, **row_ptrs, **sizes, **blocks)
    mean, var = float32((channels,), x), float32((channels,), x)
    blocks = tiles.rows(jitted.interpreted)
    sizes |= {"num_rows": programs, "channels": channels}
    kernel = jitted.batch_norm.combine_statistics_kernel
    launch(kernel, (cdiv(channels, blocks["BLOCK_C"]),), x_ptr=x, mean_ptr=mean, var_ptr=var, **row_ptrs, **sizes, **blocks)
    return mean, var


def _normalised(
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    y = empty(x.shape, x)
    channels = x.shape[1]
    pixels = x.numel() // channels
    blocks, grid = _tiles(x, pixels, wide=True)
    launch(
        kernels().batch_norm.batch_norm_kernel,
        grid,
        x_ptr=nhwc(x),
        y_ptr=y,
        residual_ptr=None if residual is None else nhwc(residual),
        pixels=pixels,
        **_channel_arguments(statistics, weight, eps),
        bias_ptr=None if bias is None else bias.contiguous(),
        CHANNELS=channels,
        RELU=relu,
        **blocks,
    )
    return y


def _sums(source: _Source, x: Tensor, statistics: Statistics, eps: float) -> Tensor:
    """[2, C]: the closed gradient's sums, and those of its products with the normalised input."""
    grad, gate, pool = source
    jitted = kernels()
    channels = x.shape[1]
    pixels = grad.numel() // channels
    blocks, programs, others, program_pixels = _split(grad, pixels, wide=pool is None)
    rows = float32((programs, 2 * channels), x)
    arguments: dict[str, Any] = {"gate_ptr": None if gate is None else nhwc(gate)}
    kernel = jitted.batch_norm.batch_norm_sums_kernel
    if pool is not None:
        arguments = {"code_ptr": arguments["gate_ptr"], **map_sizes(pool)}
        kernel = jitted.batch_norm.batch_norm_pool_sums_kernel
    channel_arguments = _channel_arguments(statistics, None, eps)
    del channel_arguments["weight_ptr"]
    launch(
        kernel,
        (programs, others),
        grad_ptr=nhwc(grad),
        x_ptr=nhwc(x),
        rows_ptr=rows,
        pixels=pixels,
        program_pixels=program_pixels,
        CHANNELS=channels,
        **arguments,
        **channel_arguments,
        **blocks,
    )
    return sum_rows(rows, float32((2 * channels,), x)).view(2, channels)


def _input_grad(
    source: _Source,
    x: Tensor | None,
    sums: Tensor | None,
    statistics: Statistics,
    weight: Tensor | None,
    eps: float,
    grad_x: Tensor,
    residual_grad: Tensor | None,
) -> Tensor:
    grad, gate, pool = source
    channels = grad_x.shape[1]
    pixels = grad_x.numel() // channels
    arguments: dict[str, Any] = {
        "grad_ptr": nhwc(grad),
        "x_ptr": None if x is None else nhwc(x),
        "sums_ptr": sums,
        "grad_x_ptr": grad_x,
        "residual_grad_ptr": residual_grad,
        "inverse_count": 1.0 / pixels,
        "CHANNELS": channels,
        **_channel_arguments(statistics, weight, eps),
    }
    gate = None if gate is None else nhwc(gate)
    if pool is None:
        blocks, grid = _tiles(grad, pixels, wide=True)
        kernel = kernels().batch_norm.batch_norm_input_grad_kernel
        launch(kernel, grid, gate_ptr=gate, pixels=pixels, **arguments, **blocks)
        return grad_x
    window_height, window_width = cdiv(pool.height, 2), cdiv(pool.width, 2)
    windows = pool.batch * window_height * window_width
    blocks, grid = _tiles(grad, windows)
    launch(
        kernels().batch_norm.batch_norm_pool_input_grad_kernel,
        grid,
        code_ptr=gate,
        window_height=window_height,
        window_width=window_width,
        windows=windows,
        **map_sizes(pool),
        **arguments,
        **blocks,
    )
    return grad_x


def _channel_arguments(statistics: Statistics, weight: Tensor | None, eps: float) -> dict[str, Any]:
    mean, var = statistics
    scale = None if weight is None else weight.contiguous()
    return {"mean_ptr": mean.contiguous(), "var_ptr": var.contiguous(), "weight_ptr": scale, "eps": float(eps)}


def _blocks(tensor: Tensor, pixels: int, wide: bool) -> dict[str, int]:
    rule = tiles.normalised if wide else tiles.elementwise
    return rule(tensor.shape[1], pixels, tensor.dtype, kernels().interpreted)


def _tiles(tensor: Tensor, pixels: int, wide: bool = False) -> tuple[dict[str, int], tuple[int, int]]:
    """(tile sides, grid) of a pass over `pixels` × the tensor's channels."""
    blocks = _blocks(tensor, pixels, wide)
    return blocks, (cdiv(pixels, blocks["BLOCK_M"]), cdiv(tensor.shape[1], blocks["BLOCK_C"]))


def _split(tensor: Tensor, pixels: int, wide: bool = True) -> tuple[dict[str, int], int, int, int]:
    """(tile sides, programs along the pixels, programs along the channels, pixels of each) of a pass that sums."""
    blocks = _blocks(tensor, pixels, wide)
    others = cdiv(tensor.shape[1], blocks["BLOCK_C"])
    programs, program_pixels = tiles.split(pixels, blocks["BLOCK_M"], others, processors(tensor.device))
    return blocks, programs, others, program_pixels
