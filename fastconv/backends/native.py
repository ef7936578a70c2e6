"""The compiled kernels of C++ and CUDA C++: convolutions, poolings, batch norms.

They take dense channels_last tensors of float32, bfloat16 or float16, and sum in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastconv.backends import native_conv, native_cuda
from fastconv.backends.native_conv import prepare
from fastconv.backends.native_library import library, runs_cuda, unavailable, unavailable_cuda
from fastconv.backends.native_norm import (
    batch_norm_relu,
    batch_norm_relu_backward,
    batch_norm_relu_max_pool2d,
    batch_norm_update,
)
from fastconv.backends.native_passes import (
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
    "library",
    "max_pool2d",
    "max_pool2d_backward",
    "prepare",
    "relu_backward",
    "supports",
    "unavailable",
]

NAME = "native"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(op: str, direction: str, geometry: ConvGeometry | PoolGeometry, policy: Policy, device_type: str) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"it runs on CPU and CUDA tensors, got one on {device_type}"
    if policy.dtype not in _DTYPES:
        return f"it has no kernels for {policy.dtype}; allowed: {', '.join(map(str, _DTYPES))}"
    return unavailable() if device_type == "cpu" else unavailable_cuda() or native_cuda.too_large(geometry)


def _by_device(name: str) -> Callable[..., Any]:
    """A convolution's launcher, the CUDA library's or the CPU library's: by where its first operand lies."""
    on_cuda, on_cpu = getattr(native_cuda, name), getattr(native_conv, name)

    @functools.wraps(on_cpu)
    def launch(tensor: Tensor, *operands: Any, **named: Any) -> Any:
        return (on_cuda if runs_cuda(tensor) else on_cpu)(tensor, *operands, **named)

    return launch


conv2d = _by_device("conv2d")
conv2d_relu_max_pool2d = _by_device("conv2d_relu_max_pool2d")
conv2d_input_grad = _by_device("conv2d_input_grad")
conv2d_weight_grad = _by_device("conv2d_weight_grad")
conv2d_relu_weight_grad = _by_device("conv2d_relu_weight_grad")
conv2d_backward = _by_device("conv2d_backward")
conv2d_input_grad_relu = _by_device("conv2d_input_grad_relu")
conv2d_backward_relu = _by_device("conv2d_backward_relu")
