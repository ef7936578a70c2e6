"""`fastconv convert`: what conversion makes of a model of one's own, and what it gains."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    option(
        "--model", required=True, metavar="PATH:NAME", help="a Python file or a module, and a function that returns the net"
    )
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
    model = load(options.model)().to(device=device, dtype=dtype)
    input = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
    settings: dict[str, Any] = {"fuse": not options.no_fuse, "fold_batch_norm": not options.no_fold, "memory_format": layout}
    try:
        # A copy, as conversion changes the strides of Parameters; fastconv.explain explains a converted model as it is.
        explanation = fastconv.explain(fastconv.convert(copy.deepcopy(model), **settings), input)
        print(explanation, flush=True)
        found = conversion.compare(model, input, repeats=options.repeats, **settings)
    except ValueError as error:
        raise UsageError(f"--model {options.model}, --input {options.input}: {_first_line(error)}") from error
    print("\n" + "\n".join(_lines(found)))
    if options.json:
        options.json.write_text(json.dumps(_content(explanation, found, options), indent=1) + "\n", encoding="utf-8")
    if found.wrong is not None:
        print(f"fastconv convert: the converted model is wrong, so no times are given: {found.wrong}", file=sys.stderr)
        return 1
    return 0


def load(name: str) -> Callable[[], nn.Module]:
    """The function that 'path/to/file.py:function' or 'package.module:function' names.

    Raises:
        UsageError: there is none; when called, that it fails or returns no module.
    """
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise UsageError(f"--model {name}: must be path/to/file.py:function or package.module:function, without arguments")
    try:
        module = _file(Path(place)) if place.endswith(".py") or "/" in place else _module(place)
    except UsageError:
        raise
    # What a user's file raises while it is imported.
    except Exception as error:
        raise UsageError(f"--model {name}: {place} cannot be imported: {_first_line(error)}") from error
    made = getattr(module, function, None)
    if not callable(made):
        raise UsageError(f"--model {name}: {place} has no callable {function!r}")

    def build() -> nn.Module:
        try:
            model = made()
        except Exception as error:
            raise UsageError(f"--model {name}: {function}() fails: {_first_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise UsageError(f"--model {name}: must return a torch.nn.Module, got {type(model).__name__}")
        return model

    return build


def _file(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"--model {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where dataclasses and pickles of its classes look
    sys.path.insert(0, str(path.parent.resolve()))  # as if it were run as a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _module(name: str) -> object:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


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
