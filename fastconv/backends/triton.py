"""Triton kernels as a backend: for CUDA tensors, and for CPU ones under Triton's interpreter (TRITON_INTERPRET=1).

Triton and the kernels are imported with the first call, so that a missing Triton is a reason of `supports`. Operands
are brought to NHWC in memory, which costs nothing where they lie so already; outputs are channels_last.
"""

from __future__ import annotations

import contextlib
import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastconv.backends import triton_tiles as tiles
from fastconv.backends.triton_tiles import cdiv
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

NAME = "triton"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIN_CAPABILITY = (8, 0)
# Kernels number pixels in 32 bits, and a tile may count past the end.
_MAX_PIXELS = 2**31 - 2**16


def supports(op: str, direction: str, geometry: ConvGeometry | PoolGeometry, policy: Policy, device_type: str) -> str | None:
    if policy.dtype not in _DTYPES:
        return f"its kernels compute in float32, float16 and bfloat16, not in {policy.dtype}"
    reason = _unavailable(device_type)
    if reason is not None:
        return reason
    maps = ((geometry.height, geometry.width), (geometry.out_height, geometry.out_width))
    if geometry.batch * max(height * width for height, width in maps) > _MAX_PIXELS:
        return f"a map has more than {_MAX_PIXELS} pixels"
    return None


@cache
def _unavailable(device_type: str) -> str | None:
    try:
        kernels = _kernels()
    # A broken installation may fail in any way at all while it is imported, and whatever it is becomes the reason.
    except Exception as error:
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    if device_type == "cuda":
        if torch.version.hip is not None:
            return "its kernels are written for NVIDIA GPUs"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        lowest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        if lowest < _MIN_CAPABILITY:
            return f"it needs compute capability 8.0 or higher, and this GPU has {lowest[0]}.{lowest[1]}"
        return None
    if device_type == "cpu" and kernels.interpreted:
        return None
    return f"Triton needs a CUDA tensor, or TRITON_INTERPRET=1 for a CPU one; got a {device_type} tensor"


@cache
def _kernels() -> SimpleNamespace:
    from fastconv.kernels import avg_pool, conv_dgrad, conv_fprop, conv_wgrad, coords, global_pool, max_pool, prep

    return SimpleNamespace(
        interpreted=bool(coords.INTERPRET),
        avg_pool=avg_pool,
        conv_dgrad=conv_dgrad,
        conv_fprop=conv_fprop,
        conv_wgrad=conv_wgrad,
        global_pool=global_pool,
        max_pool=max_pool,
        prep=prep,
    )


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: ConvGeometry, policy: Policy, relu: bool
) -> Tensor:
    kernels = _kernels()
    y = _empty(g.output_shape, x)
    blocks = tiles.product(g.group_in_channels, g.group_out_channels, g.out_pixels, policy, kernels.interpreted)
    _launch(
        kernels.conv_fprop.conv_fprop_kernel,
        (cdiv(g.out_pixels, blocks["BLOCK_M"]) * g.groups * cdiv(g.group_out_channels, blocks["BLOCK_N"]),),
        x_ptr=_nhwc(x),
        weight_ptr=_nhwc(weight),
        bias_ptr=None if bias is None else bias.contiguous(),
        residual_ptr=None if residual is None else _nhwc(residual),
        y_ptr=y,
        pixels=g.out_pixels,
        steps=g.taps * cdiv(g.group_in_channels, blocks["BLOCK_K"]),
        RELU=relu,
        **_conv_arguments(g),
        **blocks,
    )
    return y


