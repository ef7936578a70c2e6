"""What convolutionize puts in place of layers and calls, and weights that load in a Linear's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from fastconv import nn as fast
from fastconv.convert.dense.edits import Convolve, Drop, Edit, Normalise2d, OverClasses, Spread, Window


def dilated_avg_pool2d(input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Average pool whose window takes every `dilation`-th element.

    Shapes:
        input [N, C, H, W]; output [N, C, OH, OW] with OH = (H - dilation · (kernel - 1) - 1) // stride + 1.

    Equal to:
        F.unfold(input, kernel_size, dilation, 0, stride).view(N, C, KH * KW, OH, OW).mean(2)
    """
    channels = input.shape[1]
    # Ones, not 1 / count: a sum has one rounding, in the accumulator's precision.
    ones = input.new_ones((channels, 1, *kernel_size))
    total = F.conv2d(input, ones, None, tuple(stride), 0, tuple(dilation), channels)
    return total / (kernel_size[0] * kernel_size[1])


class DilatedAvgPool2d(nn.Module):
    """`dilated_avg_pool2d` as a module."""

    def __init__(self, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def forward(self, input: Tensor) -> Tensor:
        return dilated_avg_pool2d(input, self.kernel_size, self.stride, self.dilation)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


def layer(old: nn.Module, edit: Edit) -> nn.Module:
    """The module for `old`'s place; `old` itself, changed, where only its settings are others."""
    if isinstance(edit, Spread):
        return _spread(old, edit)
    return _layer(old, edit).train(old.training)


def _layer(old: Any, edit: Convolve | Normalise2d | OverClasses | Drop | Window) -> nn.Module:
    if isinstance(edit, Convolve):
        return _convolution(old, edit)
    if isinstance(edit, Normalise2d):
        return _norm(old)
    if isinstance(edit, OverClasses):
        return type(old)(dim=1)
    if isinstance(edit, Drop) or edit.is_identity:
        return nn.Identity()
    return _pool(old, edit)


def _convolution(linear: nn.Linear, edit: Convolve) -> nn.Conv2d:
    channels, kernel = edit.size[0], edit.size[1:]
    made = nn.Conv2d(channels, linear.out_features, kernel, dilation=edit.dilation, bias=False, device="meta")
    weight = linear.weight.detach().reshape(made.weight.shape)  # a view where the weight is contiguous
    made.weight = nn.Parameter(weight, linear.weight.requires_grad)
    made.bias = linear.bias
    return made


def _norm(old: nn.BatchNorm1d) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, device="meta")
    made._parameters, made._buffers = old._parameters, old._buffers
    return made


def _pool(old: nn.Module, edit: Window) -> nn.Module:
    kernel, stride, padding = edit.kernel_size, edit.stride, edit.padding
    ours = type(old).__module__.startswith("fastconv.")
    if edit.kind == "max":
        return (fast if ours else nn).MaxPool2d(kernel, stride, padding, edit.dilation, False, edit.ceil_mode)
    if edit.dilation != (1, 1) and kernel != (1, 1):
        return DilatedAvgPool2d(kernel, stride, edit.dilation)
    return (fast if ours else nn).AvgPool2d(kernel, stride, padding, edit.ceil_mode)


def _spread(old: Any, edit: Spread) -> nn.Module:
    """Dilation and padding of a convolution, alone or in a fused layer, and of the pool in that."""
    (fh, fw), pooled = edit.factor, hasattr(old, "pool_stride")
    if isinstance(old, nn.Conv2d):
        old.dilation = (old.dilation[0] * fh, old.dilation[1] * fw)
        if not isinstance(old.padding, str):
            old.padding = (old.padding[0] * fh, old.padding[1] * fw)
            old._reversed_padding_repeated_twice = [old.padding[1], old.padding[1], old.padding[0], old.padding[0]]
    if pooled:
        dilation = _pair(old.pool_dilation)
        old.pool_dilation = (dilation[0] * fh, dilation[1] * fw)
        if edit.unstrided:
            old.pool_stride = (1, 1)
    return old


def rewrite_call(graph: fx.Graph, node: fx.Node, edit: Edit, owner: nn.Module) -> None:
    """Replace one call in the forward of `owner`, which `graph` is."""
    source: Any = node.args[0] if node.args else node.kwargs["input"]
    with graph.inserting_before(node):
        if isinstance(edit, OverClasses):
            log = "log" in (
                type(owner.get_submodule(str(node.target))).__name__ if node.op == "call_module" else str(node.target)
            )
            source = graph.call_function(F.log_softmax if log else F.softmax, (source,), _softmax_arguments(node))
        elif isinstance(edit, Window) and not edit.is_identity:
            source = _pool_call(graph, source, edit)
    node.replace_all_uses_with(source)
    _erase(graph, node)


def _softmax_arguments(node: fx.Node) -> dict[str, Any]:
    dtype = node.kwargs.get("dtype")
    return {"dim": 1} if dtype is None else {"dim": 1, "dtype": dtype}


def _pool_call(graph: fx.Graph, source: fx.Node, edit: Window) -> fx.Node:
    arguments = (source, edit.kernel_size, edit.stride)
    if edit.kind == "max":
        return graph.call_function(F.max_pool2d, (*arguments, edit.padding, edit.dilation, edit.ceil_mode))
    if edit.dilation != (1, 1) and edit.kernel_size != (1, 1):
        return graph.call_function(dilated_avg_pool2d, (*arguments, edit.dilation))
    return graph.call_function(F.avg_pool2d, (*arguments, edit.padding, edit.ceil_mode))


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Take out a call without users, and the sizes that only it read."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for n in inputs:
        sizes = n.target in ("size", "dim", getattr) or getattr(n.target, "__module__", "") == "_operator"
        if not n.users and sizes and n.op in ("call_function", "call_method"):
            _erase(graph, n)


def average_outputs(graph: fx.Graph) -> None:
    """Append the mean over H and W to each output."""
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        means = {node: graph.call_method("mean", (node, (2, 3))) for node in output.all_input_nodes}
    output.args = (fx.map_arg(output.args[0], lambda node: means[node]),)


class LoadLinear:
    """A hook before load_state_dict that shapes weights of Linears, (O, C · H · W), as those of convolutions, (O, C, H, W).

    Args:
        shapes: of the convolutions' weights, by key.
    """

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.shapes = shapes

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key, shape in self.shapes.items():
            value = state_dict.get(prefix + key)
            if isinstance(value, Tensor) and value.shape == (shape[0], shape[1:].numel()):
                state_dict[prefix + key] = value.reshape(shape)
