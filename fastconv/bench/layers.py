"""A short timing of the recipe net's layers against stock torch: `python -m fastconv.bench.layers`.

No figure without a gate: before a layer is timed, its output and gradients are held against float64 on small integers.
Their sums are exact in float32, so that no sign of a ReLU and no winner of a pool hangs on the order of summation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastconv import functional, reference
from fastconv.bench.timing import compare, ratio, seconds, times
from fastconv.geometry import PoolGeometry, conv_output_shape

_SLACK = 4.0  # of a rounding of the output, or of torch's own error


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


def _step(module: object, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of weight, bias and, behind a first layer, input."""
    op: Callable[..., Tensor] = getattr(module, "conv2d_relu_max_pool2d" if layer.pool else "conv2d_relu")
    output = op(x, weight, bias, layer.stride, layer.kernel // 2)
    wanted = [t for t in (weight, bias, x) if t.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, grad)]


def _operands(
    layer: Layer, batch: int, dtype: torch.dtype, device: torch.device, *, integers: bool = False
) -> tuple[Tensor, ...]:
    """Input, weight, bias and output gradient, channels_last: normal, or whole numbers from -2 to 2."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randint(-2, 3, shape, device=device) if integers else torch.randn(shape, device=device) * scale
        values = values.to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values

    fan_in = layer.in_channels * layer.kernel**2
    x = random(batch, layer.in_channels, layer.size, layer.size)
    weight = random(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel, scale=(2 / fan_in) ** 0.5)
    bias = random(layer.out_channels)
    two, one, zero = (2, 2), (1, 1), (0, 0)
    stride, padding = (layer.stride, layer.stride), (layer.kernel // 2, layer.kernel // 2)
    shape = conv_output_shape(x.shape, weight.shape, stride, padding, one)
    if layer.pool:
        shape = PoolGeometry.of("max_pool2d", shape, two, two, zero, one, False).output_shape
    grad = random(*shape)
    return x.requires_grad_(layer.in_channels > 3), weight.requires_grad_(), bias.requires_grad_(), grad


def _gate(layer: Layer, operands: tuple[Tensor, ...]) -> str | None:
    """None where every result is within a few roundings of float64's, or of torch's distance from it; else which is not."""
    exact = _step(reference, layer, *(t.detach().double().requires_grad_(t.requires_grad) for t in operands))
    names = ("output", "weight gradient", "bias gradient", "input gradient")
    rows = zip(names, _step(functional, layer, *operands), _step(reference, layer, *operands), exact, strict=False)
    for name, ours, theirs, wanted in rows:
        error, allowed = (((t.double() - wanted).norm() / wanted.norm()).item() for t in (ours, theirs))
        limit = _SLACK * max(allowed, torch.finfo(ours.dtype).eps)
        if not error <= limit:
            return f"{name}: relative error {error:.2e}, allowed {limit:.2e}"
    return None


def run(device: torch.device, dtype: torch.dtype, batch: int, most_seconds: float) -> list[dict[str, object]]:
    """Time forward and backward together of every layer, fastconv against torch.

    Returns:
        A record per layer: name, seconds of both (median, 20% and 80% quantiles), their paired ratio, or the error of
        a layer that failed its gate and was not timed.
    """
    records: list[dict[str, object]] = []
    for layer in LAYERS:
        record: dict[str, object] = {"layer": layer.name, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
        wrong = _gate(layer, _operands(layer, batch, dtype, device, integers=True))
        if wrong is not None:
            records.append({**record, "error": wrong})
            print(f"{layer.name:<28} WRONG: {wrong}")
            continue
        operands = _operands(layer, batch, dtype, device)
        timings = compare(
            {
                "fastconv": lambda layer=layer, operands=operands: _step(functional, layer, *operands),  # type: ignore[misc]
                "torch": lambda layer=layer, operands=operands: _step(reference, layer, *operands),  # type: ignore[misc]
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
