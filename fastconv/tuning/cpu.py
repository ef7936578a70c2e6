"""Which of the native backend's algorithms serve a convolution on a CPU, the likely fastest first: '' is oneDNN's."""

from __future__ import annotations

import math
from functools import cache

import torch

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy

AMX = "amx"
FIRST = "first"
WINOGRAD = "winograd"
ONEDNN = ""

# Costs in multiply-adds of a fused product, a channel and tile: of bringing an input tile into the transforms' domain, of
# taking an output tile out of it, of transforming one filter; fitted to times of 8 to 512 channels on a Zen 5 with AVX-512.
_INPUT, _OUTPUT, _FILTER = 900, 600, 250
_POINTS, _TILE = 36, 4
# What the kernels for first layers are compiled and tested for; of more channels oneDNN fills vectors.
_FIRST_CHANNELS, _FIRST_SIDE = 4, 11
_MANY_PIXELS = 2**15
# What oneDNN computes in the time of a fused float32 product where bfloat16 has instructions of its own: in forwards and
# input gradients of 64 channels and more, and else.
_WIDE, _WIDE_BFLOAT16, _NATIVE_BFLOAT16 = 64, 2.3, 1.4


def algorithms(direction: str, g: ConvGeometry, policy: Policy) -> tuple[str, ...]:
    """Every algorithm that can serve, in the order of a count of multiply-adds."""
    if policy.dtype == torch.float64:
        return (ONEDNN,)
    has_tiles = policy.dtype == torch.bfloat16 and _has_amx()
    if direction != "input_grad" and first_serves(g):
        return (ONEDNN, FIRST) if has_tiles and _tiles_outrun_first(direction, g) else (FIRST, ONEDNN)
    if not is_plain_3x3(g):
        return (ONEDNN,)
    if has_tiles:
        return (AMX, ONEDNN) if _amx_pays(g) else (ONEDNN, AMX)
    if policy.direct:
        return (ONEDNN,)
    gains = _winograd_operations(direction, g) < _direct_operations(direction, g, policy)
    return (WINOGRAD, ONEDNN) if gains else (ONEDNN, WINOGRAD)


def gains_in_nchw(direction: str, g: ConvGeometry, policy: Policy, algorithm: str) -> bool:
    """Whether an algorithm is faster than torch's even with NCHW operands, which it has to bring to NHWC and back.

    oneDNN reorders the maps too. Weights, which only we then reorder, must not be most of it.
    """
    if direction != "forward" or policy.dtype == torch.bfloat16 or algorithm != WINOGRAD:
        return False
    return math.prod(g.input_shape) + math.prod(g.output_shape) >= math.prod(g.weight_shape)


def loses_in_float16(op: str, policy: Policy) -> bool:
    """Whether torch's kernels are faster, which convert float16 by instructions; a pool outweighs that."""
    return op == "batch_norm_relu" and policy.dtype == torch.float16


def first_serves(g: ConvGeometry) -> bool:
    """Few input channels, neither dilated nor grouped."""
    plain = g.groups == 1 and g.dilation == (1, 1)
    return plain and g.in_channels <= _FIRST_CHANNELS and max(g.kernel_height, g.kernel_width) <= _FIRST_SIDE


def is_plain_3x3(g: ConvGeometry) -> bool:
    """3×3, neither strided nor dilated nor grouped."""
    plain = (g.kernel_height, g.kernel_width, g.stride_h, g.stride_w, g.dilation_h, g.dilation_w, g.groups)
    return plain == (3, 3, 1, 1, 1, 1, 1) and max(g.padding) <= 2


def _amx_pays(g: ConvGeometry) -> bool:
    """From 16 channels on: measured 0.9 to 5 times oneDNN, which has tiles too. Of fewer, most of a tile is zeros."""
    return min(g.in_channels, g.out_channels) >= 16


def _tiles_outrun_first(direction: str, g: ConvGeometry) -> bool:
    """oneDNN fills tiles with zeros, and is faster all the same where there are many products: measured 1.0 to 2.5 times.

    Of 3×3 windows it is so in forwards of large maps only; weight gradients took it up to twice the time.
    """
    return g.taps > 9 or (direction == "forward" and g.out_pixels >= _MANY_PIXELS)


def _winograd_operations(direction: str, g: ConvGeometry) -> float:
    turned = direction == "input_grad"
    height, width = (g.height, g.width) if turned else (g.out_height, g.out_width)
    read, written = (g.out_channels, g.in_channels) if turned else (g.in_channels, g.out_channels)
    tiles = g.batch * -(-height // _TILE) * -(-width // _TILE)
    of_written = _INPUT if direction == "weight_grad" else _OUTPUT  # the output's gradient is read too
    return tiles * (_POINTS * read * written + _INPUT * read + of_written * written) + _FILTER * read * written


def _direct_operations(direction: str, g: ConvGeometry, policy: Policy) -> float:
    products = g.out_pixels * g.out_channels * g.in_channels * g.taps
    if policy.dtype != torch.bfloat16 or not _has_bfloat16():
        return products
    is_wide = direction != "weight_grad" and min(g.in_channels, g.out_channels) >= _WIDE
    return products / (_WIDE_BFLOAT16 if is_wide else _NATIVE_BFLOAT16)


@cache
def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


@cache
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())
