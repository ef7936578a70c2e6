"""Which of the native backend's algorithms serve a convolution on a CPU, the likely fastest first: '' is oneDNN's."""

from __future__ import annotations

from functools import cache

import torch

from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy

FIRST = "first"
WINOGRAD = "winograd"
ONEDNN = ""

# Costs in multiply-adds of a fused product, a channel and tile: of bringing an input tile into the transforms' domain, of
# taking an output tile out of it, of transforming one filter; measured on 64 to 512 channels.
_INPUT, _OUTPUT, _FILTER = 1400, 800, 250
_POINTS, _TILE = 36, 4
# What the kernels for first layers are compiled and tested for; of more channels oneDNN fills vectors.
_FIRST_CHANNELS, _FIRST_SIDE = 4, 11
# What oneDNN computes in the time of a float32 multiply-add: twice as much where bfloat16 has instructions of its own.
_NATIVE_BFLOAT16 = 2.0


def algorithms(direction: str, g: ConvGeometry, policy: Policy) -> tuple[str, ...]:
    """Every algorithm that can serve, in the order of a count of multiply-adds."""
    if direction != "input_grad" and first_serves(g, policy):
        return (FIRST, ONEDNN)
    if not winograd_serves(g, policy):
        return (ONEDNN,)
    return (WINOGRAD, ONEDNN) if _winograd_operations(direction, g) < _direct_operations(g, policy) else (ONEDNN, WINOGRAD)


def first_serves(g: ConvGeometry, policy: Policy) -> bool:
    """Few input channels, neither dilated nor grouped."""
    plain = g.groups == 1 and g.dilation == (1, 1) and policy.dtype != torch.float64
    return plain and g.in_channels <= _FIRST_CHANNELS and max(g.kernel_height, g.kernel_width) <= _FIRST_SIDE


def winograd_serves(g: ConvGeometry, policy: Policy) -> bool:
    """3×3, neither strided nor dilated nor grouped, sums not asked to be direct."""
    plain = (g.kernel_height, g.kernel_width, g.stride_h, g.stride_w, g.dilation_h, g.dilation_w, g.groups)
    return plain == (3, 3, 1, 1, 1, 1, 1) and max(g.padding) <= 2 and policy.dtype != torch.float64 and not policy.direct


def _winograd_operations(direction: str, g: ConvGeometry) -> float:
    turned = direction == "input_grad"
    height, width = (g.height, g.width) if turned else (g.out_height, g.out_width)
    read, written = (g.out_channels, g.in_channels) if turned else (g.in_channels, g.out_channels)
    tiles = g.batch * -(-height // _TILE) * -(-width // _TILE)
    of_written = _INPUT if direction == "weight_grad" else _OUTPUT  # the output's gradient is read too
    return tiles * (_POINTS * read * written + _INPUT * read + of_written * written) + _FILTER * read * written


def _direct_operations(g: ConvGeometry, policy: Policy) -> float:
    products = g.out_pixels * g.out_channels * g.in_channels * g.taps
    return products / (_NATIVE_BFLOAT16 if policy.dtype == torch.bfloat16 and _has_bfloat16() else 1.0)


@cache
def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())
