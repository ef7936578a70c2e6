"""Triton kernels as a backend: for CUDA tensors, and for CPU ones under Triton's interpreter (TRITON_INTERPRET=1).

Operands are brought to NHWC in memory, which costs nothing where they lie so already; outputs are channels_last.
"""

from __future__ import annotations

from functools import cache

import torch

from fastconv.backends.triton_conv import (
    conv2d,
    conv2d_backward,
    conv2d_backward_relu,
    conv2d_input_grad,
    conv2d_input_grad_relu,
    conv2d_relu_max_pool2d,
    conv2d_relu_weight_grad,
    conv2d_weight_grad,
)
from fastconv.backends.triton_launch import is_recording, kernels
from fastconv.backends.triton_norm import (
    batch_norm_relu,
    batch_norm_relu_backward,
    batch_norm_relu_max_pool2d,
    batch_norm_update,
)
from fastconv.backends.triton_pool import (
    avg_pool2d,
    avg_pool2d_backward,
    bias_grad,
    global_avg_pool2d,
    global_avg_pool2d_backward,
    max_pool2d,
    max_pool2d_backward,
    relu_backward,
)
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

__all__ = [
    "NAME",
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm_relu",
    "batch_norm_relu_backward",
    "batch_norm_relu_max_pool2d",
    "batch_norm_update",
    "bias_grad",
    "conv2d",
    "conv2d_backward",
    "conv2d_backward_relu",
    "conv2d_input_grad",
    "conv2d_input_grad_relu",
    "conv2d_relu_max_pool2d",
    "conv2d_relu_weight_grad",
    "conv2d_weight_grad",
    "global_avg_pool2d",
    "global_avg_pool2d_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "relu_backward",
    "supports",
]

NAME = "triton"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIN_CAPABILITY = (8, 0)
# Kernels number pixels in 32 bits, and a tile may count past the end.
_MAX_PIXELS = 2**31 - 2**16


def supports(op: str, direction: str, geometry: ConvGeometry | PoolGeometry, policy: Policy, device_type: str) -> str | None:
    if policy.dtype not in _DTYPES:
        return f"its kernels compute in float32, float16 and bfloat16, not in {policy.dtype}"
    reason = None if is_recording() else _unavailable(device_type)
    if reason is not None:
        return reason
    maps = ((geometry.height, geometry.width), (geometry.out_height, geometry.out_width))
    if geometry.batch * max(height * width for height, width in maps) > _MAX_PIXELS:
        return f"a map has more than {_MAX_PIXELS} pixels"
    return None


@cache
def _unavailable(device_type: str) -> str | None:
    try:
        jitted = kernels()
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
    if device_type == "cpu" and jitted.interpreted:
        return None
    return f"Triton needs a CUDA tensor, or TRITON_INTERPRET=1 for a CPU one; got a {device_type} tensor"
