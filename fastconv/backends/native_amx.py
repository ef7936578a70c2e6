"""bfloat16 convolutions on Intel's AMX, by products of tiles: which calls they serve, and their launchers.

They differ from other kernels in one thing: subnormal inputs count as zero, and subnormal results become zero, as AMX's
instructions have it. Taps outside the map are products with zero, so an infinite or NaN weight, or gradient, at the edge of
a map gives NaN there, as it does wherever padding is written out.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastconv.backends import native_library
from fastconv.backends.native_library import dense, empty, kernel
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy


def serves(g: ConvGeometry, policy: Policy, direction: str) -> str | None:
    """None where the kernels can run the call ('forward', 'input_grad' or 'weight_grad'), else the reason why not."""
    if policy.dtype != torch.bfloat16:
        return f"AMX multiplies bfloat16 only, got {policy.dtype}"
    window = (g.kernel_height, g.kernel_width, *g.stride, *g.dilation, g.groups)
    if window != (3, 3, 1, 1, 1, 1, 1):
        return (
            "the AMX kernels are for 3×3 windows of stride 1, dilation 1 and one group, got "
            f"{g.kernel_height}×{g.kernel_width}, stride={g.stride}, dilation={g.dilation}, groups={g.groups}"
        )
    if max(g.padding) > 2:
        return f"the AMX kernels are for padding up to 2, got padding={g.padding}"
    return unavailable()


def fuses(pool: PoolGeometry) -> bool:
    """Whether `conv2d_relu_max_pool2d` may have this pool."""
    window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return window == ((2, 2), (2, 2), (0, 0), (1, 1))


def preferable(g: ConvGeometry, direction: str) -> bool:
    """Whether a prototype of these kernels was faster than oneDNN at such sizes; the kernels themselves were not timed.

    It tied at input gradients of maps from 8×8 to 28×28, and with few channels most of a tile is filled with zeros.
    """
    if min(g.in_channels, g.out_channels) < 16:
        return False
    return direction != "input_grad" or not 8 <= g.width <= 28


@cache
def unavailable() -> str | None:
    """Why the kernels cannot run in this process; None where they can."""
    missing = native_library.unavailable()
    if missing is not None:
        return missing
    library = native_library.library()
    if not library.build_info()["amx"]:
        return "the compiled library has no AMX kernels: its compiler does not know AMX"
    return None if library.has_amx() else "this process has no AMX"


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: ConvGeometry, relu: bool) -> Tensor:
    output = empty(x, g.output_shape)
    if residual is not None:
        residual = dense(residual)
    _conv(x, weight, bias, residual, output, None, g.output_shape[2:], g.padding, relu, False)
    return output


def conv2d_relu_max_pool2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, pool: PoolGeometry
) -> tuple[Tensor, Tensor]:
    """Winners are those of the float32 sums, before they are rounded."""
    output = empty(x, pool.output_shape)
    code = empty(x, pool.output_shape, pool.code_dtype)
    _conv(x, weight, bias, None, output, code, g.output_shape[2:], g.padding, True, False)
    return output, code


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    input_grad = empty(grad, g.input_shape)
    _conv(grad, weight, None, None, input_grad, None, g.input_shape[2:], (2 - g.pad_h, 2 - g.pad_w), False, True)
    return input_grad


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry) -> Tensor:
    weight_grad = empty(grad, g.weight_shape)
    kernel("amx_weight_grad")(dense(grad), dense(x), weight_grad, g.padding)
    return weight_grad


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    code: Tensor | None,
    size: tuple[int, ...],
    padding: tuple[int, int],
    relu: bool,
    turned: bool,
) -> None:
    bias = None if bias is None else bias.contiguous()
    kernel("amx_conv2d")(dense(x), dense(weight), bias, residual, output, code, size, padding, relu, turned)
