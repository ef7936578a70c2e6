"""Convolutions on a CPU: by the kernels for first layers, AMX's, Winograd's, or oneDNN, as `tuning.pick` says."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastconv import tuning
from fastconv.backends import aten, chip, native_amx, native_first, native_winograd
from fastconv.backends.native_conv3x3 import Conv3x3
from fastconv.backends.native_library import dense, kernel, unavailable
from fastconv.backends.native_passes import masked, max_pool2d, max_pool2d_backward, relu_backward
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy, torchs_convolution
from fastconv.tuning import cpu

_Kernels = ModuleType | Conv3x3  # conv2d, conv2d_relu_max_pool2d and conv2d_weight_grad; of 3×3 ones conv2d_input_grad too
_KERNELS: dict[str, _Kernels] = {cpu.FIRST: native_first, cpu.AMX: native_amx.KERNELS, cpu.WINOGRAD: native_winograd.KERNELS}


def _kernels(op: str, direction: str, g: ConvGeometry, policy: Policy) -> _Kernels | None:
    """Whose kernels serve a call; None is oneDNN's."""
    return _kernels_for(op, direction, g, policy, torch.get_num_threads())


@tuning.cached_unless_watched
def _kernels_for(op: str, direction: str, g: ConvGeometry, policy: Policy, threads: int) -> _Kernels | None:
    order = (c.kernel for c in tuning.pick(op, direction, g, policy, chip("cpu")) if c.backend == "native")
    return _KERNELS.get(next((name for name in order if name != cpu.AMX or native_amx.unavailable() is None), cpu.ONEDNN))


def _fuses(pool: PoolGeometry) -> bool:
    """2×2 with stride 2, windows of ceil_mode that hang over included."""
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == ((2, 2), (2, 2), (0, 0), (1, 1))


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
    kernels = _kernels("conv2d_relu" if relu else "conv2d", "forward", g, policy)
    if kernels is not None:
        output: Tensor = kernels.conv2d(x, weight, bias, residual, g, relu, prepared)
        return output
    if aten.accumulates_in_half(x):
        wide_bias, wide_residual = (None if t is None else t.float() for t in (bias, residual))
        return _onednn(x.float(), weight.float(), wide_bias, wide_residual, g, policy, relu).to(x.dtype)
    return _onednn(x, weight, bias, residual, g, policy, relu)


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: ConvGeometry, policy: Policy, relu: bool
) -> Tensor:
    residual = None if residual is None else dense(residual)
    with torchs_convolution(policy, x.device.type):
        return kernel("conv2d")(dense(x), weight, bias, residual, g.stride, g.padding, g.dilation, g.groups, relu)


def conv2d_relu_max_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    pool: PoolGeometry,
    policy: Policy,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    kernels = _kernels("conv2d_relu_max_pool2d", "forward", g, policy) if _fuses(pool) else None
    if kernels is not None:
        output, code = kernels.conv2d_relu_max_pool2d(x, weight, bias, g, pool, prepared)
        return output, code
    return max_pool2d(conv2d(x, weight, bias, None, g, policy, relu=False), pool, relu=True)


def prepare(weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int) -> Tensor | None:
    """Winograd's transform of a weight that it may serve, in float32 (four times the elements); else None."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if weight.device.type != "cpu" or weight.dtype not in dtypes or unavailable() is not None:
        return None
    channels = weight.shape[1] * groups
    reach = (dilation[0] * (weight.shape[2] - 1) + 1, dilation[1] * (weight.shape[3] - 1) + 1)
    g = ConvGeometry.of("prepare_conv2d", (1, channels, *reach), weight.shape, None, stride, (0, 0), dilation, groups)
    served = cpu.WINOGRAD in cpu.algorithms("forward", g, Policy(weight.dtype))
    return native_winograd.filters(weight) if served else None


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    return _input_grad("conv2d", grad, weight, g, policy)


def _input_grad(op: str, grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    kernels = _kernels(op, "input_grad", g, policy)
    if kernels is None:
        return aten.conv2d_input_grad(dense(grad), weight, g, policy)
    input_grad: Tensor = kernels.conv2d_input_grad(grad, weight, g)
    return input_grad


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    kernels = _kernels("conv2d", "weight_grad", g, policy)
    if kernels is None:
        return aten.conv2d_weight_grad(dense(grad), dense(x), g, policy)
    weight_grad: Tensor = kernels.conv2d_weight_grad(grad, x, g)
    return weight_grad


def conv2d_relu_weight_grad(
    grad: Tensor, gate: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, pool: PoolGeometry | None, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    if (pool is None or _fuses(pool)) and _kernels("conv2d", "weight_grad", g, policy) is native_first:
        return native_first.conv2d_relu_weight_grad(grad, gate, x, g, with_bias)
    if pool is None:
        before, bias = relu_backward(grad, gate, with_bias)
    else:
        before, bias = max_pool2d_backward(grad, gate, pool, with_bias)
    return conv2d_weight_grad(before, x, g, policy), bias


def conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    return _backward("conv2d", grad, x, weight, g, policy)


def _backward(op: str, grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    grad = dense(grad)
    if _kernels(op, "input_grad", g, policy) is None and _kernels("conv2d", "weight_grad", g, policy) is None:
        return aten.conv2d_backward(grad, dense(x), weight, g, policy)  # both at once spare oneDNN something
    return _input_grad(op, grad, weight, g, policy), conv2d_weight_grad(grad, x, g, policy)


def conv2d_input_grad_relu(
    grad: Tensor, weight: Tensor, gate: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    return masked(dense(_input_grad("conv2d_relu", grad, weight, g, policy)), gate, with_bias)


def conv2d_backward_relu(
    grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_input, grad_weight = _backward("conv2d_relu", grad, x, weight, g, policy)
    closed, bias = masked(dense(grad_input), x, with_bias)
    return closed, grad_weight, bias
