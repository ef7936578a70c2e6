"""Convolutions on a CPU: by Winograd's transforms, kernels for first layers or oneDNN, as `tuning.pick` says."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv import tuning
from fastconv.backends import aten, chip, native_first
from fastconv.backends.native_library import dense, empty, kernel
from fastconv.backends.native_passes import masked, max_pool2d, max_pool2d_backward, relu_backward
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy, torchs_convolution


def _by_winograd(op: str, direction: str, g: ConvGeometry, policy: Policy) -> bool:
    return _algorithm(op, direction, g, policy, torch.get_num_threads()) == "winograd"


def _is_first(op: str, direction: str, g: ConvGeometry, policy: Policy) -> bool:
    return _algorithm(op, direction, g, policy, torch.get_num_threads()) == "first"


@tuning.cached_unless_watched
def _algorithm(op: str, direction: str, g: ConvGeometry, policy: Policy, threads: int) -> str:
    """The kernel of the first candidate that is ours; '' is oneDNN's."""
    return next(c.kernel for c in tuning.pick(op, direction, g, policy, chip("cpu")) if c.backend == "native")


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: ConvGeometry, policy: Policy, relu: bool
) -> Tensor:
    if residual is not None:
        residual = dense(residual)
    if _is_first("conv2d_relu" if relu else "conv2d", "forward", g, policy):
        return native_first.conv2d(x, weight, bias, residual, g, relu)
    if _by_winograd("conv2d_relu" if relu else "conv2d", "forward", g, policy):
        output = empty(x, g.output_shape)
        size = (g.out_height, g.out_width)
        _winograd(x, weight, bias, residual, output, None, size, g.padding, relu, turned=False)
        return output
    if aten.accumulates_in_half(x):
        wide_bias, wide_residual = (None if t is None else t.float() for t in (bias, residual))
        wide = _onednn(x.float(), weight.float(), wide_bias, wide_residual, g, policy, relu)
        return wide.to(x.dtype)
    return _onednn(x, weight, bias, residual, g, policy, relu)


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: ConvGeometry, policy: Policy, relu: bool
) -> Tensor:
    with torchs_convolution(policy, x.device.type):
        return kernel("conv2d")(dense(x), weight, bias, residual, g.stride, g.padding, g.dilation, g.groups, relu)


def _winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    code: Tensor | None,
    size: tuple[int, int],
    padding: tuple[int, int],
    relu: bool,
    turned: bool,
) -> None:
    kernel("winograd_conv2d")(dense(x), dense(weight), bias, residual, output, code, size, padding, relu, turned)


def conv2d_relu_max_pool2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, pool: PoolGeometry, policy: Policy
) -> tuple[Tensor, Tensor]:
    if native_first.pools(pool) and _is_first("conv2d_relu_max_pool2d", "forward", g, policy):
        return native_first.conv2d_relu_max_pool2d(x, weight, bias, g, pool)
    if pool.is_2x2 and _by_winograd("conv2d_relu_max_pool2d", "forward", g, policy):
        output, code = empty(x, pool.output_shape), empty(x, pool.output_shape, pool.code_dtype)
        size = (g.out_height, g.out_width)
        _winograd(x, weight, bias, None, output, code, size, g.padding, relu=True, turned=False)
        return output, code
    return max_pool2d(conv2d(x, weight, bias, None, g, policy, relu=False), pool, relu=True)


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    return _input_grad("conv2d", grad, weight, g, policy)


def _input_grad(op: str, grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    if not _by_winograd(op, "input_grad", g, policy):
        return aten.conv2d_input_grad(dense(grad), weight, g, policy)
    output = empty(grad, g.input_shape)
    padding = (2 - g.pad_h, 2 - g.pad_w)
    _winograd(grad, weight, None, None, output, None, (g.height, g.width), padding, relu=False, turned=True)
    return output


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    if _is_first("conv2d", "weight_grad", g, policy):
        return native_first.weight_grad(grad, None, x, g, with_bias=False)[0]
    if not _by_winograd("conv2d", "weight_grad", g, policy):
        return aten.conv2d_weight_grad(dense(grad), dense(x), g, policy)
    output = empty(grad, g.weight_shape)
    kernel("winograd_weight_grad")(dense(grad), dense(x), output, g.padding)
    return output


def conv2d_relu_weight_grad(
    grad: Tensor, gate: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, pool: PoolGeometry | None, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    if (pool is None or native_first.pools(pool)) and _is_first("conv2d", "weight_grad", g, policy):
        return native_first.weight_grad(grad, gate, x, g, with_bias)
    if pool is None:
        before, bias = relu_backward(grad, gate, with_bias)
    else:
        before, bias = max_pool2d_backward(grad, gate, pool, with_bias)
    return conv2d_weight_grad(before, x, g, policy), bias


def conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    return _backward("conv2d", grad, x, weight, g, policy)


def _backward(op: str, grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    grad = dense(grad)
    if _by_winograd(op, "input_grad", g, policy) or _by_winograd("conv2d", "weight_grad", g, policy):
        return _input_grad(op, grad, weight, g, policy), conv2d_weight_grad(grad, x, g, policy)
    return aten.conv2d_backward(grad, dense(x), weight, g, policy)


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
