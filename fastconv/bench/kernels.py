"""What runs on a GPU: a call's kernels by torch's profiler; `python -m fastconv.bench.kernels`, those of training steps.

On a CPU operators stand in for kernels, with their own time. These are times under a profiler, of one call: they say where
the time of a call goes. How long it takes is for `fastconv.bench.timing` to say.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from fastconv import models
from fastconv.models.layers import LAYERS

_COPIES = ("Memcpy", "Memset", "Activity Buffer")  # how CUPTI's names of what is no kernel begin
NAME_WIDTH = 100  # of a kernel's name: C++ writes all arguments of a template into it


@dataclass(frozen=True)
class Kernel:
    """A kernel (on a GPU a copy or a filling of memory too), how often a call ran it, and microseconds of all these runs."""

    name: str
    count: int
    microseconds: float


def launches(call: Callable[[], object], device: torch.device | str = "cuda") -> list[Kernel]:
    """What one call runs on `device`, the most time first. It is called once before, for what happens only once.

    Raises:
        RuntimeError: nothing was seen on a GPU: the driver may keep its profiling interface to administrators.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = summed(profiler.events() or (), on_gpu)
    if on_gpu and not found:
        raise RuntimeError("torch's profiler saw no kernel on the GPU; it needs CUPTI, and a driver that lets users profile")
    return found


def summed(events: Iterable[FunctionEvent], on_gpu: bool) -> list[Kernel]:
    """A profile's events by name; on a GPU without the ranges that programs mark, which lie over kernels."""
    counts: dict[str, list[float]] = {}
    for event in events:
        if on_gpu:
            if event.device_type != DeviceType.CUDA or event.is_user_annotation:
                continue
            microseconds = event.time_range.elapsed_us()
        else:
            microseconds = event.self_cpu_time_total
        counts.setdefault(event.name, []).append(microseconds)
    kernels = [Kernel(name, len(times), sum(times)) for name, times in counts.items()]
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def count_launches(call: Callable[[], object], device: torch.device | str = "cuda") -> int | None:
    """Kernels that a call starts on a GPU, copies and fillings of memory not counted; None on a CPU, or if none was seen."""
    if torch.device(device).type != "cuda":
        return None
    try:
        found = launches(call, device)
    except RuntimeError:  # a driver that keeps its profiling interface to itself
        return None
    return sum(kernel.count for kernel in found if not kernel.name.startswith(_COPIES))


def training_step(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and an update by SGD with momentum, with labels that are drawn once."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    labels = torch.randint(0, model(images).shape[1], (len(images),), device=images.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()

    return step


def table(kernels: list[Kernel], most: int) -> str:
    """The first `most` of them as lines, the others together, and the sum."""
    total = sum(kernel.microseconds for kernel in kernels) or 1.0
    rows = kernels[:most]
    if rest := kernels[most:]:
        rows = [*rows, Kernel("others", sum(k.count for k in rest), sum(k.microseconds for k in rest))]
    rows = [*rows, Kernel("all", sum(k.count for k in kernels), sum(k.microseconds for k in kernels))]
    return "\n".join(
        f"{k.microseconds:>10.0f} µs {k.microseconds / total:>4.0%} {k.count:>4}× {k.name[:NAME_WIDTH]}" for k in rows
    )


def net_step(options: argparse.Namespace, layers: str) -> Callable[[], None]:
    """A training step of the net, batch, size, dtype and device of `options` on these layers, in channels_last."""
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = models.build(options.model, resolution=size(options), layers=layers)
    model = model.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(shape(options), device=device, dtype=dtype)
    return training_step(model, images.contiguous(memory_format=torch.channels_last))


def size(options: argparse.Namespace) -> int:
    """Height and width of the images."""
    return models.registry.resolution_for(options.model, 224) if options.size is None else int(options.size)


def shape(options: argparse.Namespace) -> tuple[int, int, int, int]:
    """A batch's."""
    return options.batch, models.native(options.model).channels, size(options), size(options)


def title(options: argparse.Namespace, layers: str) -> str:
    """What the table below it is of."""
    name = f"{options.model} R={size(options)} batch {options.batch} {options.dtype}"
    return f"{name}, a training step on {layers}'s layers, channels_last"


def parser(description: str) -> argparse.ArgumentParser:
    """Of the options that `net_step` and `title` read."""
    parser = argparse.ArgumentParser(description=description)
    option = parser.add_argument
    option("--model", choices=models.list(), default="recipe")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    option("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of parameters and images")
    option("--batch", type=int, default=32)
    option("--size", type=int, help="height and width of the images (default: 224, or what the net takes)")
    option("--most", type=int, default=25, help="lines of a table (default: 25)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser("Kernels of one training step, on fastconv's layers and on torch's.").parse_args(arguments)
    for layers in LAYERS:
        found = launches(net_step(options, layers), options.device)
        print(f"{title(options, layers)}\n{table(found, options.most)}\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
