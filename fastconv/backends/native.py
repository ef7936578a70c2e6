"""The compiled kernels of C++ and CUDA C++: convolutions, poolings, batch norms.

They take dense channels_last tensors of float32, bfloat16 or float16, and sum in float32.
"""

from __future__ import annotations

from types import ModuleType

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


def _convolutions(tensor: Tensor) -> ModuleType:
    return native_cuda if runs_cuda(tensor) else native_conv


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    g: ConvGeometry,
    policy: Policy,
    relu: bool,
    prepared: Tensor | None = None,
) -> Tensor:
    output: Tensor = _convolutions(x).conv2d(x, weight, bias, residual, g, policy, relu, prepared)
    return output


def conv2d_relu_max_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    pool: PoolGeometry,
    policy: Policy,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    output, code = _convolutions(x).conv2d_relu_max_pool2d(x, weight, bias, g, pool, policy, prepared)
    return output, code


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    input_grad: Tensor = _convolutions(grad).conv2d_input_grad(grad, weight, g, policy)
    return input_grad


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    weight_grad: Tensor = _convolutions(grad).conv2d_weight_grad(grad, x, g, policy)
    return weight_grad


def conv2d_relu_weight_grad(
    grad: Tensor, gate: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, pool: PoolGeometry | None, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    weight, bias = _convolutions(grad).conv2d_relu_weight_grad(grad, gate, x, g, policy, pool, with_bias)
    return weight, bias


def conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    grad_input, grad_weight = _convolutions(grad).conv2d_backward(grad, x, weight, g, policy)
    return grad_input, grad_weight


def conv2d_input_grad_relu(
    grad: Tensor, weight: Tensor, gate: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    closed, bias = _convolutions(grad).conv2d_input_grad_relu(grad, weight, gate, g, policy, with_bias)
    return closed, bias


def conv2d_backward_relu(
    grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    closed, grad_weight, bias = _convolutions(grad).conv2d_backward_relu(grad, x, weight, g, policy, with_bias)
    return closed, grad_weight, bias
