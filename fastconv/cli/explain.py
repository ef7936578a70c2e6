"""`fastconv explain`: what runs for each call of a model and why, and how many bytes a training step moves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastconv
from fastconv import backends, tuning
from fastconv.bench import traffic
from fastconv.cli import arguments
from fastconv.models.layers import LAYERS

_DTYPES = ("bfloat16", "float16", "float32")
_CHIP = "sm_90"
_NOTES = """\
Written by `make docs` (`fastconv explain --traffic`); Triton {triton}, torch {torch}. No GPU ran: bytes are summed from the
shapes of tensors, and nothing here is a time. A step is forward and backward, without an optimizer; parameters and images
are {dtype}, images {image}, ReLUs in place, kernels those that tuning takes first on {chip}.

A launch of a Triton kernel moves the tensors that it is passed, an operator of torch its inputs and outputs, each once;
what is changed in place is read and written. The second figure counts every tile's own reading of its operands, most of
which caches serve. What cuDNN moves inside of one operator (a bias, partial sums, a second reading of a gradient) is not
seen, while fastconv's own partial sums of weight gradients and second readings are: they weigh at small batches, as the
weights themselves do. Saved for backward: distinct storages, parameters excluded.
"""
_BATCHES = (1, 8, 16, 32, 64, 128, 256)  # of the page


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain",
        help="what runs for a model's calls and why; the bytes that a training step moves",
        description=(
            "Print, for each call of a model's training step, the backend and kernel that tuning puts first on a chip, and "
            "why; which calls there are follows from those choices. With --traffic, count the bytes that the step moves and "
            "saves instead, every operator served by Triton: the tensors passed to each launch of its kernels, against the "
            "inputs and outputs of eager's operators. Nothing is computed, and no GPU is needed."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--model", type=_names, default="vgg16", metavar="NAME,...", help=arguments.MODELS)
    option("--input", default="3x224x224", metavar="CxHxW", help="shape of an image")
    option("--batch", type=arguments.positive, default=64, help="images a step")
    option("--dtype", choices=_DTYPES, default="bfloat16", help="of parameters and images")
    option(
        "--chip", help="a GPU's name and compute capability as tables are named by, or sm_80, ... (default: this machine's)"
    )
    option("--traffic", action="store_true", help=f"count bytes, as on --chip ({_CHIP} if not given)")
    option("--json", type=Path, metavar="FILE", help="with --traffic: write the counts as JSON")
    option("--markdown", type=Path, metavar="FILE", help="with --traffic: write the tables as Markdown")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    shape = (options.batch, *_image(options.input))
    dtype = getattr(torch, options.dtype)
    if not options.traffic:
        if options.json or options.markdown:
            raise ValueError("--json and --markdown: only with --traffic")
        chip = options.chip or backends.chip("cuda" if torch.cuda.is_available() else "cpu", 0)
        for model in options.model:
            _explain(*_meta(model, shape, dtype, "fastconv"), chip)
        return
    chip = options.chip or _CHIP
    counted = {model: measure(model, shape, dtype, chip) for model in options.model}
    for model, steps in counted.items():
        print(f"{model}, {'x'.join(map(str, shape))}, {options.dtype}, {chip}")
        for layers, step in steps.items():
            print(_table(layers, step))
        print(
            "fastconv / torch: " + ", ".join(f"{what} {100 * share:.1f} %" for what, share in shares(steps).items()) + "\n"
        )
    if options.json:
        content = {
            model: {
                layers: {"saved": step.saved, "moved": {name: row._asdict() for name, row in step.moved.items()}}
                for layers, step in steps.items()
            }
            for model, steps in counted.items()
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text("\n".join(_page(counted, shape, dtype, chip)) + "\n", encoding="utf-8")


def measure(model: str, shape: tuple[int, ...], dtype: torch.dtype, chip: str) -> dict[str, traffic.Step]:
    """A training step on fastconv's layers and on torch's.

    Raises:
        ValueError: `chip` is no GPU of compute capability 8.0, 9.0 or 10.0.
    """
    from fastconv.backends.triton_launch import PROCESSORS

    capability = tuning.capability(chip)
    if capability is None or f"sm_{capability}" not in PROCESSORS:
        raise ValueError(f"--chip {chip}: bytes are counted as on {', '.join(PROCESSORS)}")
    return {layers: traffic.measure(*_meta(model, shape, dtype, layers), capability, chip) for layers in LAYERS}


def shares(steps: dict[str, traffic.Step]) -> dict[str, float]:
    """fastconv's bytes by torch's."""
    ours, eager = (steps[layers] for layers in LAYERS)
    return {"moved": ours.total.tensors / eager.total.tensors, "saved": ours.saved / eager.saved}


def _table(title: str, step: traffic.Step) -> str:
    lines = [f"{title:<40} {'calls':>6} {'tensors MB':>12} {'with tiles MB':>14}"]
    lines += [f"  {name:<38} {row.calls:>6} {_mb(row.tensors):>12} {_mb(row.tiles):>14}" for name, row in rows(step)]
    return "\n".join([*lines, f"  {'saved for backward':<38} {'':>6} {_mb(step.saved):>12}"])


def _page(
    counted: dict[str, dict[str, traffic.Step]], shape: tuple[int, ...], dtype: torch.dtype, chip: str
) -> Iterator[str]:
    yield "# Bytes of a training step"
    yield ""
    yield from _NOTES.format(
        triton=version("triton"),
        torch=torch.__version__,
        dtype=str(dtype).removeprefix("torch."),
        image="×".join(map(str, shape[1:])),
        chip=chip,
    ).splitlines()
    yield ""
    yield "| fastconv / torch, batch | " + " | ".join(map(str, _BATCHES)) + " |"
    yield "|---|" + "---:|" * len(_BATCHES)
    for model in counted:
        by_batch = [shares(measure(model, (batch, *shape[1:]), dtype, chip)) for batch in _BATCHES]
        for what in by_batch[0]:
            yield f"| {model}, {what} | " + " | ".join(f"{100 * share[what]:.1f} %" for share in by_batch) + " |"
    for model, steps in counted.items():
        for layers, step in steps.items():
            yield f"\n## {model} on {layers}'s layers, batch {shape[0]}\n"
            yield "| kernel or operator | calls | tensors, MB | with tiles, MB |"
            yield "|---|---:|---:|---:|"
            for kernel, row in rows(step):
                yield f"| {kernel} | {row.calls} | {_mb(row.tensors)} | {_mb(row.tiles)} |"
            yield f"| saved for backward | | {_mb(step.saved)} | |"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


def rows(step: traffic.Step) -> list[tuple[str, traffic.Moved]]:
    """Kernels and operators that move at least a thousandth, the others together, and the sum."""
    total = step.total
    large = [(name, row) for name, row in step.moved.items() if row.tensors >= total.tensors / 1000]
    rest = sum((row for row in step.moved.values() if row.tensors < total.tensors / 1000), start=traffic.Moved())
    return [*large, ("others", rest), ("total", total)]


def _explain(model: nn.Module, input: Tensor, chip: str) -> None:
    print(f"on {chip}:")
    for call, count in traffic.calls(model, input, chip).items():
        print(f"{call}: {count}×\n    {tuning.explain(*call)}")


def _meta(name: str, shape: tuple[int, ...], dtype: torch.dtype, layers: str) -> tuple[nn.Module, Tensor]:
    """The net and a batch, on the meta device."""
    with torch.device("meta"):
        model = arguments.model(name, shape, layers)
        # What a callable returns may be on either layers.
        model = fastconv.convert(model, inplace=True) if layers == "fastconv" else fastconv.restore(model)
        input = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    return model.to(dtype=dtype, memory_format=torch.channels_last), input  # type: ignore[call-overload]


def _names(text: str) -> list[str]:
    return [arguments.model_name(name) for name in text.split(",")]


def _image(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) if size.isdecimal() else 0 for size in text.split("x"))
    if len(sizes) != 3 or 0 in sizes:
        raise ValueError(f"--input must be CxHxW, three integers from 1 on, such as 3x224x224; got {text!r}")
    return sizes
