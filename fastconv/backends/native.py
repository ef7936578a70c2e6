"""The compiled CPU kernels: oneDNN's convolutions with fused passes behind them, own poolings and batch normalisation.

Only this module loads `fastconv._C`. Its kernels take dense channels_last tensors of float32, bfloat16 or float16 and
write outputs that are allocated here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastconv.backends import Statistics, aten
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy

NAME = "native"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = "fastconv._C"
_INSTALL = "install torch and a C++ compiler, then run `pip install --no-build-isolation -e .` in fastconv's source folder"


def supports(op: str, direction: str, geometry: ConvGeometry | PoolGeometry, policy: Policy, device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it runs on CPU tensors, got one on {device_type}"
    if policy.dtype not in _DTYPES:
        return f"it has no kernels for {policy.dtype}; allowed: {', '.join(map(str, _DTYPES))}"
    return unavailable()


def unavailable() -> str | None:
    """Why the compiled library cannot be used, with what to do about it; None where it can."""
    library = _load()
    return library if isinstance(library, str) else None


def library() -> ModuleType:
    """The compiled library: its `build_info()` and `cpu_capability()`.

    Raises:
        RuntimeError: it is not installed, or does not load.
    """
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@cache
def _load() -> ModuleType | str:
    try:
        return importlib.import_module(_LIBRARY)
    except ModuleNotFoundError:
        return f"the compiled library is not installed ({_LIBRARY} is missing): {_INSTALL}"
    except ImportError as error:
        return f"the compiled library does not load ({error}): it was built for another torch or Python; {_INSTALL}"


@cache
def _kernel(name: str) -> Callable[..., Tensor]:
    library()
    kernel: Callable[..., Tensor] = getattr(torch.ops.fastconv_native, name).default
    return kernel


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: ConvGeometry, policy: Policy, relu: bool
) -> Tensor:
    if aten.accumulates_in_half(x):
        wide_bias, wide_residual = (None if t is None else t.float() for t in (bias, residual))
        return conv2d(x.float(), weight.float(), wide_bias, wide_residual, g, policy, relu).to(x.dtype)
    if residual is not None:
        residual = _dense(residual)
    return _kernel("conv2d")(_dense(x), weight, bias, residual, g.stride, g.padding, g.dilation, g.groups, relu)


def conv2d_relu_max_pool2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, pool: PoolGeometry, policy: Policy
) -> tuple[Tensor, Tensor]:
    return max_pool2d(conv2d(x, weight, bias, None, g, policy, relu=False), pool, relu=True)


def conv2d_input_grad(grad: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    return aten.conv2d_input_grad(_dense(grad), weight, g, policy)


def conv2d_weight_grad(grad: Tensor, x: Tensor, g: ConvGeometry, policy: Policy) -> Tensor:
    return aten.conv2d_weight_grad(_dense(grad), _dense(x), g, policy)


def conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy) -> tuple[Tensor, Tensor]:
    return aten.conv2d_backward(_dense(grad), _dense(x), weight, g, policy)


def conv2d_input_grad_relu(
    grad: Tensor, weight: Tensor, gate: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    return _masked(_dense(conv2d_input_grad(grad, weight, g, policy)), gate, with_bias)


def conv2d_backward_relu(
    grad: Tensor, x: Tensor, weight: Tensor, g: ConvGeometry, policy: Policy, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_input, grad_weight = conv2d_backward(grad, x, weight, g, policy)
    masked, bias = _masked(_dense(grad_input), x, with_bias)
    return masked, grad_weight, bias


def bias_grad(grad: Tensor) -> Tensor:
    output = grad.new_empty(grad.shape[1])
    _kernel("bias_grad")(_dense(grad), output)
    return output


def relu_backward(grad: Tensor, output: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    return _masked(_dense(grad), output, with_bias, _empty(grad, grad.shape))


def _masked(grad: Tensor, output: Tensor, with_bias: bool, masked: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """relu_backward into `masked`, or in place."""
    masked = grad if masked is None else masked
    bias = grad.new_empty(grad.shape[1]) if with_bias else None
    _kernel("relu_backward")(grad, _dense(output), masked, bias)
    return masked, bias


def max_pool2d(x: Tensor, pool: PoolGeometry, relu: bool) -> tuple[Tensor, Tensor]:
    output = _empty(x, pool.output_shape)
    code = _empty(x, pool.output_shape, pool.code_dtype)
    _kernel("max_pool2d")(_dense(x), output, code, pool.kernel_size, pool.stride, pool.padding, pool.dilation, relu)
    return output, code


def max_pool2d_backward(grad: Tensor, code: Tensor, pool: PoolGeometry, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    input_grad = _empty(grad, pool.input_shape)
    bias = grad.new_empty(pool.channels) if with_bias else None
    _kernel("max_pool2d_backward")(
        _dense(grad), _dense(code), input_grad, bias, pool.kernel_size, pool.stride, pool.padding, pool.dilation
    )
    return input_grad, bias


def avg_pool2d(x: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    output = _empty(x, pool.output_shape)
    _kernel("avg_pool2d")(
        _dense(x), output, pool.kernel_size, pool.stride, pool.padding, count_include_pad, divisor_override
    )
    return output


def avg_pool2d_backward(grad: Tensor, pool: PoolGeometry, count_include_pad: bool, divisor_override: int | None) -> Tensor:
    input_grad = _empty(grad, pool.input_shape)
    _kernel("avg_pool2d_backward")(
        _dense(grad), input_grad, pool.kernel_size, pool.stride, pool.padding, count_include_pad, divisor_override
    )
    return input_grad


def global_avg_pool2d(x: Tensor) -> Tensor:
    output = _empty(x, (*x.shape[:2], 1, 1))
    _kernel("global_avg_pool2d")(_dense(x), output)
    return output


def global_avg_pool2d_backward(grad: Tensor, height: int, width: int) -> Tensor:
    input_grad = _empty(grad, (*grad.shape[:2], height, width))
    _kernel("global_avg_pool2d_backward")(_dense(grad), input_grad)
    return input_grad


def batch_norm_relu(
    x: Tensor,
    statistics: Statistics | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Statistics]:
    x = _dense(x)
    statistics = statistics or _batch_statistics(x)
    return _normalised(x, statistics, weight, bias, residual, eps, relu=True), statistics


def batch_norm_relu_max_pool2d(
    x: Tensor,
    statistics: Statistics | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    pool: PoolGeometry,
) -> tuple[Tensor, Tensor, Statistics]:
    x = _dense(x)
    statistics = statistics or _batch_statistics(x)
    if not pool.is_2x2:
        normalised = _normalised(x, statistics, weight, bias, residual, eps, relu=False)
        return *max_pool2d(normalised, pool, relu=True), statistics
    output, code = _empty(x, pool.output_shape), _empty(x, pool.output_shape, pool.code_dtype)
    residual = None if residual is None else _dense(residual)
    _kernel("batch_norm_relu_max_pool2d")(x, *statistics, weight, bias, residual, eps, output, code)
    return output, code, statistics


def _batch_statistics(x: Tensor) -> Statistics:
    """(mean, biased variance) over (N, H, W), float32."""
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    _kernel("batch_norm_statistics")(x, mean, var)
    return mean, var


def _normalised(
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    output = _empty(x, x.shape)
    residual = None if residual is None else _dense(residual)
    _kernel("batch_norm_relu")(x, *statistics, weight, bias, residual, eps, relu, output)
    return output


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
    grad, gate = _dense(grad), _dense(gate)
    x = None if x is None else _dense(x)
    shape = grad.shape if pool is None else pool.input_shape
    sums = None if x is None else grad.new_empty((2, shape[1]), dtype=torch.float32)
    unpooled = None
    if pool is not None and (with_residual or not pool.is_2x2):
        unpooled, _ = max_pool2d_backward(grad, gate, pool, with_bias=False)
    if x is None and not with_input:
        if pool is None and with_residual:
            unpooled, _ = relu_backward(grad, gate, with_bias=False)
        return None, None, unpooled if with_residual else None
    input_grad = _empty(grad, shape) if with_input else None
    saved = (x, *statistics, weight, eps, training, sums, input_grad)
    if pool is not None and pool.is_2x2:
        _kernel("batch_norm_relu_max_pool2d_backward")(grad, gate, *saved)
    elif pool is not None:
        _kernel("batch_norm_relu_backward")(unpooled, None, *saved, None)
    else:
        unpooled = _empty(grad, shape) if with_residual else None
        _kernel("batch_norm_relu_backward")(grad, gate, *saved, unpooled)
    return input_grad, sums, unpooled if with_residual else None


def batch_norm_update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    _kernel("batch_norm_update")(running_mean, running_var, mean, var, momentum, count / (count - 1))
