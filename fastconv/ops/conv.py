"""Convolution operators, forward and backward, and the passes over a gradient before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconv import geometry
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.ops.define import absent, dense, given, launchers_for, operator, optional_bias
from fastconv.precision import policy

_CONV = "int[2] stride, int[2] padding, int[2] dilation, int groups"


def _conv_geometry(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvGeometry:
    dtype, device = input.dtype, input.device
    is_like = weight.dtype == dtype and weight.device == device
    if not (is_like and (bias is None or (bias.dtype == dtype and bias.device == device)) and dtype in geometry.DTYPES):
        geometry.check_input(op, input)
        geometry.check_operand(op, "weight", weight, input)
        geometry.check_operand(op, "bias", bias, input)
    bias_shape = None if bias is None else bias.shape
    return ConvGeometry.of(op, input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)


@operator(f"conv2d(Tensor input, Tensor weight, Tensor? bias, {_CONV}, str backend) -> Tensor")
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    *,
    fake: bool,
) -> Tensor:
    return _conv2d("conv2d", input, weight, bias, None, stride, padding, dilation, groups, backend, False, fake)


@operator(f"conv2d_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {_CONV}, str backend) -> Tensor")
def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    *,
    fake: bool,
) -> Tensor:
    return _conv2d("conv2d_relu", input, weight, bias, residual, stride, padding, dilation, groups, backend, True, fake)


def _conv2d(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    relu: bool,
    fake: bool,
) -> Tensor:
    g = _conv_geometry(op, input, weight, bias, stride, padding, dilation, groups)
    geometry.check_operand(op, "residual", residual, input)
    geometry.check_residual(op, residual, g.output_shape)
    layout = geometry.memory_format(input, weight)
    if fake:
        return input.new_empty(g.output_shape).to(memory_format=layout)
    launchers = launchers_for(backend, op, "forward", g, input, layout)
    arithmetic = policy(input.dtype, input.device.type)
    return dense(launchers.conv2d(input, weight, bias, residual, g, arithmetic, relu), layout)


@operator(
    f"conv2d_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, {_CONV}, int[2] pool_kernel_size, "
    "int[2] pool_stride, int[2] pool_padding, int[2] pool_dilation, bool pool_ceil_mode, str backend) -> (Tensor, Tensor)"
)
def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pool_kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    pool_dilation: Sequence[int],
    pool_ceil_mode: bool,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor]:
    op = "conv2d_relu_max_pool2d"
    g = _conv_geometry(op, input, weight, bias, stride, padding, dilation, groups)
    window = (pool_kernel_size, pool_stride, pool_padding, pool_dilation)
    pool = PoolGeometry.of(op, g.output_shape, *window, pool_ceil_mode, "pool_")
    layout = geometry.memory_format(input, weight)
    if fake:
        output = input.new_empty(pool.output_shape).to(memory_format=layout)
        return output, torch.empty_like(output, dtype=pool.code_dtype)
    arithmetic = policy(input.dtype, input.device.type)
    is_fused = pool.is_2x2 or backend != "auto"  # no kernel fuses another pool
    launchers = launchers_for(backend, op if is_fused else "conv2d", "forward", g, input, layout)
    if backend == "auto" and (not is_fused or launchers.NAME == "aten"):
        pooling = launchers_for(backend, "relu_max_pool2d", "forward", pool, input, layout)
        unpooled = launchers.conv2d(input, weight, bias, None, g, arithmetic, relu=False)
        output, code = pooling.max_pool2d(unpooled, pool, relu=True)
    else:
        output, code = launchers.conv2d_relu_max_pool2d(input, weight, bias, g, pool, arithmetic)
    return dense(output, layout), dense(code, layout)


@operator(
    "conv2d_prepared(Tensor input, Tensor weight, Tensor prepared, Tensor? bias, Tensor? residual, "
    f"{_CONV}, bool relu, bool max_pool, str backend) -> Tensor"
)
def conv2d_prepared(
    input: Tensor,
    weight: Tensor,
    prepared: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    max_pool: bool,
    backend: str,
    *,
    fake: bool,
) -> Tensor:
    """conv2d, conv2d_relu or, with `max_pool`, conv2d_relu_max_pool2d of 2×2 windows, without a derivative."""
    op = "conv2d_prepared"
    g = _conv_geometry(op, input, weight, bias, stride, padding, dilation, groups)
    geometry.check_operand(op, "residual", residual, input)
    geometry.check_residual(op, residual, g.output_shape)
    layout = geometry.memory_format(input, weight)
    pool = PoolGeometry.of(op, g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), False) if max_pool else None
    if fake:
        return input.new_empty(g.output_shape if pool is None else pool.output_shape).to(memory_format=layout)
    name = "conv2d_relu_max_pool2d" if max_pool else "conv2d_relu" if relu else "conv2d"
    launchers = launchers_for(backend, name, "forward", g, input, layout)
    arithmetic = policy(input.dtype, input.device.type)
    if pool is None:
        return dense(launchers.conv2d(input, weight, bias, residual, g, arithmetic, relu, prepared=prepared), layout)
    return dense(launchers.conv2d_relu_max_pool2d(input, weight, bias, g, pool, arithmetic, prepared=prepared)[0], layout)


@operator(
    "conv2d_backward(Tensor grad, Tensor? input, Tensor? weight, SymInt[] input_shape, SymInt[] weight_shape, "
    f"bool weight_channels_last, {_CONV}, str backend) -> (Tensor, Tensor)"
)
def conv2d_backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    weight_channels_last: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor]:
    """(input gradient, weight gradient): the first where a weight is given, the second where an input is, else empty.

    The weight gradient lies as the weight does (weight_channels_last), which optimizers and buckets of DDP expect.
    """
    g = ConvGeometry.of("conv2d_backward", input_shape, weight_shape, None, stride, padding, dilation, groups)
    arithmetic = policy(grad.dtype, grad.device.type)
    input_layout = geometry.memory_format(grad, *given(weight))
    weight_layout = torch.channels_last if weight_channels_last else torch.contiguous_format
    grad_input = grad_weight = absent(grad)
    if fake:
        if weight is not None:
            grad_input = grad.new_empty(g.input_shape).to(memory_format=input_layout)
        if input is not None:
            grad_weight = grad.new_empty(g.weight_shape).to(memory_format=weight_layout)
        return grad_input, grad_weight
    for_input = launchers_for(backend, "conv2d", "input_grad", g, grad, input_layout)
    for_weight = launchers_for(backend, "conv2d", "weight_grad", g, grad, geometry.memory_format(grad, *given(input)))
    if weight is not None and input is not None and for_input is for_weight:
        grad_input, grad_weight = for_input.conv2d_backward(grad, input, weight, g, arithmetic)
        return dense(grad_input, input_layout), dense(grad_weight, weight_layout)
    if weight is not None:
        grad_input = dense(for_input.conv2d_input_grad(grad, weight, g, arithmetic), input_layout)
    if input is not None:
        grad_weight = dense(for_weight.conv2d_weight_grad(grad, input, g, arithmetic), weight_layout)
    return grad_input, grad_weight


@operator(
    "conv2d_backward_relu(Tensor grad, Tensor input, Tensor weight, bool with_weight, bool with_bias, "
    f"{_CONV}, str backend) -> (Tensor, Tensor, Tensor)"
)
def conv2d_backward_relu(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    with_weight: bool,
    with_bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """conv2d_backward where `input` is the output of a layer's ReLU, and that ReLU's backward.

    Returns (input gradient with zeros where input <= 0, weight gradient, the first one's sum over (N, H, W)): the second
    with `with_weight`, the third, which is the lower layer's bias gradient, with `with_bias`, else empty.
    """
    g = ConvGeometry.of("conv2d_backward_relu", input.shape, weight.shape, None, stride, padding, dilation, groups)
    arithmetic = policy(grad.dtype, grad.device.type)
    layout = geometry.memory_format(grad, input, weight)
    weight_layout = geometry.memory_format(weight)
    if fake:
        masked = grad.new_empty(g.input_shape).to(memory_format=layout)
        grad_weight = grad.new_empty(g.weight_shape).to(memory_format=weight_layout) if with_weight else absent(grad)
        return masked, grad_weight, optional_bias(grad, g.in_channels, with_bias)
    for_input = launchers_for(backend, "conv2d_relu", "input_grad", g, grad, layout)
    for_weight = launchers_for(backend, "conv2d", "weight_grad", g, grad, layout) if with_weight else None
    if backend == "auto" and for_input.NAME == "aten":
        if for_weight is for_input:
            grad_input, grad_weight = for_input.conv2d_backward(grad, input, weight, g, arithmetic)
        else:
            grad_input, grad_weight = for_input.conv2d_input_grad(grad, weight, g, arithmetic), absent(grad)
        pixels = geometry.single_elements("conv2d_backward_relu", input.shape)
        masking = launchers_for(backend, "relu", "backward", pixels, grad, layout)
        masked, bias = masking.relu_backward(grad_input, input, with_bias)
    elif for_weight is for_input:
        masked, grad_weight, bias = for_input.conv2d_backward_relu(grad, input, weight, g, arithmetic, with_bias)
    else:
        masked, bias = for_input.conv2d_input_grad_relu(grad, weight, input, g, arithmetic, with_bias)
        grad_weight = absent(grad)
    if for_weight is not None:
        if for_weight is not for_input:
            grad_weight = for_weight.conv2d_weight_grad(grad, input, g, arithmetic)
        grad_weight = dense(grad_weight, weight_layout)
    return dense(masked, layout), grad_weight, absent(grad) if bias is None else bias


@operator(
    "conv2d_relu_weight_grad(Tensor grad, Tensor output, Tensor input, SymInt[] weight_shape, bool weight_channels_last, "
    f"bool with_bias, {_CONV}, str backend) -> (Tensor, Tensor)"
)
def conv2d_relu_weight_grad(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    weight_channels_last: bool,
    with_bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor]:
    """(weight gradient, with `with_bias` the bias gradient, else empty) of conv2d_relu, whose input needs none.

    The weight gradient lies as the weight does (weight_channels_last).
    """
    g = ConvGeometry.of("conv2d_relu_weight_grad", input.shape, weight_shape, None, stride, padding, dilation, groups)
    return _weight_grad(grad, output, input, g, weight_channels_last, with_bias, None, backend, fake)


@operator(
    "conv2d_relu_max_pool2d_weight_grad(Tensor grad, Tensor code, Tensor input, SymInt[] weight_shape, "
    f"bool weight_channels_last, bool with_bias, {_CONV}, int[2] pool_kernel_size, int[2] pool_stride, "
    "int[2] pool_padding, int[2] pool_dilation, bool pool_ceil_mode, str backend) -> (Tensor, Tensor)"
)
def conv2d_relu_max_pool2d_weight_grad(
    grad: Tensor,
    code: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    weight_channels_last: bool,
    with_bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pool_kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    pool_dilation: Sequence[int],
    pool_ceil_mode: bool,
    backend: str,
    *,
    fake: bool,
) -> tuple[Tensor, Tensor]:
    """conv2d_relu_weight_grad of conv2d_relu_max_pool2d."""
    op = "conv2d_relu_max_pool2d_weight_grad"
    g = ConvGeometry.of(op, input.shape, weight_shape, None, stride, padding, dilation, groups)
    window = (pool_kernel_size, pool_stride, pool_padding, pool_dilation)
    pool = PoolGeometry.of(op, g.output_shape, *window, pool_ceil_mode, "pool_")
    return _weight_grad(grad, code, input, g, weight_channels_last, with_bias, pool, backend, fake)


def _weight_grad(
    grad: Tensor,
    gate: Tensor,
    input: Tensor,
    g: ConvGeometry,
    weight_channels_last: bool,
    with_bias: bool,
    pool: PoolGeometry | None,
    backend: str,
    fake: bool,
) -> tuple[Tensor, Tensor]:
    weight_layout = torch.channels_last if weight_channels_last else torch.contiguous_format
    if fake:
        weight = grad.new_empty(g.weight_shape).to(memory_format=weight_layout)
        return weight, optional_bias(grad, g.out_channels, with_bias)
    arithmetic = policy(grad.dtype, grad.device.type)
    layout = geometry.memory_format(grad, gate)
    for_weight = launchers_for(backend, "conv2d", "weight_grad", g, grad, geometry.memory_format(grad, gate, input))
    if pool is None:
        pixels = geometry.single_elements("relu_backward", grad.shape)
        undoing = launchers_for(backend, "relu", "backward", pixels, grad, layout)
    else:
        undoing = launchers_for(backend, "max_pool2d", "backward", pool, grad, layout)
    if undoing is for_weight:
        weight, bias = for_weight.conv2d_relu_weight_grad(grad, gate, input, g, arithmetic, pool, with_bias)
    else:
        if pool is None:
            before, bias = undoing.relu_backward(grad, gate, with_bias)
        else:
            before, bias = undoing.max_pool2d_backward(grad, gate, pool, with_bias)
        weight = for_weight.conv2d_weight_grad(dense(before, layout), input, g, arithmetic)
    return dense(weight, weight_layout), absent(grad) if bias is None else bias


@operator("bias_grad(Tensor grad, str backend) -> Tensor")
def bias_grad(grad: Tensor, backend: str, *, fake: bool) -> Tensor:
    if fake:
        return optional_bias(grad, grad.shape[1], True)
    g = geometry.single_elements("bias_grad", grad.shape)
    return launchers_for(backend, "conv2d", "bias_grad", g, grad, geometry.memory_format(grad)).bias_grad(grad)


@operator("relu_backward(Tensor grad, Tensor output, bool with_bias, str backend) -> (Tensor, Tensor)")
def relu_backward(grad: Tensor, output: Tensor, with_bias: bool, backend: str, *, fake: bool) -> tuple[Tensor, Tensor]:
    layout = geometry.memory_format(grad, output)
    if fake:
        return grad.new_empty(grad.shape).to(memory_format=layout), optional_bias(grad, grad.shape[1], with_bias)
    g = geometry.single_elements("relu_backward", grad.shape)
    masked, bias = launchers_for(backend, "relu", "backward", g, grad, layout).relu_backward(grad, output, with_bias)
    return dense(masked, layout), absent(grad) if bias is None else bias
