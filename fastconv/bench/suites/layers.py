"""A layer: a convolution, its bias and ReLU and, where one follows, a max-pool; how it is run, and what is right.

No figure without a gate: before a layer is timed, its output and gradients are held against float64 on random data. Where
a ReLU's sign or a pool's winner is near a tie, and hangs on the order of summation, the gradient handed in is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import functional, reference
from fastconv.bench import gate
from fastconv.bench.trial import Work
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import policy

Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # (input, weight, bias) → output

_CHUNK = 2**27  # elements of a map that float64 is computed of at a time: 1 GiB


@dataclass(frozen=True)
class Layer:
    """A layer of square maps.

    Attributes:
        size: height and width of the input.
        pool: the side of the max-pool's window, whose stride is 2; 0 without one.
        padding: the convolution's; None keeps a map's size, but for its stride.
    """

    in_channels: int
    out_channels: int
    size: int
    pool: int = 0
    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    pool_padding: int = 0

    @property
    def name(self) -> str:
        tail = {0: "", 2: "+pool"}.get(self.pool, f"+pool{self.pool}")
        return f"{self.in_channels}-{self.out_channels}@{self.size} {self.kernel}x{self.kernel}/{self.stride}{tail}"

    @property
    def pads(self) -> int:
        return self.kernel // 2 if self.padding is None else self.padding

    @property
    def is_first(self) -> bool:
        """It reads images, whose gradient no training wants."""
        return self.in_channels <= 3

    def conv(self, batch: int) -> ConvGeometry:
        shape = (batch, self.in_channels, self.size, self.size)
        weight = (self.out_channels, self.in_channels, self.kernel, self.kernel)
        pairs = ((self.stride,) * 2, (self.pads,) * 2, (1, 1))
        return ConvGeometry.of("conv2d", shape, weight, (self.out_channels,), *pairs, 1)

    def pooling(self, batch: int) -> PoolGeometry | None:
        if not self.pool:
            return None
        window = ((self.pool,) * 2, (2, 2), (self.pool_padding,) * 2, (1, 1), False)
        return PoolGeometry.of("max_pool2d", self.conv(batch).output_shape, *window)

    def output_shape(self, batch: int) -> tuple[int, int, int, int]:
        pool = self.pooling(batch)
        return self.conv(batch).output_shape if pool is None else pool.output_shape

    def work(self, batch: int, direction: str, itemsize: int) -> Work:
        """The floor: operations by the definition, each operand and each result of `direction` moved once."""
        conv, pool = self.conv(batch), self.pooling(batch)
        if direction in ("input_grad", "weight_grad"):
            return Work(conv.flops(), conv.bytes_moved(itemsize))
        output = math.prod(self.output_shape(batch))
        x, weight = math.prod(conv.input_shape), math.prod(conv.weight_shape)
        # What tells where gradients go: a byte for each pooled element, or the output itself.
        winners = output if pool is not None else output * itemsize
        gradients = weight + self.out_channels + (0 if self.is_first else x + weight)
        forward = (x + weight + self.out_channels + output) * itemsize
        backward = (output + x + gradients) * itemsize + winners
        products = 1 if self.is_first else 2  # of a backward, each as large as the forward's
        return {
            "forward": Work(conv.flops(), forward),
            "backward": Work(conv.flops() * products, backward),
            "both": Work(conv.flops() * (1 + products), forward + backward + (winners if pool is not None else 0)),
        }[direction]


def run_by(module: object, layer: Layer) -> Run:
    """The layer by fastconv.functional, or where that is not the module, by stock torch as nets have it: ReLU in place."""
    if module is not functional:
        return lambda x, weight, bias: _stock(layer, x, weight, bias)
    if not layer.pool:
        plain: Callable[..., Tensor] = getattr(module, "conv2d_relu")  # noqa: B009
        return lambda x, weight, bias: plain(x, weight, bias, layer.stride, layer.pads)
    pooled: Callable[..., Tensor] = getattr(module, "conv2d_relu_max_pool2d")  # noqa: B009
    window = {"pool_kernel_size": layer.pool, "pool_stride": 2, "pool_padding": layer.pool_padding}
    return lambda x, weight, bias: pooled(x, weight, bias, layer.stride, layer.pads, **window)


def _stock(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.relu(F.conv2d(x, weight, bias, layer.stride, layer.pads), inplace=True)
    return F.max_pool2d(y, layer.pool, 2, layer.pool_padding) if layer.pool else y


def cudnn_fused(layer: Layer) -> Run:
    """cuDNN's convolution with bias and ReLU in one kernel, torch's max-pool behind it; it has no gradient."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, [layer.stride] * 2, [layer.pads] * 2, [1, 1], 1)
        return F.max_pool2d(y, layer.pool, 2, layer.pool_padding) if layer.pool else y

    return run


