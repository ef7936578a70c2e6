"""What this project set out to reach on an H100, beside what was measured: `python -m benchmarks.goals FOLDER`.

An H200 is held to the same. All are of bfloat16, and ratios of medians within one trial, in whose rounds the providers took
turns.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from benchmarks import tables
from fastconv.bench import pairs, records
from fastconv.bench.records import Record, Trial
from fastconv.bench.suites.run import COMPILED_BATCH

_CHIPS = re.compile(r"\bH[12]00\b")
_EAGER = ("eager_channels_last",)  # with cudnn.benchmark
_COMPILED = ("compile_default", "compile_max_autotune")
_MOST_LAYERS = 12  # that are named


class Goal(NamedTuple):
    """A line of the table.

    Attributes:
        wanted, aim: what is asked for, and what is hoped for: a ratio at least, a share or a count at most.
        measured: None where a record is missing.
    """

    what: str
    wanted: float
    aim: float | None
    measured: float | None
    kind: Literal["ratio", "share", "count"] = "ratio"

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self._reaches(self.wanted):
            return "aim met" if self.aim is not None and self._reaches(self.aim) else "met"
        return "**missed**"

    def row(self) -> list[str]:
        side = "at least" if self.kind == "ratio" else "at most"
        asked = "" if self.aim is None else self._text(self.aim)
        measured = "" if self.measured is None else self._text(self.measured)
        return [self.what, f"{side} {self._text(self.wanted)}", asked, measured, self.verdict]

    def _reaches(self, wanted: float) -> bool:
        assert self.measured is not None
        return self.measured >= wanted if self.kind == "ratio" else self.measured <= wanted

    def _text(self, value: float) -> str:
        return {"ratio": f"{value:.2f}×", "share": f"{value:.0%}", "count": f"{value:.0f}"}[self.kind]


Found = dict[Trial, dict[str, Record]]


def of(found: Sequence[Record]) -> list[Goal]:
    """The goals for the chip of these records; none for a chip that has none."""
    if not found or _CHIPS.search(pairs.chip(found)) is None:
        return []
    by_trial: Found = {}
    for record in found:
        by_trial.setdefault(record.trial, {})[record.provider] = record
    return [*_layers(by_trial), *_training(by_trial)]


def table(found: Sequence[Record]) -> list[str]:
    """As Markdown, and below it the layers that are slower than the fastest of stock torch, the most time lost first."""
    if not (goals := of(found)):
        return []
    lines = tables.table(["bfloat16", "goal", "aim", "measured", ""], [goal.row() for goal in goals])
    if slower := slower_layers(found):
        rest = f" and {len(slower) - _MOST_LAYERS} more" if len(slower) > _MOST_LAYERS else ""
        named = [f"{r.case} {r.over_stock:.2f}× ({r.fastest_stock})" for r in slower[:_MOST_LAYERS]]
        lines += ["", f"Slower than the fastest of stock torch, most time lost first: {', '.join(named)}{rest}."]
    return lines


def slower_layers(found: Sequence[Record]) -> list[Record]:
    """Layers, forward + backward in bfloat16, whose whole interval lies below 1, the most time lost first."""
    slower = [r for r in found if _is_layer(r.trial) and r.provider == "fastconv" and (r.over_stock_q80 or 1.0) < 1]
    return sorted(slower, key=lambda r: -r.median_ms * (1 - (r.over_stock or 1.0)))


def _is_layer(trial: Trial) -> bool:
    is_like_eager = not trial.case.endswith("NCHW")  # whose callers hold another layout
    return (trial.suite, trial.direction, trial.dtype) == ("layers", "both", "bfloat16") and is_like_eager


def _layers(by_trial: Found) -> Iterator[Goal]:
    layers = {trial: by for trial, by in by_trial.items() if _is_layer(trial)}
    batches = sorted({batch for trial in layers if (batch := pairs.split(trial.case)[1]) is not None} | {COMPILED_BATCH})
    for batch in batches:
        same = [by for trial, by in layers.items() if pairs.split(trial.case)[1] == batch]
        for against, wanted, aim in ((_EAGER, 1.3, 1.5), (_COMPILED, 1.1, 1.2)):
            ratios = [ratio for by in same if (ratio := _ratio(by, against)) is not None]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
            if mean is not None or against == _EAGER or batch == COMPILED_BATCH:
                what = f"{len(ratios)} layers at batch {batch}, forward + backward, geometric mean, over {_name(against)}"
                yield Goal(what, wanted, aim, mean)
    ours = [by["fastconv"] for by in layers.values() if "fastconv" in by]
    what = f"of these {len(ours)} layers, slower than the fastest of stock torch beyond their spread"
    yield Goal(what, 0, None, len(slower_layers(ours)) if ours else None, "count")


def _training(by_trial: Found) -> Iterator[Goal]:
    for net, eager, aim, compiled, compiled_aim in (
        ("recipe_net R=224 batch 256", 1.6, 2.0, 1.0, 1.25),
        ("recipe_net R=32 batch 128", 2.0, 3.0, None, None),
        ("vgg16 R=224 batch 128", 1.25, 1.4, None, None),
    ):
        by = by_trial.get(Trial("training", net, "step", "bfloat16"), {})
        yield Goal(f"training step, {net}, over eager, channels_last", eager, aim, _ratio(by, _EAGER))
        if compiled is not None:
            yield Goal(f"training step, {net}, over torch.compile", compiled, compiled_aim, _ratio(by, _COMPILED))
        if "R=32" in net:
            graph = "fastconv_cuda_graph"  # as `fastconv train` runs steps
            yield Goal(
                f"training step, {net}, as a CUDA graph, over eager, channels_last", eager, aim, _ratio(by, _EAGER, graph)
            )
            graphs = _ratio(by, ("compile_max_autotune",), graph)  # whose graph holds the net, and not loss and optimizer
            yield Goal(f"training step, {net}, both as CUDA graphs, over torch.compile", 1.0, None, graphs)
        yield Goal(f"peak memory of a step, {net}, of eager's, channels_last", 0.6, None, _memory(by), "share")


def _ratio(by: dict[str, Record], against: Sequence[str], ours: str = "fastconv") -> float | None:
    """The time of the fastest of these in ours."""
    times = [by[provider].median_ms for provider in against if provider in by]
    return min(times) / by[ours].median_ms if times and ours in by else None


def _memory(by: dict[str, Record]) -> float | None:
    peaks = [by[provider].peak_bytes if provider in by else None for provider in ("fastconv", *_EAGER)]
    return None if None in peaks else peaks[0] / peaks[1]  # type: ignore[operator]


def _name(against: Sequence[str]) -> str:
    return "eager, channels_last" if against == _EAGER else "torch.compile"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a chip's records, as benchmarks/results/<chip>")
    folder = parser.parse_args(arguments).folder
    try:
        found = records.read(folder)
        chip = pairs.chip(found)
    except (ValueError, FileNotFoundError) as error:
        print(f"goals: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(found) or [f"no goals were set for {chip}"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