def conv2d_relu_max_pool2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, pool: PoolGeometry, policy: Policy
) -> tuple[Tensor, Tensor]:
    if not pool.is_2x2:
        return max_pool2d(conv2d(x, weight, bias, None, g, policy, relu=False), pool, relu=True)
    kernels = _kernels()
    y, code = _empty(pool.output_shape, x), _empty(pool.output_shape, x, pool.code_dtype)
    pooled_pixels = pool.batch * pool.out_height * pool.out_width
    blocks = tiles.product(g.group_in_channels, g.group_out_channels, 4 * pooled_pixels, policy, kernels.interpreted)
    _launch(
        kernels.conv_fprop.conv_fprop_pool_kernel,
        (cdiv(4 * pooled_pixels, blocks["BLOCK_M"]) * g.groups * cdiv(g.group_out_channels, blocks["BLOCK_N"]),),
        x_ptr=_nhwc(x),
        weight_ptr=_nhwc(weight),
        bias_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        code_ptr=code,
        pooled_pixels=pooled_pixels,
        steps=g.taps * cdiv(g.group_in_channels, blocks["BLOCK_K"]),
        **_conv_arguments(g),
        **blocks,
    )
    return y, code


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    kernels = _kernels()
    grad_x = _empty(g.input_shape, grad)
    phase_height, phase_width = cdiv(g.height, g.stride_h), cdiv(g.width, g.stride_w)
    phase_pixels = g.batch * phase_height * phase_width
    blocks = tiles.product(g.group_out_channels, g.group_in_channels, phase_pixels, policy, kernels.interpreted)
    phase_tiles = cdiv(phase_pixels, blocks["BLOCK_M"])
    others = g.stride_h * g.stride_w * g.groups * cdiv(g.group_in_channels, blocks["BLOCK_N"])
    _launch(
        kernels.conv_dgrad.conv_dgrad_kernel,
        (phase_tiles * others,),
        grad_ptr=_nhwc(grad),
        weight_ptr=_nhwc(weight),
        grad_x_ptr=grad_x,
        phase_height=phase_height,
        phase_width=phase_width,
        phase_pixels=phase_pixels,
        phase_tiles=phase_tiles,
        blocks_k=cdiv(g.group_out_channels, blocks["BLOCK_K"]),
        **_conv_arguments(g),
        **_residues(g),
        **blocks,
    )
    return grad_x


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    kernels = _kernels()
    grad_weight = _empty(g.weight_shape, grad)
    columns = g.taps * g.group_in_channels
    blocks = tiles.weight_grad(g, policy, kernels.interpreted)
    others = g.groups * cdiv(g.group_out_channels, blocks["BLOCK_N"]) * cdiv(columns, blocks["BLOCK_C"])
    splits, split_pixels = tiles.split(g.out_pixels, blocks["BLOCK_P"], others, grad.device)
    slabs = grad_weight if splits == 1 else _float32((splits, g.out_channels * columns), grad)
    _launch(
        kernels.conv_wgrad.conv_wgrad_kernel,
        (others, splits),
        grad_ptr=_nhwc(grad),
        x_ptr=_nhwc(x),
        slab_ptr=slabs,
        pixels=g.out_pixels,
        split_pixels=split_pixels,
        **_conv_arguments(g),
        **blocks,
    )
    return grad_weight if splits == 1 else _sum_rows(slabs, grad_weight)


def conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    grad = _nhwc(grad)
    return conv2d_input_grad(grad, weight, g, policy), conv2d_weight_grad(grad, x, g, policy)


def bias_grad(grad: Tensor) -> Tensor:
    return _gated_sums(grad, None)


