"""Thin autograd Functions over the operators.

Every backward computes the needed gradients only, on the backend requested in forward, and reads only what forward saved:
a layer's input and weight, its output where ReLU masks, or the one-byte code where a pool follows. While a graph of the
backward is being built (create_graph=True, torch.func), the same gradients are expressed in differentiable torch ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_input, conv2d_weight

import fastconv.ops  # noqa: F401  (defines torch.ops.fastconv)
from fastconv.geometry import conv_output_shape, memory_format

ops = torch.ops.fastconv
IntPair = tuple[int, int]
Grads = tuple[Tensor | None, ...]


class ConvArgs(NamedTuple):
    """What an operator takes between its tensors and the backend request."""

    stride: IntPair
    padding: IntPair
    dilation: IntPair
    groups: int


class PoolArgs(NamedTuple):
    kernel_size: IntPair
    stride: IntPair
    padding: IntPair
    dilation: IntPair
    ceil_mode: bool


def call(name: str, *args: Any) -> Any:
    """Run an operator by its Function's arguments, and record it where a gradient will be wanted.

    torch's own Function.apply takes 25 µs to bind default arguments, of which there are none: it is passed over where
    torch.func does not need it. A trace gets the bare operator, which is differentiable by itself (see `_register`).
    """
    if torch.compiler.is_compiling():
        return getattr(ops, name).default(*_flat(args))
    function = _FUNCTIONS[name]
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return function.forward(*args)
    return _record(function, *args)


def _record(function: type[torch.autograd.Function], *args: Any) -> Any:
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _flat(args: tuple[Any, ...]) -> list[Any]:
    """A Function's arguments as its operator's."""
    return [item for arg in args for item in (arg if isinstance(arg, (ConvArgs, PoolArgs)) else (arg,))]


def _run(op: Any, *args: Any) -> Any:
    """Call an operator from within its Function: what it does inside is not to be recorded again."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*_flat(args))


def _conv_grads(ctx: Any, grad: Tensor, input: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Input and weight gradient of a convolution whose output gradient is `grad`."""
    args: ConvArgs = ctx.conv
    need_input, need_weight = ctx.needs_input_grad[:2]
    grad_input = grad_weight = None
    if torch.is_grad_enabled():
        if need_input:
            grad_input = conv2d_input(ctx.input_shape, weight, grad, *args)
        if need_weight:
            grad_weight = conv2d_weight(input, ctx.weight_shape, grad, *args)
        return grad_input, grad_weight
    if need_input or need_weight:
        shapes = (ctx.input_shape, ctx.weight_shape, ctx.weight_channels_last)
        grad_input, grad_weight = ops.conv2d_backward.default(grad, input, weight, *shapes, *args, ctx.backend)
    return grad_input if need_input else None, grad_weight if need_weight else None


def _relu_backward(ctx: Any, grad: Tensor, output: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled():
        masked = grad.masked_fill(output <= 0, 0)
        return masked, masked.sum((0, 2, 3)) if with_bias else None
    masked, bias = ops.relu_backward.default(grad, output, with_bias, ctx.backend)
    return masked, bias if with_bias else None


def _unpool(ctx: Any, grad: Tensor, code: Tensor, shape: torch.Size, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of the map that a max-pool (after ReLU or not) has read."""
    args: PoolArgs = ctx.pool
    if torch.is_grad_enabled():
        open_grad = grad.masked_fill(code == 0, 0)
        indices = ops.max_pool2d_indices.default(code, shape, *args)
        flat = grad.new_zeros((*shape[:2], shape[2] * shape[3]))
        unpooled = flat.scatter_add(2, indices.flatten(2), open_grad.flatten(2)).view(shape)
        return unpooled, open_grad.sum((0, 2, 3)) if with_bias else None
    unpooled, bias = ops.max_pool2d_backward.default(grad, code, shape, *args, with_bias, ctx.backend)
    return unpooled, bias if with_bias else None


def _keep_conv(ctx: Any, input: Tensor, weight: Tensor, args: ConvArgs, backend: str, *more: Tensor) -> None:
    """Save what the needed gradients read: the input for the weight's, the weight for the input's, and `more`."""
    need_input, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if need_weight else None, weight if need_input else None, *more)
    ctx.input_shape, ctx.weight_shape = input.shape, weight.shape
    ctx.weight_channels_last = memory_format(weight) == torch.channels_last
    ctx.conv, ctx.backend = args, backend
    ctx.set_materialize_grads(False)


