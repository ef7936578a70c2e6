"""One Function for a run of convolutions with ReLU (and max-pool), each of which feeds the next one only.

What lies between two layers then has one consumer. Its gradient is never written unmasked: the input gradient of a layer
comes with the ReLU of the layer below undone and that layer's bias gradient summed. Of the maps, each layer's input is
saved, of a pooled layer the codes; the output of a layer without a pool is the next one's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastconv.autograd.conv import Conv, conv_grads, is_weight_only, relu_backward, relu_weight_grad
from fastconv.autograd.core import ConvArgs, Grads, PoolArgs, call, ops, record, run
from fastconv.autograd.pool import unpool
from fastconv.geometry import conv_output_shape


class ChainLayer(NamedTuple):
    """relu(conv2d(input, weight, bias)), and max_pool2d of it where `pool` says how."""

    weight: Tensor
    bias: Tensor | None
    conv: ConvArgs
    pool: PoolArgs | None

    @property
    def requires_grad(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


def call_chain(input: Tensor, layers: Sequence[ChainLayer], backend: str) -> Tensor:
    """Run the layers one behind the other, as one Function where a gradient is recorded.

    Traces, torch.func and forward mode get the layers themselves (see `call`), and so do the first layers as long as
    nothing needs a gradient: every layer of the Function but its first thus hands a gradient down.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not torch.is_grad_enabled()
        or forward_ad._current_level >= 0
    ):
        first = len(layers)
    else:
        needing = (i for i, layer in enumerate(layers) if layer.requires_grad or (i == 0 and input.requires_grad))
        first = next(needing, len(layers))
    alone = layers if len(layers) - first < 2 else layers[:first]
    for layer in alone:
        input = _one(input, layer, backend)
    if len(alone) == len(layers):
        return input
    weights_and_biases = (tensor for layer in layers[first:] for tensor in layer[:2])
    specs = tuple((layer.conv, layer.pool) for layer in layers[first:])
    output: Tensor = record(ConvChain, input, specs, backend, *weights_and_biases)[-1]
    return output


def _one(input: Tensor, layer: ChainLayer, backend: str) -> Tensor:
    weight, bias, conv, pool = layer
    output: Tensor
    if pool is None:
        output = call("conv2d_relu", input, weight, bias, None, conv, backend)
    else:
        output, _ = call("conv2d_relu_max_pool2d", input, weight, bias, conv, pool, backend)
    return output


class ConvChain(torch.autograd.Function):
    """The outputs of all layers: those between are for second derivatives, whose graph runs through them.

    Args of apply: input, ((ConvArgs, PoolArgs or None) of each layer), backend, weight and bias of each layer in turn.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        specs: tuple[tuple[ConvArgs, PoolArgs | None], ...],
        backend: str,
        *weights_and_biases: Tensor | None,
    ) -> tuple[Tensor, ...]:
        need_input, _, _, *needs = ctx.needs_input_grad
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = []
        ctx.layers = []
        x, gates = input, False  # whether x is what the ReLU below masks by
        for i, (args, pool) in enumerate(specs):
            weight, bias = weights_and_biases[2 * i : 2 * i + 2]
            assert weight is not None
            code = None
            if pool is None:
                output = run(ops.conv2d_relu.default, x, weight, bias, None, args, backend)
            else:
                output, code = run(ops.conv2d_relu_max_pool2d.default, x, weight, bias, args, pool, backend)
            saved += [x if needs[2 * i] or gates else None, weight if i > 0 or need_input else None, code]
            ctx.layers.append((Conv.of(x, weight, args, backend), pool))
            outputs.append(output)
            x, gates = output, pool is None
        ctx.save_for_backward(*saved, x if gates else None)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # layers that are done give up their maps, as nodes of the graph do
        needs = ctx.needs_input_grad[3:]
        found: list[Tensor | None] = [None] * len(needs)
        output = saved.pop()
        grad: Tensor | None = None  # of the layer's output
        undone: tuple[Tensor, Tensor | None] | None = None  # the same before ReLU and pool, and its sum, where known
        for i in reversed(range(len(ctx.layers))):
            conv, pool = ctx.layers[i]
            code, weight, input = saved.pop(), saved.pop(), saved.pop()
            need_weight, need_bias = needs[2 * i : 2 * i + 2]
            if undone is None:
                grad = _sum(grad, grads[i])
                if grad is None:
                    output = input
                    continue
                if is_weight_only(input, weight):
                    gate = output if pool is None else code
                    assert gate is not None and input is not None
                    found[0], found[1] = relu_weight_grad(conv, grad, gate, input, pool, need_bias)
                    return (None, None, None, *found)
                undone = _undo(grad, output, code, conv, pool, need_bias)
            before, found[2 * i + 1] = undone
            output = grad = undone = None
            if _masks_below(ctx, i, grads):
                undone, found[2 * i] = _through_relu(conv, before, input, weight, need_weight, needs[2 * i - 1])
            else:
                grad, found[2 * i] = conv_grads(conv, before, input if need_weight else None, weight)
            del before
            output = input if i > 0 and ctx.layers[i - 1][1] is None else None
        return (grad, None, None, *found)


def _undo(
    grad: Tensor, output: Tensor | None, code: Tensor | None, conv: Conv, pool: PoolArgs | None, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient before a layer's ReLU (and pool), and its sum over (N, H, W)."""
    if pool is None:
        assert output is not None
        return relu_backward(grad, output, with_bias, conv.backend)
    assert code is not None
    unpooled_shape = conv_output_shape(conv.input_shape, conv.weight_shape, *conv.args[:3])
    return unpool(grad, code, unpooled_shape, pool, with_bias, conv.backend)


def _through_relu(
    conv: Conv, before: Tensor, input: Tensor, weight: Tensor, need_weight: bool, need_bias_below: bool
) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """The input gradient with the ReLU that made `input` undone, and its sum over (N, H, W); and the weight gradient."""
    wanted = (need_weight, need_bias_below)
    masked, grad_weight, bias = run(
        ops.conv2d_backward_relu.default, before, input, weight, *wanted, conv.args, conv.backend
    )
    return (masked, bias if need_bias_below else None), grad_weight if need_weight else None


def _masks_below(ctx: Any, i: int, grads: tuple[Tensor | None, ...]) -> bool:
    """Whether the input gradient of layer `i` goes through the ReLU below it and nowhere else."""
    if i == 0 or torch.is_grad_enabled():
        return False
    pool_below = ctx.layers[i - 1][1]
    return pool_below is None and grads[i - 1] is None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
