"""Two runs of the benchmarks on one chip: what became faster, slower, larger or less exact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from fastconv.bench import pairs
from fastconv.bench.records import Record, Trial

_MORE_MEMORY = 1.05  # peaks hang on what else an allocator holds
_MORE_ERROR = 2.0  # operands are random


class Key(NamedTuple):
    trial: Trial
    provider: str


@dataclass(frozen=True)
class Change:
    """A record of ours, before and after.

    Attributes:
        worse, better: in words, what is; of the speed at most one of them says something.
    """

    before: Record
    after: Record
    worse: tuple[str, ...]
    better: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Of the providers of fastconv.

    Attributes:
        changes: of what was measured both times, in the order of the later run.
        missing, new: what only the earlier, the later run has.
    """

    changes: tuple[Change, ...]
    missing: tuple[Key, ...]
    new: tuple[Key, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.worse)

    @property
    def improvements(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.better)


def compare(before: Iterable[Record], after: Iterable[Record]) -> Comparison:
    """Hold two lists of records against each other.

    Slower is a record whose ratio over stock torch, paired within its run and so free of the machine's drift, has its whole
    interval from the 20 % to the 80 % quantile below that of before; where a run has no ratio the intervals of the times
    decide. Any more bytes saved or kernels launched are worse, both being counted; so are a peak of memory more than 5 % up
    and a root mean square error more than doubled. Better is the mirror image of each.

    Raises:
        ValueError: the records are not all of one chip.
    """
    old, new = ({Key(r.trial, r.provider): r for r in records} for records in (before, after))
    if old and new:
        pairs.chip([*old.values(), *new.values()])
    old, new = ({key: r for key, r in records.items() if r.is_ours} for records in (old, new))
    return Comparison(
        changes=tuple(_change(old[key], record) for key, record in new.items() if key in old),
        missing=tuple(key for key in old if key not in new),
        new=tuple(key for key in new if key not in old),
    )


def lines(comparison: Comparison) -> list[str]:
    """A table of all changes, then what is only in one of the runs, then what is worse and how much of what there is."""
    header = f"{'':<62}{'ratio before':<20}{'after':<20}{'ms before':<24}{'after':<24}"
    made = [header, *map(_line, comparison.changes)] if comparison.changes else []
    for title, keys in (("not measured after", comparison.missing), ("new", comparison.new)):
        made += [f"{title}: {_name(*key)}" for key in keys]
    made += [f"WORSE {_name(c.after.trial, c.after.provider)}: {', '.join(c.worse)}" for c in comparison.regressions]
    counts = {
        "compared": comparison.changes,
        "worse": comparison.regressions,
        "better": comparison.improvements,
        "not measured after": comparison.missing,
        "new": comparison.new,
    }
    return [*made, ", ".join(f"{len(found)} {what}" for what, found in counts.items())]


def _change(before: Record, after: Record) -> Change:
    worse, better = _slower(before, after), _slower(after, before)
    for what, of, limit in (
        ("bytes saved", "saved_bytes", 1.0),
        ("kernels launched", "launches", 1.0),
        ("bytes at the peak", "peak_bytes", _MORE_MEMORY),
        ("RMS error", "rms_error", _MORE_ERROR),
    ):
        old, new = getattr(before, of), getattr(after, of)
        if old is not None and new is not None:
            words = [f"{what} {_number(old)} to {_number(new)}"]
            worse += words if new > limit * old else []
            better += words if old > limit * new else []
    return Change(before, after, tuple(worse), tuple(better))


def _slower(one: Record, other: Record) -> list[str]:
    """By what `other` is slower than `one`."""
    low, high = one.over_stock_q20, other.over_stock_q80
    if low is not None and high is not None:
        return ["ratio over stock torch"] if high < low else []
    return ["time"] if other.q20_ms > one.q80_ms else []


def _line(change: Change) -> str:
    marks = [*(f"WORSE {what}" for what in change.worse), *(f"better {what}" for what in change.better)]
    stocks = [record.fastest_stock for record in (change.before, change.after)]
    if None not in stocks and stocks[0] != stocks[1]:
        marks.append(f"stock was {stocks[0]}, is {stocks[1]}")
    ratios = "".join(f"{_ratio(record):<20}" for record in (change.before, change.after))
    times = "".join(f"{_spread(r.median_ms, r.q20_ms, r.q80_ms):<24}" for r in (change.before, change.after))
    return f"{_name(change.after.trial, change.after.provider):<62}{ratios}{times}{'; '.join(marks)}".rstrip()


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2g}"


def _name(trial: Trial, provider: str) -> str:
    return " ".join((trial.case, trial.direction, trial.dtype, *([] if provider == "fastconv" else [provider])))


def _ratio(record: Record) -> str:
    if record.over_stock is None or record.over_stock_q20 is None or record.over_stock_q80 is None:
        return ""
    return f"{record.over_stock:.2f}× ({record.over_stock_q20:.2f}–{record.over_stock_q80:.2f})"


def _spread(mid: float, low: float, high: float) -> str:
    return f"{mid:.3g} ({low:.3g}–{high:.3g})"
