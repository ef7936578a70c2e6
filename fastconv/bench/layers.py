"""A layer and how it is run, checked and timed; a short timing of the recipe net's: `python -m fastconv.bench.layers`.

No figure without a gate: before a layer is timed, its output and gradients are held against float64 on random data. Where
a ReLU's sign or a pool's winner is near a tie, and hangs on the order of summation, the gradient handed in is zero.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import functional, reference
from fastconv.bench import gate
from fastconv.bench.timing import compare, ratio, seconds, times
from fastconv.geometry import PoolGeometry, conv_output_shape
from fastconv.precision import policy


@dataclass(frozen=True)
class Layer:
    """One 3×3 (or 7×7 stride-2) layer of the recipe net: `size` is the height and width of its input."""

    in_channels: int
    out_channels: int
    size: int
    pool: bool
    kernel: int = 3
    stride: int = 1

    @property
    def name(self) -> str:
        tail = "+pool" if self.pool else ""
        return f"{self.in_channels}-{self.out_channels}@{self.size} {self.kernel}x{self.kernel}/{self.stride}{tail}"


LAYERS = (
    Layer(3, 64, 224, pool=True, kernel=7, stride=2),
    Layer(64, 64, 56, pool=False),
    Layer(64, 64, 56, pool=True),
    Layer(128, 128, 28, pool=True),
    Layer(256, 256, 14, pool=True),
    Layer(512, 512, 7, pool=False),
    Layer(3, 64, 32, pool=False),
)


def forward(module: object, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer by fastconv.functional or by fastconv.reference."""
    op: Callable[..., Tensor] = getattr(module, "conv2d_relu_max_pool2d" if layer.pool else "conv2d_relu")
    return op(x, weight, bias, layer.stride, layer.kernel // 2)


def both(module: object, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of weight, bias and, behind a first layer, input."""
    output = forward(module, layer, x, weight, bias)
    wanted = [t for t in (weight, bias, x) if t.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, grad)]


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
    bias = random(layer.out_channels)
    shape = unpooled_shape(layer, batch)
    if layer.pool:
        shape = PoolGeometry.of("max_pool2d", shape, (2, 2), (2, 2), (0, 0), (1, 1), False).output_shape
    return x.requires_grad_(layer.in_channels > 3), weight.requires_grad_(), bias.requires_grad_(), random(*shape)


def unpooled_shape(layer: Layer, batch: int) -> tuple[int, ...]:
    x, weight = (batch, layer.in_channels, layer.size, layer.size), (layer.out_channels, layer.in_channels)
    stride, padding = (layer.stride, layer.stride), (layer.kernel // 2, layer.kernel // 2)
    return conv_output_shape(x, (*weight, layer.kernel, layer.kernel), stride, padding, (1, 1))


def check(module: object, layer: Layer, held: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[str | None, float, float]:
    """(what is wrong with `both` of these operands or None, largest error, largest root mean square error of a result).

    Args:
        held: operands, the gradient without ties.
        exact: `both_exact` of them.
    """
    x, _, _, grad = held
    actual = both(module, layer, *held)
    pixels = math.prod(unpooled_shape(layer, x.shape[0])) // layer.out_channels
    inputs, outputs = layer.in_channels * layer.kernel**2, layer.out_channels * layer.kernel**2
    rows = zip(_NAMES, actual, exact, (inputs, pixels, pixels, outputs), strict=False)
    tf32 = policy(x.dtype, x.device.type).tf32
    largest = rms = 0.0
    for name, result, wanted, reduction in rows:
        # Sums over a map may cancel: what counts is the size of as many independent terms' sum.
        scale = grad.double().square().mean().sqrt().item() * math.sqrt(pixels) if name == "bias gradient" else 0.0
        reason = gate.deviation(result, wanted, reduction, tf32, scale, transformed=transformed(layer, x))
        if reason is not None:
            return f"{name}: {reason}", math.inf, math.inf
        found = gate.errors(result, wanted)
        largest, rms = max(largest, found[0]), max(rms, found[1])
    return None, largest, rms


_NAMES = ("output", "weight gradient", "bias gradient", "input gradient")


def transformed(layer: Layer, x: Tensor) -> bool:
    return gate.may_transform(x.device.type, (layer.kernel, layer.kernel), (layer.stride, layer.stride))


def both_exact(layer: Layer, *tensors: Tensor) -> list[Tensor]:
    """`both` in float64, by stock torch."""
    return both(reference, layer, *(t.detach().double().requires_grad_(t.requires_grad) for t in tensors))


def untied(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The operands, with a gradient of zero where rounding may turn a ReLU's sign or a pool's winner."""
    with torch.no_grad():
        exact = F.conv2d(x.double(), weight.double(), bias.double(), layer.stride, layer.kernel // 2)
        tf32 = policy(x.dtype, x.device.type).tf32
        relative, absolute, _ = gate.bounds(x.dtype, layer.in_channels * layer.kernel**2, tf32, transformed(layer, x))
        rms = exact.square().mean().sqrt()
        if layer.pool:
            windows = exact.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
            best, second = windows.topk(2).values.unbind(-1)
            gap = torch.minimum(best - second, best.abs())
        else:
            best, gap = exact, exact.abs()
        grad = grad.masked_fill(gap < 2 * (relative * best.abs() + absolute * rms), 0)
    return x, weight, bias, grad


def run(device: torch.device, dtype: torch.dtype, batch: int, most_seconds: float) -> list[dict[str, object]]:
    """Time forward and backward together of every layer, fastconv against torch.

    Returns:
        A record per layer: name, seconds of both (median, 20% and 80% quantiles), their paired ratio, or the error of
        a layer that failed its gate and was not timed.
    """
    records: list[dict[str, object]] = []
    for layer in LAYERS:
        record: dict[str, object] = {"layer": layer.name, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
        given = operands(layer, batch, dtype, device)
        held = untied(layer, *given)
        wrong = check(functional, layer, held, both_exact(layer, *held))[0]
        if wrong is not None:
            records.append({**record, "error": wrong})
            print(f"{layer.name:<28} WRONG: {wrong}")
            continue
        timings = compare(
            {
                "fastconv": lambda layer=layer, given=given: both(functional, layer, *given),  # type: ignore[misc]
                "torch": lambda layer=layer, given=given: both(reference, layer, *given),  # type: ignore[misc]
            },
            device=device,
            most_seconds=most_seconds,
        )
        gain = ratio(timings["torch"], timings["fastconv"])
        for name, timing in {**timings, "ratio": gain}.items():
            record[name] = {"median": timing.median, "q20": timing.q20, "q80": timing.q80, "runs": len(timing.runs)}
        records.append(record)
        print(f"{layer.name:<28} {seconds(timings['fastconv']):<26} {seconds(timings['torch']):<26} {times(gain)}")
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    option = parser.add_argument
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    option("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default: bfloat16 on a GPU")
    option("--batch", type=int, default=None, help="default: 32 on a GPU, 2 on a CPU")
    option("--seconds", type=float, default=2.0, help="most seconds of timed calls a layer")
    option("--out", type=Path, default=None, help="a JSON file to write the records to")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    machine = torch.cuda.get_device_name(device) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    torch.manual_seed(0)
    print(f"{machine}; torch {torch.__version__}; forward + backward: fastconv, torch, torch / fastconv")
    records = run(device, dtype, options.batch or (32 if on_gpu else 2), options.seconds)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine, "torch": torch.__version__, "layers": records}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if any("error" in record for record in records) else 0


if __name__ == "__main__":
    raise SystemExit(main())