class Conv2d(torch.autograd.Function):
    """conv2d(input, weight, bias)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, args: ConvArgs, backend: str) -> Tensor:
        return _run(ops.conv2d.default, input, weight, bias, args, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, args, backend = inputs
        _keep_conv(ctx, input, weight, args, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 5
        input, weight = ctx.saved_tensors
        bias = None
        if ctx.needs_input_grad[2]:
            bias = grad.sum((0, 2, 3)) if torch.is_grad_enabled() else ops.bias_grad.default(grad, ctx.backend)
        return (*_conv_grads(ctx, grad, input, weight), bias, None, None)


class Conv2dReLU(torch.autograd.Function):
    """relu(conv2d(input, weight, bias) + residual)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, args: ConvArgs, backend: str
    ) -> Tensor:
        return _run(ops.conv2d_relu.default, input, weight, bias, residual, args, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, _, args, backend = inputs
        _keep_conv(ctx, input, weight, args, backend, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 6
        input, weight, output = ctx.saved_tensors
        masked, bias = _relu_backward(ctx, grad, output, ctx.needs_input_grad[2])
        residual = masked if ctx.needs_input_grad[3] else None
        return (*_conv_grads(ctx, masked, input, weight), bias, residual, None, None)


class Conv2dReLUMaxPool2d(torch.autograd.Function):
    """(max_pool2d(relu(conv2d(input, weight, bias))), code)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, args: ConvArgs, pool: PoolArgs, backend: str
    ) -> tuple[Tensor, Tensor]:
        return _run(ops.conv2d_relu_max_pool2d.default, input, weight, bias, args, pool, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, _, args, ctx.pool, backend = inputs
        code = output[1]
        ctx.mark_non_differentiable(code)
        _keep_conv(ctx, input, weight, args, backend, code)
        ctx.unpooled_shape = conv_output_shape(input.shape, weight.shape, *args[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 6
        input, weight, code = ctx.saved_tensors
        unpooled, bias = _unpool(ctx, grad, code, ctx.unpooled_shape, ctx.needs_input_grad[2])
        return (*_conv_grads(ctx, unpooled, input, weight), bias, None, None, None)


class MaxPool2d(torch.autograd.Function):
    """(max_pool2d(relu(input) if relu else input), code)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, args: PoolArgs, relu: bool, backend: str) -> tuple[Tensor, Tensor]:
        return _run(ops.max_pool2d.default, input, args, relu, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, ctx.pool, _, ctx.backend = inputs
        code = output[1]
        ctx.mark_non_differentiable(code)
        ctx.save_for_backward(code)
        ctx.input_shape = input.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 4
        (code,) = ctx.saved_tensors
        return _unpool(ctx, grad, code, ctx.input_shape, False)[0], None, None, None


class AvgPool2d(torch.autograd.Function):
    """avg_pool2d(input, ...)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, args: PoolArgs, count_include_pad: bool, divisor_override: int | None, backend: str
    ) -> Tensor:
        return _run(ops.avg_pool2d.default, input, args, count_include_pad, divisor_override, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.pool, ctx.count_include_pad, ctx.divisor_override, ctx.backend = inputs
        ctx.input_shape, ctx.channels_last = input.shape, memory_format(input) == torch.channels_last
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 5
        pool: PoolArgs = ctx.pool
        rule = (ctx.count_include_pad, ctx.divisor_override)
        if torch.is_grad_enabled():
            shape_only = grad.new_empty(ctx.input_shape)
            window = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
            grad_input = torch.ops.aten.avg_pool2d_backward(grad, shape_only, *window, *rule)
        else:
            grad_input = ops.avg_pool2d_backward.default(grad, ctx.input_shape, *pool, *rule, ctx.channels_last, ctx.backend)
        return grad_input, None, None, None, None


class GlobalAvgPool2d(torch.autograd.Function):
    """input.mean((2, 3), keepdim=True)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, backend: str) -> Tensor:
        return _run(ops.global_avg_pool2d.default, input, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.backend = inputs
        ctx.map_shape, ctx.channels_last = input.shape[2:], memory_format(input) == torch.channels_last
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        if grad is None:
            return (None,) * 2
        height, width = ctx.map_shape
        if torch.is_grad_enabled():
            return (grad / (height * width)).expand(-1, -1, height, width), None
        return ops.global_avg_pool2d_backward.default(grad, height, width, ctx.channels_last, ctx.backend), None


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_library = torch.library.Library("fastconv", "IMPL")


def _register(function: type[torch.autograd.Function], name: str, pack: Callable[..., tuple[Any, ...]]) -> None:
    """Make direct calls of an operator differentiable too: those of traced and exported programs.

    Args:
        pack: the operator's arguments as its Function's.
    """
    op = getattr(ops, name).default
    _FUNCTIONS[name] = function

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if wanted or forward_ad._current_level >= 0:
            with enable_single_level_autograd_function():  # of torch.func, whose transforms call this one at a time
                return _record(function, *pack(*args))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


_register(Conv2d, "conv2d", lambda x, w, b, *a: (x, w, b, ConvArgs(*a[:4]), a[4]))
_register(Conv2dReLU, "conv2d_relu", lambda x, w, b, r, *a: (x, w, b, r, ConvArgs(*a[:4]), a[4]))
_register(
    Conv2dReLUMaxPool2d,
    "conv2d_relu_max_pool2d",
    lambda x, w, b, *a: (x, w, b, ConvArgs(*a[:4]), PoolArgs(*a[4:9]), a[9]),
)
_register(MaxPool2d, "max_pool2d", lambda x, *a: (x, PoolArgs(*a[:5]), *a[5:]))
_register(AvgPool2d, "avg_pool2d", lambda x, *a: (x, PoolArgs(*a[:5]), *a[5:]))
_register(GlobalAvgPool2d, "global_avg_pool2d", lambda *a: a)
