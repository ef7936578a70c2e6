"""`fastconv tune`: measure which backend and kernel is the fastest for a model's layers, and keep it in a table."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import fastconv
from fastconv import backends, models
from fastconv.bench import ahead, timing, tune
from fastconv.cli import arguments
from fastconv.tuning import Call, tables

_DTYPES = ("float32", "bfloat16", "float16")


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="measure the fastest backend and kernel for a model's layers",
        description=(
            "Run one training step of a model, measure every candidate for each of its calls (each held against float64 "
            "first), and write the winners to a table, which later processes on the same chip read. Nothing is ever "
            "searched outside of this command."
        ),
    )
    option = parser.add_argument
    option(
        "--model",
        type=arguments.model_name,
        default="recipe",
        metavar="NAME",
        help=f"{arguments.MODELS}, which returns a torch.nn.Module (default: recipe)",
    )
    option(
        "--input",
        type=_shape,
        metavar="NxCxHxW",
        help=(
            "shape of a batch (default: 32x3x224x224 on a GPU, 8x3x32x32 on a CPU, with other channels and sizes where the "
            "net needs them)"
        ),
    )
    option("--dtype", choices=_DTYPES, help="the 16-bit ones by autocast (default: bfloat16 on a GPU, float32 on a CPU)")
    option("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ... (default: auto)")
    option("--out", type=Path, help="the table to write (default: this chip's in the user's cache directory, which is read)")
    option("--budget", type=_seconds, default=60.0, help="seconds of timed runs in all (default: 60)")
    option("--resume", action="store_true", help="leave out calls that the table has from these very sources and versions")
    option(
        "--seconds",
        type=_seconds,
        default=math.inf,
        help="begin no call when so many seconds have passed, compiling included; status 3 if some are left",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Observe a step, measure its calls, print each winner."""
    start = time.monotonic()
    device = torch.device(arguments.device(options.device))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {options.device}: allowed: auto, cpu, cuda, cuda:1, ...")
    on_gpu = device.type == "cuda"
    shape = options.input or _default_shape(options.model, *((32, 224) if on_gpu else (8, 32)))
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    chip = backends.chip(device.type, device.index)
    path = options.out or tables.user_file(chip)
    print(f"{chip}; torch {torch.__version__}; {options.model}, {'x'.join(map(str, shape))}, {dtype}")
    calls = _observe(options.model, shape, dtype, device)
    if options.resume:
        known = calls.keys() & tune.measured(path, chip)
        print(f"{len(known)} of {len(calls)} calls were measured before: {path}")
        calls = Counter({call: count for call, count in calls.items() if call not in known})
        if not calls:
            return 0
    print(f"{len(calls)} calls; each: times in a step, winner, median (20%–80%), aten / winner")
    written = done = 0
    if on_gpu:
        print("their kernels are compiled first, by several processes", flush=True)
        ahead.compile_ahead(calls, device, options.seconds - (time.monotonic() - start))
    for measurement in tune.tune(calls, device, path, budget=options.budget):
        print(f"{measurement.call}: {calls[measurement.call]}×, {_outcome(measurement)}", flush=True)
        for candidate, reason in measurement.rejected.items():
            print(f"    not {candidate}: {reason.splitlines()[0] if reason else 'no reason given'}")
        written += measurement.winner is not None
        done += 1
        if time.monotonic() - start > options.seconds:
            break
    print(f"{written} entries written: {path}" if written else "nothing written: no call had two candidates to choose from")
    if done < len(calls):
        print(f"stopped after {options.seconds:g} s: {len(calls) - done} of {len(calls)} calls are left, for --resume")
        return 3
    return 0


def _default_shape(model: str, batch: int, wanted: int) -> tuple[int, ...]:
    """A batch of images of the `wanted` size, or of the size that a net of the registry was made for."""
    side = models.registry.resolution_for(model, wanted)
    return batch, 3 if ":" in model else models.native(model).channels, side, side


def _observe(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Counter[Call]:
    """The calls of a training step. Model and batch are gone when it returns, for measuring needs their memory."""
    net = fastconv.convert(arguments.model(name, shape))
    model = net.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    calls = tune.observe(lambda: tune.training_step(model, x, dtype))
    if not calls:
        raise ValueError(f"--model {name}: a training step of it calls none of fastconv's operators on this device")
    return calls


def _outcome(measurement: tune.Measurement) -> str:
    if measurement.winner is None:
        return f"no choice between {len(measurement.rejected)} rejected candidates and at most one right one"
    gain = measurement.gain()
    against = "" if gain is None else f", {timing.times(gain)}"
    return f"{measurement.winner}, {timing.seconds(measurement.timings[measurement.winner])}{against}"


def _shape(text: str) -> tuple[int, ...]:
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
    shape = tuple(map(int, found.groups())) if found else ()
    if not shape or 0 in shape:
        raise argparse.ArgumentTypeError(f"must be NxCxHxW, four integers from 1 on, such as 8x3x32x32; got {text!r}")
    return shape


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value
