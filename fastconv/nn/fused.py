"""Layers that a model keeps as modules of their own, run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastconv import functional, geometry, precision
from fastconv.nn.conv import Conv2d, FrozenConv2d, IntPair
from fastconv.nn.norm import BatchNormReLU2d, BatchNormReLUMaxPool2d, arguments, count, uses_batch
from fastconv.nn.plain import is_nothing_but
from fastconv.nn.pool import MaxPool2d

# What folding costs besides its bytes, in bytes that could be moved meanwhile. On a CPU its six small operators take as long
# as the call of the pass that they save (measured); on a GPU each is a launch of some 5 µs (arithmetic, not measured).
_FOLDING = {"cpu": 0, "cuda": 1 << 26}


class Pooling(NamedTuple):
    """A max-pool: the arguments of torch.nn.functional.max_pool2d behind the input."""

    kernel_size: IntPair
    stride: IntPair | None = None
    padding: IntPair = 0
    dilation: IntPair = 1
    ceil_mode: bool = False

    @classmethod
    def of(cls, module: torch.nn.MaxPool2d) -> Pooling:
        return cls(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)

    @property
    def is_2x2(self) -> bool:
        pair = torch.nn.modules.utils._pair
        stride = self.kernel_size if self.stride in (None, (), []) else self.stride
        settings = [pair(value) for value in (self.kernel_size, stride, self.padding, self.dilation)]
        return settings == [(2, 2), (2, 2), (0, 0), (1, 1)] and not self.ceil_mode

    def behind(self) -> dict[str, Any]:
        """As arguments of a functional with a pool at its end."""
        return {f"pool_{name}": value for name, value in self._asdict().items()}


def conv_norm_relu(
    input: Tensor,
    conv: torch.nn.Module | None = None,
    norm: torch.nn.Module | None = None,
    relu: torch.nn.Module | bool = False,
    pool: torch.nn.Module | tuple[Any, ...] | None = None,
    *,
    residual: Tensor | None = None,
    keep_dtype: bool = False,
    fold: bool = True,
) -> Tensor:
    """Convolution, batch normalisation, residual, ReLU and max-pool by as few kernels as serve them.

    What the modules compute stays theirs: where one has hooks, is patched, or was exchanged for another class since, it is
    called as it is, and what is left of the others is run together. A residual is fused where it has the shape and dtype of
    what it is added to, and added by torch where not.

    Args:
        input: (N, C, H, W).
        conv: a fastconv.nn.Conv2d or FrozenConv2d.
        norm: a torch.nn.BatchNorm2d. In evaluation mode, where nothing requires a gradient and `fold`, it is folded into
            the convolution's weight at each call if that moves fewer bytes than a pass over the output.
        relu: True, or a torch.nn.ReLU; False for none.
        pool: a torch.nn.MaxPool2d, or the arguments of torch.nn.functional.max_pool2d behind the input.
        residual: added before the ReLU.
        keep_dtype: the sum has the dtype of what the residual is added to, as of `+=`; else the two are promoted.

    Equal to:
        pool(relu(norm(conv(input)) + residual))
    """
    closing = relu is True or (relu is not False and is_nothing_but(relu, torch.nn.ReLU))
    if isinstance(pool, torch.nn.Module):
        plain = is_nothing_but(pool, torch.nn.MaxPool2d, MaxPool2d) and not pool.return_indices
        pooling = Pooling.of(cast(MaxPool2d, pool)) if plain else None
    else:
        pooling = pool if pool is None else Pooling(*pool)
    fusable = pooling if closing else None
    output = _close(input, conv, norm, closing, fusable, residual, keep_dtype, fold)
    if relu is not False and not closing:
        output = cast(Callable[[Tensor], Tensor], relu)(output)
    if pool is None or fusable is not None:
        return output
    return cast(Tensor, functional.max_pool2d(output, *pooling) if pooling is not None else cast(Any, pool)(output))


def _close(
    input: Tensor,
    conv: torch.nn.Module | None,
    norm: torch.nn.Module | None,
    relu: bool,
    pool: Pooling | None,
    residual: Tensor | None,
    keep_dtype: bool,
    fold: bool,
) -> Tensor:
    """The same with a ReLU and a pool that are nothing but that."""
    if norm is not None and is_nothing_but(norm, torch.nn.BatchNorm2d):
        norm = cast(torch.nn.BatchNorm2d, norm)
        if conv is not None:
            folded = folded_parameters(input, conv, norm, residual) if fold else None
            if folded is not None:
                return folded_conv(input, cast(Conv2d, conv), *folded, relu, pool, residual, keep_dtype)
            input = conv(input)
        if relu and input.dim() == 4 and _joins(residual, input.shape, input.dtype):
            return _norm(input, norm, pool, residual)
        return _end(norm(input), relu, pool, residual, keep_dtype)
    if norm is not None:
        return _end(norm(input if conv is None else conv(input)), relu, pool, residual, keep_dtype)
    if conv is None:
        return _end(input, relu, pool, residual, keep_dtype)
    if is_nothing_but(conv, Conv2d):
        conv = cast(Conv2d, conv)
        return folded_conv(input, conv, conv.weight, conv.bias, relu, pool, residual, keep_dtype)
    if relu and residual is None and is_nothing_but(conv, FrozenConv2d) and not conv.relu:
        pooled = pool is not None and pool.is_2x2
        return _end(cast(FrozenConv2d, conv).run(input, None, True, pooled), False, None if pooled else pool)
    return _end(conv(input), relu, pool, residual, keep_dtype)


def folded_conv(
    input: Tensor,
    conv: Conv2d,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    pool: Pooling | None,
    residual: Tensor | None = None,
    keep_dtype: bool = False,
) -> Tensor:
    """`conv` with another weight and bias, and what comes behind it."""
    padded, padding = conv._padded(input)
    layer = (padded, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
    if residual is not None:
        shape = _output_shape(padded.shape, weight.shape, conv.stride, padding, conv.dilation)
        if relu and _joins(residual, shape, precision.autocast(input).dtype):
            return _end(functional.conv2d_relu(*layer, residual=residual), False, pool)
        return _end(functional.conv2d(*layer), relu, pool, residual, keep_dtype)
    if not relu:
        return functional.conv2d(*layer)
    return functional.conv2d_relu(*layer) if pool is None else functional.conv2d_relu_max_pool2d(*layer, **pool.behind())


def _norm(input: Tensor, norm: torch.nn.BatchNorm2d, pool: Pooling | None, residual: Tensor | None) -> Tensor:
    if pool is None:
        output = functional.batch_norm_relu(*arguments(norm, input), residual=residual)
    else:
        output = functional.batch_norm_relu_max_pool2d(*arguments(norm, input), residual=residual, **pool.behind())
    count(norm)
    return output


def _end(
    input: Tensor, relu: bool, pool: Pooling | None, residual: Tensor | None = None, keep_dtype: bool = False
) -> Tensor:
    """What is left behind convolution and norm."""
    output = input if residual is None else input + residual
    if keep_dtype:
        output = output.to(input.dtype)
    if pool is None:
        return torch.relu(output) if relu else output
    return functional.relu_max_pool2d(output, *pool) if relu else cast(Tensor, functional.max_pool2d(output, *pool))


def _joins(residual: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> bool:
    if not isinstance(residual, Tensor):  # a number, as `x + x.shape[1]` adds it
        return residual is None
    return residual.shape == tuple(shape) and residual.dtype == dtype


def _output_shape(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: tuple[int, ...],
    padding: str | IntPair,
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    strides, dilations = cast(tuple[int, int], stride), cast(tuple[int, int], dilation)
    pads, extra = geometry.conv_padding("conv2d", padding, weight_shape, strides, dilations)
    *leading, height, width = input_shape
    batched = (1, 1, height + extra[0], width + extra[1])
    output = geometry.conv_output_shape(batched, weight_shape, strides, pads, dilations)
    return (*leading[:-1], *output[1:])


def folded_parameters(
    input: Tensor, conv: torch.nn.Module, norm: torch.nn.BatchNorm2d, residual: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of the convolution that does both, or None where they are to run one behind the other.

    They do where the norm uses the batch's statistics, something requires a gradient, the padding is not of zeros, or
    folding, which reads and writes the weight, moves more bytes than the pass over the output that it saves.

    Equal to:
        torch.nn.utils.fusion.fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, ...)
    Source: Jacob et al., Quantization and training of neural networks ..., arXiv:1712.05877, section 3.2.
    """
    mean, var = norm.running_mean, norm.running_var
    if uses_batch(norm) or mean is None or var is None or input.dim() != 4 or not is_nothing_but(conv, Conv2d):
        return None
    conv = cast(Conv2d, conv)
    if conv.padding_mode != "zeros":
        return None
    weight, bias = conv.weight, conv.bias
    if torch.is_grad_enabled():
        operands = (input, residual, weight, bias, norm.weight, norm.bias)
        if any(isinstance(operand, Tensor) and operand.requires_grad for operand in operands):
            return None
    if not _folding_pays(input, conv):
        return None
    scale = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = (mean if bias is None else mean - bias) * scale
    shift = -shift if norm.bias is None else norm.bias - shift
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def _folding_pays(input: Tensor, conv: Conv2d) -> bool:
    shape = _output_shape(input.shape, conv.weight.shape, conv.stride, conv.padding, conv.dilation)
    outputs = shape[0] * shape[1] * shape[2] * shape[3]
    overhead = _FOLDING.get(input.device.type, _FOLDING["cuda"])
    return outputs * input.element_size() > conv.weight.numel() * conv.weight.element_size() + overhead


def relu_and_pool(norm: torch.nn.Module) -> tuple[bool, Pooling | None]:
    """What a norm of fastconv.nn does behind normalising."""
    pool = None
    if isinstance(norm, BatchNormReLUMaxPool2d):
        settings = (norm.pool_kernel_size, norm.pool_stride, norm.pool_padding, norm.pool_dilation, norm.pool_ceil_mode)
        pool = Pooling(*settings)
    return isinstance(norm, BatchNormReLU2d), pool
