"""`fastconv bench`: fastconv against stock torch on this machine: a table, records, pictures; and two such runs compared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fastconv.bench import records
from fastconv.cli import arguments, bench_compare

_OUT = Path("runs") / "bench"

REFUSED, UNFINISHED = 1, 3  # exit statuses


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time layers, pools and nets against stock torch; compare two such runs",
        description=(
            "Time fastconv against stock torch, eager and compiled, in interleaved rounds. A result is held against float64 "
            "on the same inputs before it gets a time. Prints a table and writes records (JSON) and pictures (PNG) to "
            "DIR/<chip>/. Exit status: 1 if a result of ours was refused, 3 if --seconds ended the run early."
        ),
        epilog="fastconv bench compare A B tells what became slower between two files or folders of records.",
    )
    option = parser.add_argument
    option("--suite", action="append", choices=records.SUITES, help="default: all; may be repeated")
    option("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ... (default: auto)")
    option("--dtype", action="append", choices=records.DTYPES, help="default: each suite's own; may be repeated")
    option("--only", default="", metavar="TEXT", help="cases whose name holds TEXT, such as 'R=32' or '64-64@56'")
    option("--quick", action="store_true", help="few and small cases, few rounds: minutes on two cores")
    option("--threads", type=arguments.positive, help=f"of a CPU (default: torch's, here {torch.get_num_threads()})")
    option(
        "--seconds",
        type=arguments.positive,
        metavar="N",
        help="begin no case after N seconds; --resume goes on where this stopped",
    )
    option("--resume", action="store_true", help="leave out what DIR has already from the same sources on this chip")
    option("--no-plots", action="store_true", help="draw no pictures")
    option("--out", type=Path, default=_OUT, metavar="DIR", help=f"for records, in which each chip has a folder ({_OUT})")
    parser.set_defaults(run=run)
    bench_compare.add_compare(parser.add_subparsers(title="commands", metavar="compare A B", required=False))


def run(options: argparse.Namespace) -> int:
    """Measure, then draw all that the folder has records of."""
    # Loading what measures takes a second: not for every `fastconv info`.
    from fastconv.bench import plots
    from fastconv.bench.suites.run import Selection
    from fastconv.bench.suites.run import run as run_suites

    device = torch.device(arguments.device(options.device))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {options.device}: allowed: auto, cpu, cuda, cuda:1, ...")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.seed()  # fresh operands in every run
    if not options.no_plots:
        plots.require()  # not found missing only after minutes of measuring
    suites = tuple(options.suite or records.SUITES)
    chosen = tuple(options.dtype or ())
    selection = Selection(suites, chosen, options.only, options.quick, options.seconds, options.resume)
    outcome = run_suites(selection, device, options.out)
    if not outcome.records and not outcome.left and not options.resume:
        raise ValueError("nothing was measured: no case of these suites on this device has such a dtype or name")
    folder = options.out / records.machine(device).folder
    print(f"\n{len(outcome.records)} records made; they lie in {folder}")
    if not options.no_plots and folder.is_dir():
        for path in plots.draw(records.read(folder), folder):
            print(f"drawn: {path}")
    if not outcome.all_right:
        print("a result of ours was refused: see 'has no time' above")
        return REFUSED
    return UNFINISHED if outcome.left else 0
