"""The calls whose kernels are compiled ahead of time: every candidate for representative layers, and every other launcher.

Kernels that tuning lists among the candidates of a convolution are found by themselves, at the layers of LAYERS and with
the arithmetic of POLICIES. A launcher that is no convolution's is called in `_passes`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastconv.backends import triton
from fastconv.backends.triton_launch import Launch, recording
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import Candidate
from fastconv.tuning.candidates import triton_candidates

_BATCH = 32


class Layer(NamedTuple):
    """A convolution of `size` × `size` maps, padded to keep them; with `pool` a 2×2 max-pool follows."""

    in_channels: int
    out_channels: int
    size: int
    pool: bool = False
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    residual: bool = False

    @property
    def name(self) -> str:
        tail = f" dilation {self.dilation}" * (self.dilation > 1) + f" groups {self.groups}" * (self.groups > 1)
        tail += " residual" * self.residual
        stride = f"/{self.stride}" * (self.stride > 1)
        return f"{self.in_channels}-{self.out_channels}@{self.size} {self.kernel}x{self.kernel}{stride}{tail}"

    @property
    def geometry(self) -> ConvGeometry:
        k, s, d = ((side, side) for side in (self.kernel, self.stride, self.dilation))
        p = (self.kernel // 2 * self.dilation,) * 2
        x = (_BATCH, self.in_channels, self.size, self.size)
        return ConvGeometry.of(
            "inspect", x, (self.out_channels, self.in_channels // self.groups, *k), None, s, p, d, self.groups
        )


RECIPE_32 = (
    Layer(3, 64, 32),
    Layer(64, 64, 32, pool=True),
    Layer(64, 128, 16),
    Layer(128, 128, 16, pool=True),
    Layer(128, 256, 8),
    Layer(256, 256, 8, pool=True),
    Layer(256, 512, 4),
    Layer(512, 512, 4),
)
RECIPE_224 = (
    Layer(3, 64, 224, pool=True, kernel=7, stride=2),
    Layer(64, 64, 56, pool=True),
    Layer(64, 128, 28),
    Layer(128, 128, 28, pool=True),
    Layer(128, 256, 14),
    Layer(256, 256, 14, pool=True),
    Layer(256, 512, 7),
    Layer(512, 512, 7),
)
VGG16 = (
    Layer(3, 64, 224),
    Layer(64, 64, 224, pool=True),
    Layer(64, 128, 112),
    Layer(128, 128, 112, pool=True),
    Layer(128, 256, 56),
    Layer(256, 256, 56, pool=True),
    Layer(256, 512, 28),
    Layer(512, 512, 28, pool=True),
    Layer(512, 512, 14, pool=True),
)
OTHERS = (
    Layer(64, 64, 56, stride=2),
    Layer(64, 128, 56, kernel=1, stride=2),
    Layer(128, 128, 28, dilation=2),
    Layer(128, 128, 28, residual=True),
    Layer(128, 128, 28, groups=4),
    Layer(256, 256, 14, groups=32),
    Layer(96, 96, 28, groups=96),
    Layer(21, 35, 9, pool=True),
    Layer(16, 24, 28),
)
# Other arithmetic changes operands and products, not the shapes of tiles: a few layers show it.
FEW = (Layer(128, 128, 28, pool=True), Layer(3, 64, 32))
POLICIES: tuple[tuple[Policy, tuple[Layer, ...]], ...] = (
    (Policy(torch.bfloat16), (*RECIPE_32, *RECIPE_224, *VGG16, *OTHERS)),
    (Policy(torch.float16), FEW),
    (Policy(torch.float32), FEW),
    (Policy(torch.float32, tf32=True), FEW),
)


class Call(NamedTuple):
    """A call of a launcher.

    Attributes:
        name: layer and direction.
        dtype: 'bfloat16', 'float16', 'float32' or 'tf32'.
        direction: 'forward', 'input_grad' or 'weight_grad' of a convolution; '' of a pass.
        family: of the kernels, as in tuning's candidates; '' where there is only one.
        groups: of the convolution.
        channels: of a group: the fewer of its inputs and outputs.
        run: calls the launcher with tensors on the meta device.
    """

    name: str
    dtype: str
    direction: str
    family: str
    groups: int
    channels: int
    run: Callable[[], object]


class Recorded(NamedTuple):
    call: Call
    launch: Launch


def record(capability: int) -> list[Recorded]:
    """What the launchers launch on a chip of that compute capability, every call of this file once."""
    found: list[Recorded] = []
    with recording(capability) as launches:
        for call in _calls(f"sm_{capability}"):
            launches.clear()
            call.run()
            found += [Recorded(call, launch) for launch in launches]
    return found


def _calls(chip: str) -> Iterator[Call]:
    for policy, layers in POLICIES:
        for layer in layers:
            yield from _convolution(layer, policy, chip)
    whole, odd = (_BATCH, 64, 56, 56), (2, 21, 9, 9)
    for shape, dtype in ((whole, torch.bfloat16), (odd, torch.bfloat16), (whole, torch.float32)):
        for name, run in _passes(shape, dtype):
            yield Call(f"{name} {shape[1]}@{shape[2]}", _dtype_name(Policy(dtype)), "", "", 1, shape[1], run)


def _convolution(layer: Layer, policy: Policy, chip: str) -> Iterator[Call]:
    g = layer.geometry
    x, weight, grad = (_map(shape, policy.dtype) for shape in (g.input_shape, g.weight_shape, g.output_shape))
    bias = torch.empty(layer.out_channels, dtype=policy.dtype, device="meta")
    pool = PoolGeometry.of("inspect", g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), False)
    residual = grad if layer.residual else None

    def forward(plan: Candidate) -> object:
        return triton.conv2d(x, weight, bias, residual, g, policy, relu=True, plan=plan)

    def pooled(plan: Candidate) -> object:
        return triton.conv2d_relu_max_pool2d(x, weight, bias, g, pool, policy, plan=plan)

    def input_grad(plan: Candidate) -> object:
        return triton.conv2d_input_grad(grad, weight, g, policy, plan=plan)

    def weight_grad(plan: Candidate) -> object:
        return triton.conv2d_weight_grad(grad, x, g, policy, plan=plan)

    def masked_input_grad(plan: Candidate) -> object:
        return triton.conv2d_input_grad_relu(grad, weight, x, g, policy, with_bias=True, plan=plan)

    launchers: list[tuple[str, str, Callable[[Candidate], object]]] = [("forward", "conv2d_relu", forward)]
    launchers += [("pooled forward", "conv2d_relu_max_pool2d", pooled)] if layer.pool else []
    if layer.in_channels > 3:  # not wanted of a first layer
        launchers += [("input_grad", "conv2d", input_grad), ("masked input_grad", "conv2d_relu", masked_input_grad)]
    launchers += [("weight_grad", "conv2d", weight_grad)]
    channels = min(g.group_in_channels, g.group_out_channels)
    for name, op, launcher in launchers:
        direction = name.split()[-1]
        for plan in triton_candidates(op, direction, g, policy, chip):
            what = (f"{layer.name} {name}", _dtype_name(policy), direction, plan.kernel, g.groups, channels)
            yield Call(*what, lambda launcher=launcher, plan=plan: launcher(plan))  # type: ignore[misc]


def _passes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    x = _map(shape, dtype)
    for size, padding in ((3, 1), (2, 0)):
        pool = PoolGeometry.of("inspect", shape, (size, size), (2, 2), (padding, padding), (1, 1), False)
        grad, code = _map(pool.output_shape, dtype), _map(pool.output_shape, pool.code_dtype)
        yield f"max_pool {size}x{size}", lambda pool=pool: triton.max_pool2d(x, pool, relu=True)  # type: ignore[misc]
        yield (
            f"max_pool_backward {size}x{size}",
            lambda grad=grad, code=code, pool=pool: triton.max_pool2d_backward(grad, code, pool, with_bias=True),  # type: ignore[misc]
        )
    yield "bias_grad", lambda: triton.bias_grad(x)
    yield "relu_backward", lambda: triton.relu_backward(x, x, with_bias=True)
    yield "avg_pool", lambda: triton.avg_pool2d(x, pool, True, None)
    yield "avg_pool_backward", lambda: triton.avg_pool2d_backward(grad, pool, True, None)
    yield "global_avg_pool", lambda: triton.global_avg_pool2d(x)
    pooled = _map((*shape[:2], 1, 1), dtype)
    yield "global_avg_pool_backward", lambda: triton.global_avg_pool2d_backward(pooled, *shape[2:])
    yield from _norms(x)


def _norms(x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Batch normalisation in training with a residual, and by running statistics without one; with and without a pool."""
    mean, var, weight = (torch.empty(x.shape[1], device="meta") for _ in range(3))
    pool = PoolGeometry.of("inspect", x.shape, (2, 2), (2, 2), (0, 0), (1, 1), False)
    pooled, code = _map(pool.output_shape, x.dtype), _map(pool.output_shape, pool.code_dtype)
    for training in (True, False):
        name = "batch_norm" if training else "batch_norm by running statistics"
        given, residual = (None, x) if training else ((mean, var), None)
        operands: tuple[Any, ...] = (x, given, weight, weight, residual, 1e-5)
        saved: tuple[Any, ...] = (x if training else None, (mean, var), weight, 1e-5, training)
        passes: tuple[tuple[str, Callable[..., object], tuple[Any, ...]], ...] = (
            ("", triton.batch_norm_relu, operands),
            (" 2x2", triton.batch_norm_relu_max_pool2d, (*operands, pool)),
            (" backward", triton.batch_norm_relu_backward, (x, x, *saved, None, True, training)),
            (" 2x2 backward", triton.batch_norm_relu_backward, (pooled, code, *saved, pool, True, training)),
        )
        for tail, launcher, arguments in passes:
            yield name + tail, functools.partial(launcher, *arguments)
    yield "batch_norm update", lambda: triton.batch_norm_update(mean, var, mean, var, 64, 0.1)


def _map(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _dtype_name(policy: Policy) -> str:
    return "tf32" if policy.tf32 else str(policy.dtype).removeprefix("torch.")
