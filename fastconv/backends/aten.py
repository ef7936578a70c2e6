"""Plain torch as a backend: cuDNN on a GPU, oneDNN on a CPU. It serves every call that passed its checks."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv.backends import Statistics, cudnn
from fastconv.geometry import ConvGeometry, PoolGeometry, memory_format, statistics_dtype
from fastconv.precision import Policy, torchs_convolution

NAME = "aten"


def supports(op: str, direction: str, geometry: ConvGeometry | PoolGeometry, policy: Policy, device_type: str) -> str | None:
    return None


def accumulates_in_half(tensor: Tensor) -> bool:
    """Whether torch's own convolution would sum in float16: on CPUs for which oneDNN has no float16 kernels.

    float32 is then both exact enough and several times faster.
    """
    return tensor.dtype == torch.float16 and tensor.device.type == "cpu" and not _onednn_has_half()


@cache
def _onednn_has_half() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


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
    if relu and memory_format(x) == torch.channels_last and cudnn.fuses(x.device, g, policy):
        with torchs_convolution(policy, x.device.type):
            return cudnn.conv2d_relu(x, weight, bias, residual, g)
    with torchs_convolution(policy, x.device.type):
        output = _conv2d_forward(x, weight, bias, g)
    if residual is not None:
        output += residual
    return output.relu_() if relu else output


def conv2d_relu_max_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: ConvGeometry,
    pool: PoolGeometry,
    policy: Policy,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return max_pool2d(conv2d(x, weight, bias, None, g, policy, relu=False), pool, relu=True)


def _conv2d_forward(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    if accumulates_in_half(x):
        wide_bias = None if bias is None else bias.float()
        return F.conv2d(x.float(), weight.float(), wide_bias, g.stride, g.padding, g.dilation, g.groups).to(x.dtype)
    return F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


# Shape-only operands below are uninitialised: an expanded scalar would be written out in full by torch.
def _conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, mask: list[bool]
) -> tuple[Tensor, ...]:
    if accumulates_in_half(grad):
        wide = _conv2d_backward(grad.float(), x.float(), weight.float(), g, policy, mask)
        return tuple(t if t is None else t.to(grad.dtype) for t in wide)
    with torchs_convolution(policy, grad.device.type):
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, mask
        )


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    shape_only = torch.empty(g.input_shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad, weight))
    return _conv2d_backward(grad, shape_only, weight, g, policy, [True, False, False])[0]


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    shape_only = torch.empty(g.weight_shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad, x))
    return _conv2d_backward(grad, x, shape_only, g, policy, [False, True, False])[1]


def conv2d_relu_weight_grad(
    grad: Tensor, gate: Tensor, x: Tensor, g: ConvGeometry, policy: Policy, pool: PoolGeometry | None, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    if pool is None:
        before, bias = relu_backward(grad, gate, with_bias)
    else:
        before, bias = max_pool2d_backward(grad, gate, pool, with_bias)
    return conv2d_weight_grad(before, x, g, policy), bias


def conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    grad_input, grad_weight, _ = _conv2d_backward(grad, x, weight, g, policy, [True, True, False])
    return grad_input, grad_weight


def conv2d_input_grad_relu(
    grad: Tensor, weight: Tensor, gate: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    return _masked_in_place(conv2d_input_grad(grad, weight, g, policy), gate, with_bias)


def conv2d_backward_relu(
    grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_input, grad_weight = conv2d_backward(grad, x, weight, g, policy)
    masked, bias = _masked_in_place(grad_input, x, with_bias)
    return masked, grad_weight, bias


def _masked_in_place(grad: Tensor, gate: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    torch.ops.aten.threshold_backward.grad_input(grad, gate, 0, grad_input=grad)
    return grad, grad.sum((0, 2, 3)) if with_bias else None


def bias_grad(grad: Tensor) -> Tensor:
    return grad.sum((0, 2, 3))


def relu_backward(grad: Tensor, output: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    masked = torch.ops.aten.threshold_backward(grad, output, 0)
    return masked, masked.sum((0, 2, 3)) if with_bias else None


def max_pool2d(x: Tensor, pool: PoolGeometry, relu: bool) -> tuple[Tensor, Tensor]:
    output, indices = F.max_pool2d(
        x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, return_indices=True
    )
    if relu:
        return output.relu_(), indices_to_code(indices, pool).masked_fill_(output <= 0, 0)
    if x.is_cuda and memory_format(x) is torch.channels_last:
        indices = first_of_nothing(output, indices, pool)
    return output, indices_to_code(indices, pool)


def max_pool2d_backward(grad: Tensor, code: Tensor, pool: PoolGeometry, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    open_grad = grad.masked_fill(code == 0, 0)
    indices = code_to_indices(code, pool).flatten(2)
    if pool.is_overlapping:
        sums = torch.promote_types(grad.dtype, torch.float32)  # half-precision shares are summed before they are rounded
        flat = grad.new_zeros((*grad.shape[:2], pool.height * pool.width), dtype=sums)
        flat.scatter_add_(2, indices, open_grad.flatten(2).to(sums))
    else:
        flat = grad.new_zeros((*grad.shape[:2], pool.height * pool.width))
        flat.scatter_(2, indices, open_grad.flatten(2))
    unpooled = flat.view(pool.input_shape).to(grad.dtype)
    return unpooled, open_grad.sum((0, 2, 3)) if with_bias else None


def first_of_nothing(output: Tensor, indices: Tensor, pool: PoolGeometry) -> Tensor:
    """`indices`, but of a window with nothing above -inf that of its first element inside the map.

    torch's CUDA kernel for channels_last gives such a window the map's first element, which need not be in it.
    """
    nothing = torch.zeros(indices.shape[-2:], dtype=pool.code_dtype, device=indices.device)
    return torch.where(output == -torch.inf, code_to_indices(nothing, pool), indices)


def indices_to_code(indices: Tensor, pool: PoolGeometry) -> Tensor:
    """torch's flat indices into a map of the input as codes of the window."""
    top, left = _window_origins(pool, indices.device)
    # Dilation can step over a small map: torch's index of such a window, which has no pixel, lies outside the map.
    first_row, first_column = _first_inside(top, pool.dilation_h), _first_inside(left, pool.dilation_w)
    no_pixel = (first_row >= pool.height) | (first_column >= pool.width)
    row = torch.div(indices // pool.width - top, pool.dilation_h, rounding_mode="floor")
    column = torch.div(indices % pool.width - left, pool.dilation_w, rounding_mode="floor")
    return (1 + row * pool.kernel_width + column).masked_fill_(no_pixel, 0).to(pool.code_dtype)


def _first_inside(start: Tensor, dilation: int) -> Tensor:
    """The first coordinate of a window's row or column that is not negative."""
    return torch.where(start < 0, start % dilation, start)


def code_to_indices(code: Tensor, pool: PoolGeometry) -> Tensor:
    """Codes as torch's int64 indices; a closed window's is its first element inside the map."""
    top, left = _window_origins(pool, code.device)
    offset = (code.long() - 1).clamp_(min=0)
    row = top + offset // pool.kernel_width * pool.dilation_h
    column = left + offset % pool.kernel_width * pool.dilation_w
    first_row = _first_inside(top, pool.dilation_h).clamp_(max=pool.height - 1)
    first_column = _first_inside(left, pool.dilation_w).clamp_(max=pool.width - 1)
    closed = code == 0
    return torch.where(closed, first_row, row) * pool.width + torch.where(closed, first_column, column)


def _window_origins(pool: PoolGeometry, device: torch.device) -> tuple[Tensor, Tensor]:
    top = torch.arange(pool.out_height, device=device).mul_(pool.stride_h).sub_(pool.pad_h).view(-1, 1)
    left = torch.arange(pool.out_width, device=device).mul_(pool.stride_w).sub_(pool.pad_w).view(1, -1)
    return top, left


def avg_pool2d(x: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    if divisor_override is not None and _is_cut(x, divisor_override):
        sums = avg_pool2d(x.to(_wide(x)), pool, count_include_pad, 1)
        return (sums / divisor_override).to(x.dtype)
    return F.avg_pool2d(x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, count_include_pad, divisor_override)


def avg_pool2d_backward(grad: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    if pool.is_overlapping and grad.device.type == "cpu" and grad.dtype in (torch.bfloat16, torch.float16):
        # torch adds the windows' shares in the tensor's own dtype there
        return avg_pool2d_backward(grad.float(), pool, count_include_pad, divisor_override).to(grad.dtype)
    if divisor_override is not None and _is_cut(grad, divisor_override):
        return (avg_pool2d_backward(grad.to(_wide(grad)), pool, count_include_pad, 1) / divisor_override).to(grad.dtype)
    layout = memory_format(grad)
    shape_only = torch.empty(pool.input_shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    return torch.ops.aten.avg_pool2d_backward(
        grad, shape_only, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, count_include_pad, divisor_override
    )


def _is_cut(x: Tensor, divisor: int) -> bool:
    """Whether torch's CUDA kernels, which have 32 bits for it, would divide by something else."""
    return x.is_cuda and not -(2**31) <= divisor < 2**31


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def global_avg_pool2d(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


def global_avg_pool2d_backward(grad: Tensor, height: int, width: int) -> Tensor:
    return (grad / (height * width)).expand(-1, -1, height, width)


def batch_norm_relu(
    x: Tensor,
    statistics: Statistics | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Statistics]:
    output, statistics = batch_norm(x, statistics, weight, bias, residual, eps)
    return output.relu_(), statistics


def batch_norm_relu_max_pool2d(
    x: Tensor,
    statistics: Statistics | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    pool: PoolGeometry,
) -> tuple[Tensor, Tensor, Statistics]:
    output, statistics = batch_norm(x, statistics, weight, bias, residual, eps)
    return *max_pool2d(output, pool, relu=True), statistics


def batch_norm(
    x: Tensor,
    statistics: Statistics | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Statistics]:
    dtype = statistics_dtype(x)
    count = x.numel() // x.shape[1]
    mean, var = statistics or (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    if count == 0:
        return torch.empty_like(x), (mean, var)
    # torch keeps no variance of the batch, but moves zeros by a momentum of 1 to it: the unbiased one.
    operands = (None if t is None else t.to(dtype).contiguous() for t in (weight, bias, mean, var))
    output, _, _ = torch.ops.aten.native_batch_norm(x, *operands, statistics is None, 1.0, eps)
    if statistics is None:
        var *= (count - 1) / count
    if residual is not None:
        output += residual
    return output, (mean, var)


def batch_norm_relu_backward(
    grad: Tensor,
    gate: Tensor,
    x: Tensor | None,
    statistics: Statistics,
    weight: Tensor | None,
    eps: float,
    training: bool,
    pool: PoolGeometry | None,
    with_input: bool,
    with_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if pool is None:
        closed, _ = relu_backward(grad, gate, with_bias=False)
    else:
        closed, _ = max_pool2d_backward(grad, gate, pool, with_bias=False)
    grad_x, sums = batch_norm_backward(closed, x, statistics, weight, eps, training, with_input)
    return grad_x, sums, closed if with_residual else None


def batch_norm_backward(
    grad: Tensor,
    x: Tensor | None,
    statistics: Statistics,
    weight: Tensor | None,
    eps: float,
    training: bool,
    with_input: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(x's gradient, sums) of the normalisation alone, as Launchers.batch_norm_relu_backward has them."""
    mean, var = (t.to(statistics_dtype(grad)).contiguous() for t in statistics)
    if grad.numel() == 0:
        sums = torch.zeros((2, len(mean)), dtype=mean.dtype, device=mean.device)
        return torch.empty_like(grad) if with_input else None, None if x is None else sums
    if x is None and not with_input:
        return None, None
    weight = torch.ones_like(var) if weight is None else weight.to(var.dtype).contiguous()
    inverse = (var + eps).rsqrt()
    if x is None:
        return (grad * (weight * inverse).view(-1, 1, 1)).to(grad.dtype), None
    grad = grad.contiguous(memory_format=memory_format(x))  # torch's kernels take both in one layout
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, var, mean, inverse, training, eps, [with_input, True, True]
    )
    if grad.device.type == "cpu" and grad.dtype.itemsize == 2 and grad.is_contiguous():
        grad_bias = grad.sum((0, 2, 3), dtype=mean.dtype)  # torch rounds an image's share to the gradient's dtype there
    return grad_x if with_input else None, torch.stack((grad_bias, grad_weight))


def batch_norm_update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    for running, batch, share in ((running_mean, mean, momentum), (running_var, var, momentum * count / (count - 1))):
        if running.dtype == batch.dtype:
            running.mul_(1 - momentum).add_(batch, alpha=share)
        else:
            running.copy_((1 - momentum) * running.to(batch.dtype) + share * batch)
