"""`fastconv inspect`: what Triton's kernels compile to, on a machine that need not have a GPU."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastconv.cli import arguments

_COLUMNS = {
    "config": "config",
    "arch": "arch",
    "dtype": "dtype",
    "registers": "registers",
    "stack_bytes": "stack",
    "shared_bytes": "shared",
    "mma": "mma",
    "mma_count": "mma count",
    "tma_loads": "TMA loads",
    "loop_instructions": "loop",
    "call": "call",
}
_LEGEND = (
    "registers of a thread; stack and shared memory in bytes; loop: instructions of the smallest loop with an mma in it; "
    "call: one of those that launch the kernel, input channels-output channels@size of the map"
)


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="compile every Triton kernel ahead of time and read its machine code",
        description=(
            "Compile the Triton kernels as layers of VGG16, the recipe net, ResNet-50, ResNeXt and MobileNet launch them, "
            "for chips that need not be there, and print registers, stack, shared memory and tensor-core instructions of "
            "each. A chip takes about a minute on two cores."
        ),
    )
    option = parser.add_argument
    option("--arch", type=_architectures, default="sm_90", metavar="SM,...", help="sm_80, sm_90, sm_100 (default: sm_90)")
    option("--kernel", default="", metavar="TEXT", help="only kernels whose name contains this")
    option("--first", action="store_true", help="only what tuning would launch: no other candidates")
    option("--json", type=Path, metavar="FILE", help="write the records as JSON")
    option("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    option("--dump", type=Path, metavar="DIR", help="write the cubins, <kernel>.<config>.<arch>.cubin")
    option("--processes", type=arguments.positive, default=2, help="how many compile at a time (default: 2)")
    parser.set_defaults(run=run)


def _architectures(text: str) -> tuple[int, ...]:
    from fastconv.backends.triton_launch import PROCESSORS

    found = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in found if name not in PROCESSORS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(map(repr, unknown))}; allowed: {', '.join(PROCESSORS)}")
    return tuple(int(name.removeprefix("sm_")) for name in found)


def run(options: argparse.Namespace) -> None:
    import triton  # a missing Triton is told before anything is started

    from fastconv.backends.triton_inspect import inspect

    start = time.monotonic()
    records = inspect(options.arch, options.kernel, options.first, options.dump, options.processes, _progress)
    seconds = time.monotonic() - start
    if not records:
        raise ValueError(f"--kernel {options.kernel}: no kernel has this in its name")
    print(table(records))
    print(f"\n{_LEGEND}")
    print(f"{len(records)} kernels in {seconds:.0f} s; Triton {triton.__version__}, torch {torch.__version__}")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(records, triton.__version__), encoding="utf-8")


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} compiled", end="\n" if done == total else "", file=sys.stderr, flush=True)


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records grouped by kernel."""
    widths = {name: max(len(title), *(len(str(r[name])) for r in records)) for name, title in _COLUMNS.items()}
    lines = ["  " + "  ".join(title.ljust(widths[name]) for name, title in _COLUMNS.items()).rstrip()]
    for kernel, group in by_kernel(records).items():
        lines.append(kernel)
        for record in group:
            cells = (_align(record[name], widths[name]) for name in _COLUMNS)
            lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _align(value: object, width: int) -> str:
    return str(value).rjust(width) if isinstance(value, int) else str(value).ljust(width)


def by_kernel(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["kernel"], []).append(record)
    return groups


def markdown(records: Sequence[dict[str, Any]], triton_version: str) -> str:
    """A page with a table for each kernel."""
    lines = [
        "# What the Triton kernels compile to",
        "",
        f"Written by `make docs` (`fastconv inspect`); Triton {triton_version}. No GPU was there; nothing here is a time.",
        "Of seven layers every candidate that `fastconv.tuning` lists is compiled, but each form (tile, operands, switches)",
        "once; of the others, which differ in sizes, the candidate that tuning takes first on that chip. Which layers they",
        "are stands in `fastconv/backends/triton_calls.py`.",
        "",
        f"{_LEGEND[0].upper()}{_LEGEND[1:]}. A config is the tile's sides, stages (s) and warps (w), and a digest",
        "of all that the kernel was specialised for.",
    ]
    for kernel, group in by_kernel(records).items():
        lines += ["", f"## {kernel}", "", "| " + " | ".join(_COLUMNS.values()) + " |"]
        lines.append("|" + "|".join("---:" if isinstance(group[0][name], int) else "---" for name in _COLUMNS) + "|")
        lines += ["| " + " | ".join(str(record[name]) for name in _COLUMNS) + " |" for record in group]
    return "\n".join(lines) + "\n"
