"""fastconv against stock torch on this CPU: `make bench-cpu`, or `python -m benchmarks.cpu --help`.

Every line compares calls that took turns in one process, on inputs drawn anew for every round, in the same memory format,
dtype, number of threads and allocator. What a result is held against before it may have a time is float64.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import cases, layer_trials, memory, net_trials
from benchmarks.measure import HEADER, Effort, Trial, is_ours, lines, measure
from fastconv.bench import records
from fastconv.bench.timing import stopwatch

SUITES = ("models", "training", "layers", "scaling")
DTYPES = ("float32", "bfloat16", "bfloat16_autocast")
_RESULTS = Path(__file__).parent / "results"
_QUICK_RESULTS = Path("runs") / "bench"

# Layers settle: in a net they stand among their like.
_FULL = {
    "models": Effort(20, 4.0),
    "training": Effort(15, 6.0),
    "layers": Effort(15, 0.6, settling=1),
    "scaling": Effort(15, 0.9, settling=1),
}
_QUICK = dict.fromkeys(SUITES, Effort(5, 0.3))


class Selection(NamedTuple):
    """What is measured: suites, dtypes, cases whose name holds `only`; the short lists where `quick`."""

    suites: tuple[str, ...] = SUITES
    dtypes: tuple[str, ...] = DTYPES
    only: str = ""
    quick: bool = False

    @property
    def is_whole(self) -> bool:
        return set(self.dtypes) == set(DTYPES) and not self.only


def trials(suite: str, selection: Selection) -> Iterator[Trial]:
    """The trials of a suite, each made when its turn has come."""
    dtypes, only, quick = selection.dtypes, selection.only, selection.quick
    if suite in ("models", "training"):
        is_step = suite == "training"
        for net in (net for net in (cases.QUICK_NETS if quick else cases.NETS) if only in net.case):
            for dtype in (dtype for dtype in net.dtypes if dtype in dtypes):
                peaks = {}
                if is_step and net.is_compiled:  # the recipe nets
                    names = [name for name in net_trials.providers(net, is_step) if not name.startswith("compile")]
                    peaks = {name: memory.peak(net, dtype, name) for name in names}
                yield net_trials.trial(net, dtype, is_step, peaks)
        return
    full = {"layers": cases.LAYERS, "scaling": cases.SCALING}
    listed = {"layers": cases.QUICK_LAYERS, "scaling": cases.QUICK_SCALING} if quick else full
    directions = ("forward", "input_grad", "weight_grad", "both") if suite == "layers" else ("forward", "both")
    for case in (case for case in listed[suite] if only in case.case):
        for dtype in ("float32", "bfloat16") if suite == "layers" else ("float32",):
            if dtype in dtypes:
                yield from layer_trials.trials(suite, case, dtype, directions)


def run(selection: Selection, out: Path | None = None) -> bool:
    """Measure, print a table and write records under `out` / chip. False where one of our results was refused."""
    quick = selection.quick
    machine = records.machine(torch.device("cpu"))
    folder = (out or (_QUICK_RESULTS if quick else _RESULTS)) / machine.folder
    print(f"{machine.chip}; torch {machine.torch}; fastconv {machine.commit}; {machine.date}")
    print("medians (20% to 80% quantiles); ratios are paired, above 1 where fastconv is faster; errors against float64")
    all_right = True
    for suite in selection.suites:
        made: list[records.Record] = []
        print(f"\n{suite}\n{HEADER}")
        with stopwatch() as watch:
            for trial in trials(suite, selection):
                result = measure(trial, (_QUICK if quick else _FULL)[suite], machine)
                made += result.records.values()
                all_right &= not any(is_ours(provider) for provider in result.refused)
                print("\n".join(lines(result)), flush=True)
                trial.close()
                del trial, result
                gc.collect()
        if made:
            records.write(folder / f"{suite}.json", made, whole=selection.is_whole)
            print(f"{watch.seconds:.0f} s; {len(made)} records in {folder / suite}.json")
    return all_right


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    option = parser.add_argument
    option("--quick", action="store_true", help="a minute: small cases, few rounds; records go to runs/bench")
    option("--suite", action="append", choices=SUITES, help="default: all; may be repeated")
    option("--dtype", action="append", choices=DTYPES, help="default: all; may be repeated")
    option("--only", default="", metavar="TEXT", help="cases whose name holds TEXT, such as 'R=32' or '@56'")
    option("--threads", type=int, default=None, help=f"default: torch's, here {torch.get_num_threads()}")
    option("--out", type=Path, default=None, help="a folder for records, in which the chip has its own")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    suites, dtypes = tuple(options.suite or SUITES), tuple(options.dtype or DTYPES)
    return 0 if run(Selection(suites, dtypes, options.only, options.quick), options.out) else 1


if __name__ == "__main__":
    raise SystemExit(main())
