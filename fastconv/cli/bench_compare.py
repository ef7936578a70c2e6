"""`fastconv bench compare`: what two runs of the benchmarks have different."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastconv.bench import pairs, records
from fastconv.bench.compare import compare, lines


def add_compare(commands: Any) -> None:
    """Register the command with the subparsers of `fastconv bench`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="hold two runs against each other",
        description=(
            "Print, for each record of fastconv's in both runs, its ratio over the fastest of stock torch and its time "
            "before and after, and what is worse: a ratio whose whole interval from the 20 % to the 80 % quantile lies "
            "below that of before, more bytes saved or kernels launched, a peak of memory more than 5 % up, an error "
            "more than doubled. The exit status is 1 where something is."
        ),
    )
    parser.add_argument("before", type=Path, metavar="A", help="a JSON file of records, or a folder of them")
    parser.add_argument("after", type=Path, metavar="B", help="the like, of the same chip")
    parser.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> int:
    """Returns: 1 where something is worse, else 0."""
    before, after = records.read(options.before), records.read(options.after)
    comparison = compare(before, after)
    for name, run in (("before", before), ("after", after)):
        commits = pairs.span(record.commit for record in run)
        print(f"{name}: {pairs.chip(run)}, torch {pairs.span(r.torch for r in run)}, {pairs.dates(run)}, commit {commits}")
    print("\n".join(lines(comparison)))
    return 1 if comparison.regressions else 0