def relu_backward(grad: Tensor, output: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    masked = _empty(grad.shape, grad)
    partial = _gate(grad, output, masked, with_bias)
    return masked, None if partial is None else _sum_rows(partial, grad.new_empty(grad.shape[1]))


def max_pool2d(x: Tensor, pool: PoolGeometry, relu: bool) -> tuple[Tensor, Tensor]:
    y, code = _empty(pool.output_shape, x), _empty(pool.output_shape, x, pool.code_dtype)
    arguments = {**_pool_arguments(pool), **_dilation(pool)}
    kernel = _kernels().max_pool.max_pool_kernel
    _launch_over(y, kernel, x_ptr=_nhwc(x), y_ptr=y, code_ptr=code, RELU=relu, **arguments)
    return y, code


def max_pool2d_backward(grad: Tensor, code: Tensor, pool: PoolGeometry, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    if pool.is_2x2:
        return _unpool(grad, code, pool, with_bias)
    grad_x = _empty(pool.input_shape, grad)
    arguments = {**_pool_arguments(pool), **_dilation(pool), **_residues(pool)}
    kernel = _kernels().max_pool.max_pool_backward_kernel
    _launch_over(grad_x, kernel, grad_ptr=_nhwc(grad), code_ptr=_nhwc(code), grad_x_ptr=grad_x, **arguments)
    return grad_x, _gated_sums(grad, code) if with_bias else None


def _unpool(grad: Tensor, code: Tensor, pool: PoolGeometry, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    kernels = _kernels()
    grad_x = _empty(pool.input_shape, grad)
    window_height, window_width = cdiv(pool.height, 2), cdiv(pool.width, 2)
    windows = pool.batch * window_height * window_width
    blocks = tiles.elementwise(pool.channels, windows, grad.dtype, kernels.interpreted)
    others = cdiv(pool.channels, blocks["BLOCK_C"])
    programs, program_windows = tiles.split(windows, blocks["BLOCK_M"], others, grad.device)
    partial = _float32((programs, pool.channels), grad) if with_bias else None
    _launch(
        kernels.prep.unpool_kernel,
        (programs, others),
        grad_ptr=_nhwc(grad),
        code_ptr=_nhwc(code),
        grad_x_ptr=grad_x,
        partial_ptr=partial,
        window_height=window_height,
        window_width=window_width,
        windows=windows,
        program_windows=program_windows,
        CHANNELS=pool.channels,
        **_map_sizes(pool),
        **blocks,
    )
    return grad_x, None if partial is None else _sum_rows(partial, grad.new_empty(pool.channels))


def avg_pool2d(x: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    y = _empty(pool.output_shape, x)
    divisors = {"COUNT_INCLUDE_PAD": count_include_pad, "DIVISOR": divisor_override}
    _launch_over(y, _kernels().avg_pool.avg_pool_kernel, x_ptr=_nhwc(x), y_ptr=y, **divisors, **_pool_arguments(pool))
    return y


def avg_pool2d_backward(grad: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    grad_x = _empty(pool.input_shape, grad)
    arguments = {"COUNT_INCLUDE_PAD": count_include_pad, "DIVISOR": divisor_override, **_pool_arguments(pool)}
    kernel = _kernels().avg_pool.avg_pool_backward_kernel
    _launch_over(grad_x, kernel, grad_ptr=_nhwc(grad), grad_x_ptr=grad_x, **arguments)
    return grad_x


def global_avg_pool2d(x: Tensor) -> Tensor:
    kernels = _kernels()
    batch, channels, height, width = x.shape
    y = _empty((batch, channels, 1, 1), x)
    blocks = tiles.elementwise(channels, height * width, x.dtype, kernels.interpreted)
    grid = (batch, cdiv(channels, blocks["BLOCK_C"]))
    kernel = kernels.global_pool.global_avg_pool_kernel
    _launch(kernel, grid, x_ptr=_nhwc(x), y_ptr=y, area=height * width, CHANNELS=channels, **blocks)
    return y


def global_avg_pool2d_backward(grad: Tensor, height: int, width: int) -> Tensor:
    grad_x = _empty((*grad.shape[:2], height, width), grad)
    arguments = {"area": height * width, "CHANNELS": grad.shape[1]}
    kernel = _kernels().global_pool.global_avg_pool_backward_kernel
    _launch_over(grad_x, kernel, grad_ptr=_nhwc(grad), grad_x_ptr=grad_x, **arguments)
    return grad_x


def _gated_sums(grad: Tensor, gate: Tensor | None) -> Tensor:
    """where(gate <= 0, 0, grad).sum((0, 2, 3)); codes of a max-pool are a gate too."""
    rows = _gate(grad, gate, None, with_sums=True)
    assert rows is not None
    return _sum_rows(rows, grad.new_empty(grad.shape[1]))


def _gate(grad: Tensor, gate: Tensor | None, masked: Tensor | None, with_sums: bool) -> Tensor | None:
    """Write where(gate <= 0, 0, grad) to `masked`, and return rows of its sums over (N, H, W)."""
    kernels = _kernels()
    channels = grad.shape[1]
    pixels = grad.numel() // channels
    blocks = tiles.elementwise(channels, pixels, grad.dtype, kernels.interpreted)
    others = cdiv(channels, blocks["BLOCK_C"])
    programs, program_pixels = tiles.split(pixels, blocks["BLOCK_M"], others, grad.device)
    partial = _float32((programs, channels), grad) if with_sums else None
    _launch(
        kernels.prep.relu_backward_kernel,
        (programs, others),
        grad_ptr=_nhwc(grad),
        gate_ptr=None if gate is None else _nhwc(gate),
        masked_ptr=masked,
        partial_ptr=partial,
        pixels=pixels,
        program_pixels=program_pixels,
        CHANNELS=channels,
        **blocks,
    )
    return partial


def _sum_rows(rows: Tensor, out: Tensor) -> Tensor:
    kernels = _kernels()
    blocks = tiles.rows(kernels.interpreted)
    num_rows, num_columns = rows.shape
    grid = (cdiv(num_columns, blocks["BLOCK_C"]),)
    sizes = {"num_rows": num_rows, "num_columns": num_columns}
    _launch(kernels.prep.sum_rows_kernel, grid, rows_ptr=rows, sum_ptr=out, **sizes, **blocks)
    return out


def _launch_over(output: Tensor, kernel: Any, **arguments: Any) -> None:
    """Launch over tiles of an output's pixels × channels."""
    channels = output.shape[1]
    pixels = output.numel() // channels
    blocks = tiles.elementwise(channels, pixels, output.dtype, _kernels().interpreted)
    grid = (cdiv(pixels, blocks["BLOCK_M"]), cdiv(channels, blocks["BLOCK_C"]))
    _launch(kernel, grid, pixels=pixels, **arguments, **blocks)


def _launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch on the device of the tensors, where Triton by itself would take the current one."""
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments)


def _nhwc(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def _float32(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _conv_arguments(g: ConvGeometry) -> dict[str, int]:
    channels = {"CHANNELS": g.in_channels, "OUT_CHANNELS": g.out_channels, "GROUPS": g.groups}
    return {**_map_sizes(g), **channels, **_window(g), **_dilation(g)}


def _pool_arguments(pool: PoolGeometry) -> dict[str, int]:
    return {**_map_sizes(pool), "CHANNELS": pool.channels, **_window(pool)}


def _map_sizes(g: ConvGeometry | PoolGeometry) -> dict[str, int]:
    return {"height": g.height, "width": g.width, "out_height": g.out_height, "out_width": g.out_width}


def _window(g: ConvGeometry | PoolGeometry) -> dict[str, int]:
    return {
        "KH": g.kernel_height,
        "KW": g.kernel_width,
        "STRIDE_H": g.stride_h,
        "STRIDE_W": g.stride_w,
        "PAD_H": g.pad_h,
        "PAD_W": g.pad_w,
    }


def _dilation(g: ConvGeometry | PoolGeometry) -> dict[str, int]:
    return {"DILATION_H": g.dilation_h, "DILATION_W": g.dilation_w}


def _residues(g: ConvGeometry | PoolGeometry) -> dict[str, int]:
    """What coords.first_tap needs to find the taps that lead to an input pixel."""
    gcd_h, gcd_w = math.gcd(g.stride_h, g.dilation_h), math.gcd(g.stride_w, g.dilation_w)
    return {
        "GCD_H": gcd_h,
        "GCD_W": gcd_w,
        "INVERSE_H": pow(g.dilation_h // gcd_h, -1, g.stride_h // gcd_h),
        "INVERSE_W": pow(g.dilation_w // gcd_w, -1, g.stride_w // gcd_w),
    }