def both(run: Run, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of weight, bias and, behind a first layer, input."""
    output = run(x, weight, bias)
    return [output, *torch.autograd.grad(output, wanted(x, weight, bias), grad)]


def wanted(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [t for t in (weight, bias, x) if t.requires_grad]


def operands(
    layer: Layer, batch: int, dtype: torch.dtype, device: torch.device, layout: torch.memory_format = torch.channels_last
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and gradient of the output, random."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = (torch.randn(shape, device=device) * scale).to(dtype)
        return values.contiguous(memory_format=layout) if values.dim() == 4 else values

    fan_in = layer.in_channels * layer.kernel**2
    x = random(batch, layer.in_channels, layer.size, layer.size)
    weight = random(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel, scale=(2 / fan_in) ** 0.5)
    # Smaller than what it is added to: a sum that cancels would show stock torch's rounding before it.
    bias, grad = random(layer.out_channels, scale=0.5), random(*layer.output_shape(batch))
    return x.requires_grad_(not layer.is_first), weight.requires_grad_(), bias.requires_grad_(), grad


def check(run: Run, layer: Layer, held: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[str | None, float, float]:
    """(what is wrong with `both` of these operands or None, largest error, largest root mean square error of a result).

    Args:
        held: operands, the gradient without ties.
        exact: `both_exact` of them.
    """
    x, weight, bias, grad = held
    actual = both(run, x, weight, bias, grad)
    pixels = layer.conv(x.shape[0]).out_pixels
    inputs, outputs = layer.in_channels * layer.kernel**2, layer.out_channels * layer.kernel**2
    rows = zip(_NAMES, actual, exact, (inputs, pixels, pixels, outputs), strict=False)
    tf32 = policy(x.dtype, x.device.type).tf32
    largest = rms = 0.0
    for name, result, expected, reduction in rows:
        # Sums over a map may cancel: what counts is the size of as many independent terms' sum.
        scale = grad.double().square().mean().sqrt().item() * math.sqrt(pixels) if name == "bias gradient" else 0.0
        shared = layer.pool > 2 and name != "output"  # of windows that overlap, whose gradients are added up and rounded
        reason = gate.deviation(result, expected, reduction, tf32, scale, transformed=transformed(layer, x), rounded=shared)
        if reason is not None:
            return f"{name}: {reason}", math.inf, math.inf
        found = gate.errors(result, expected)
        largest, rms = max(largest, found[0]), max(rms, found[1])
    return None, largest, rms


_NAMES = ("output", "weight gradient", "bias gradient", "input gradient")


def transformed(layer: Layer, x: Tensor) -> bool:
    """Winograd's transforms may serve: ours on a CPU, cuDNN's of float32 on a GPU, whose algorithm is its choice."""
    if x.is_cuda and not policy(x.dtype, "cuda").tf32:
        return x.dtype == torch.float32 and (layer.kernel, layer.stride) == (3, 1)
    return gate.may_transform(x.device.type, (layer.kernel, layer.kernel), (layer.stride, layer.stride))


def both_exact(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """`both` in float64, by stock torch."""
    run, parts = run_by(reference, layer), []
    w, b = (t.detach().double().requires_grad_() for t in (weight, bias))
    with gate.searching(False):
        for part in _chunks(layer, x.shape[0]):
            images = x[part].detach().double().requires_grad_(x.requires_grad)
            parts.append(both(run, images, w, b, grad[part].double()))
            parts[-1][0] = parts[-1][0].detach()
    outputs, weights, biases, *inputs = zip(*parts, strict=True)
    return [torch.cat(outputs), sum(weights[1:], weights[0]), sum(biases[1:], biases[0]), *map(torch.cat, inputs)]


def untied(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operands, with a gradient of zero where rounding may turn a ReLU's sign or a pool's winner."""
    tf32 = policy(x.dtype, x.device.type).tf32
    relative, absolute, _ = gate.bounds(x.dtype, layer.in_channels * layer.kernel**2, tf32, transformed(layer, x))
    grad = grad.clone()
    with torch.no_grad(), gate.searching(False):
        parameters = weight.double(), bias.double()
        for part in _chunks(layer, x.shape[0]):
            exact = F.conv2d(x[part].double(), *parameters, layer.stride, layer.pads)
            rms = exact.square().mean().sqrt()
            if layer.pool:
                padded = F.pad(exact, (layer.pool_padding,) * 4, value=-math.inf)
                windows = padded.unfold(2, layer.pool, 2).unfold(3, layer.pool, 2).flatten(4)
                best, second = windows.topk(2).values.unbind(-1)
                gap = torch.minimum(best - second, best.abs())
            else:
                best, gap = exact, exact.abs()
            grad[part].masked_fill_(gap < 2 * (relative * best.abs() + absolute * rms), 0)
    return x, weight, bias, grad


def _chunks(layer: Layer, batch: int) -> Iterator[slice]:
    """Images whose float64 maps fit into memory together."""
    largest = max(layer.in_channels * layer.size**2, math.prod(layer.conv(1).output_shape))
    count = max(1, _CHUNK // largest)
    return (slice(start, start + count) for start in range(0, batch, count))
