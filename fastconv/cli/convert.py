"""`fastconv convert`: what conversion makes of a model of one's own, and what it gains."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastconv
from fastconv.bench import conversion, timing
from fastconv.bench.conversion import OURS, Comparison, Side
from fastconv.bench.explain import Explanation
from fastconv.cli import arguments

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class UsageError(ValueError):
    """A model or an input that cannot be had."""


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="what conversion makes of a model: layer by layer, error, memory and time before and after",
        description=(
            "Build a model, print what fastconv.convert makes of each of its layers, and compare it with the model as it "
            "was, in NCHW and in channels_last: error of outputs and gradients against float64, memory and time of an "
            "evaluation's forward and of a training step (forward, mean of squares, backward, SGD). Ratios are against the "
            "faster of torch's two. Exit status 1, and no times, where the converted model's error is too large."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--model", required=True, metavar="NAME", help=f"{arguments.MODELS}, which returns the net")
    option("--input", required=True, metavar="NxCxHxW", help="shape of a batch of images")
    option("--dtype", choices=_DTYPES, default="float32", help="of parameters and images")
    option("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    option("--memory-format", choices=_FORMATS, default="channels_last", help="of the converted model and its images")
    option("--no-fuse", action="store_true", help="swap layers one by one")
    option("--no-fold", action="store_true", help="never fold norms into convolutions")
    option("--repeats", type=arguments.positive, default=20, help="rounds of timed calls")
    option("--seed", type=int, default=0, help="of the model's initialisation and the images")
    option("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The exit status: 1 where the converted model is wrong, 2 where there is no model or it does not fit the input."""
    try:
        return _run(options)
    except UsageError as error:
        print(f"fastconv convert: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    shape = _shape(options.input)
    try:
        device = torch.device(arguments.device(options.device))
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    dtype = getattr(torch, options.dtype)
    layout = _FORMATS[options.memory_format]
    torch.manual_seed(options.seed)
    try:
        model = arguments.model(options.model, shape, layers="torch").to(device=device, dtype=dtype)
    except ValueError as error:
        raise UsageError(str(error)) from error
    input = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
    settings: dict[str, Any] = {"fuse": not options.no_fuse, "fold_batch_norm": not options.no_fold, "memory_format": layout}
    try:
        # A copy, as conversion changes the strides of Parameters; fastconv.explain explains a converted model as it is.
        explanation = fastconv.explain(fastconv.convert(copy.deepcopy(model), **settings), input)
        print(explanation, flush=True)
        found = conversion.compare(model, input, repeats=options.repeats, **settings)
    except ValueError as error:
        raise UsageError(f"--model {options.model}, --input {options.input}: {str(error).partition(chr(10))[0]}") from error
    print("\n" + "\n".join(_lines(found)))
    if options.json:
        options.json.write_text(json.dumps(_content(explanation, found, options), indent=1) + "\n", encoding="utf-8")
    if found.wrong is not None:
        print(f"fastconv convert: the converted model is wrong, so no times are given: {found.wrong}", file=sys.stderr)
        return 1
    return 0


def _shape(text: str) -> tuple[int, ...]:
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
    shape = tuple(map(int, found.groups())) if found else ()
    if not shape or 0 in shape:
        raise UsageError(f"--input must be NxCxHxW, four integers from 1 on, such as 8x3x224x224; got {text!r}")
    return shape


def _lines(found: Comparison) -> Iterator[str]:
    titles = {what.name: what.name.replace("_", " ") for what in dataclasses.fields(conversion.Errors)}
    yield f"{'relative error against float64':<34}" + "".join(f"{name:>28}" for name in found.sides) + f"{'allowed':>14}"
    for what, title in titles.items():
        errors = "".join(f"{getattr(side.errors, what):>28.1e}" for side in found.sides.values())
        yield f"{title:<34}{errors}{found.allowed[what]:>14.1e}"
    yield f"training output and gradients: {found.mode}"
    if found.wrong is not None:
        return
    yield f"{'':<34}" + "".join(f"{name:>28}" for name in found.sides) + f"{'torch / fastconv':>26}"
    for title, what in (("forward, evaluation", "forward"), ("training step", "step")):
        taken = {name: getattr(side, what) for name, side in found.sides.items()}
        gain = timing.times(timing.ratio(taken[_fastest(taken)], taken[OURS]))
        yield f"{title:<34}" + "".join(f"{timing.seconds(t):>28}" for t in taken.values()) + f"{gain:>26}"
    for title, what in (("peak memory of a training step", "peak_bytes"), ("saved for backward", "saved_bytes")):
        sizes = {name: getattr(side, what) for name, side in found.sides.items()}
        least = min(size for name, size in sizes.items() if name != OURS)
        share = f"{least / sizes[OURS]:.2f}×" if sizes[OURS] else ""
        yield f"{title:<34}" + "".join(f"{size / 1e6:>25.1f} MB" for size in sizes.values()) + f"{share:>26}"
    rounds = len(taken[OURS].runs)
    yield (
        f"times: median (20%–80%) over {rounds} interleaved rounds, ratios paired, against the better of torch's two; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def _fastest(taken: dict[str, timing.Timing]) -> str:
    return min((name for name in taken if name != OURS), key=lambda name: taken[name].median)


def _content(explanation: Explanation, found: Comparison, options: argparse.Namespace) -> dict[str, Any]:
    def side(value: Side) -> dict[str, Any]:
        times = {
            what: None if taken is None else {"median": taken.median, "q20": taken.q20, "q80": taken.q80}
            for what, taken in (("forward_seconds", value.forward), ("step_seconds", value.step))
        }
        memory = {"peak_bytes": value.peak_bytes, "saved_bytes": value.saved_bytes}
        return {"errors": dataclasses.asdict(value.errors), **times, **memory}

    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "run"}
    return {
        "options": asked,
        "torch": torch.__version__,
        "explanation": dataclasses.asdict(explanation),
        "wrong": found.wrong,
        "allowed": found.allowed,
        "sides": {name: side(value) for name, value in found.sides.items()},
    }
