"""Ratios over stock torch: a row for each case, a panel for each dtype, a bar for each direction."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fastconv.bench import pairs
from fastconv.bench.plots import sheet
from fastconv.bench.records import Record

_MOST_ROWS = 32
_LEAST_SHARE = 1 / 4  # of the cases of the dtype that has most
_MOST = 8.0  # a ratio above is a number at the end of its bar
_BOX = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
_TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def select(records: Iterable[Record], suites: tuple[str, ...], directions: Mapping[str, str]) -> list[list[Record]]:
    """Of each case that was held against stock torch the largest batch, which is drawn as bars, and the smallest.

    A dtype in which few of the cases were measured has no panel.
    """
    found = [
        record
        for record in records
        if record.suite in suites and record.direction in directions and record.over_stock is not None
        if record.provider == "fastconv"
    ]
    counts = Counter(record.dtype for record in found)
    rows: dict[str, dict[int | None, list[Record]]] = {}
    for record in found:
        if counts[record.dtype] >= _LEAST_SHARE * max(counts.values()):
            what, batch = pairs.split(record.case)
            rows.setdefault(what, {}).setdefault(batch, []).append(record)
    kept = [[record for batch in _ends(batches) for record in batches[batch]] for batches in rows.values()]
    pages = -(-len(kept) // _MOST_ROWS)
    cuts = [len(kept) * page // pages for page in range(pages + 1)] if pages else [0]
    return [[record for row in kept[start:end] for record in row] for start, end in itertools.pairwise(cuts)]


def _ends(batches: Iterable[int | None]) -> list[int | None]:
    """The largest and, if it is another one, the smallest."""
    ordered = sorted(set(batches), key=lambda batch: batch or 0)
    return [ordered[-1], *ordered[:-1][:1]]


def paint(drawn: list[Record], title: str, directions: Mapping[str, str]) -> Any:
    from matplotlib.patches import Patch

    keys = {(*pairs.split(r.case), r.dtype, r.direction): r for r in drawn}
    rows = {what: _ends(batch for other, batch, *_ in keys if other == what) for what, *_ in keys}
    shown = sheet.present(list(directions), [r.direction for r in drawn])
    looks = {direction: sheet.BARS[list(directions).index(direction)] for direction in shown}

    largest = {batches[0] for batches in rows.values()}
    shared = f", batch {largest.pop()}" if len(largest) == 1 and None not in largest else ""
    note = "Above 1 fastconv is faster than the fastest of stock torch; black lines: 20 % to 80 % of rounds."
    figure = sheet.figure(
        f"{title}{shared}: time of stock torch / time of fastconv", note, drawn, 0.4 + 0.23 * max(len(rows), 2)
    )
    dtypes = list(dict.fromkeys(r.dtype for r in drawn))
    panels = figure.subplots(1, len(dtypes), sharex=True, sharey=True, squeeze=False)[0]
    thick = 0.8 / len(looks)
    for axes, dtype in zip(panels, dtypes, strict=True):
        for turn, (direction, look) in enumerate(looks.items()):
            places = {what: at + (turn - (len(looks) - 1) / 2) * thick for at, what in enumerate(rows)}
            of = {key[:2]: r for key, r in keys.items() if key[2:] == (dtype, direction)}
            _bars(
                axes, {places[what]: of[what, ends[0]] for what, ends in rows.items() if (what, ends[0]) in of}, thick, look
            )
            _diamonds(axes, {places[what]: of[what, ends[1]] for what, ends in rows.items() if (what, *ends[1:]) in of})
        axes.axvline(1, color="black", linewidth=0.9)
        axes.set_title(pairs.dtype_label(dtype))
        axes.grid(axis="x")
    _scale(panels[0], drawn)
    labels = [what if shared or batch is None else f"{what} batch {batch}" for what, (batch, *_) in rows.items()]
    panels[0].set(yticks=range(len(labels)), yticklabels=labels, ylim=(max(len(labels), 2) - 0.4, -0.6))

    handles: list[Any] = [Patch(fc=fc, hatch=hatch, ec=sheet.GREY, label=directions[d]) for d, (fc, hatch) in looks.items()]
    smallest = {batch for _, *others in rows.values() for batch in others}
    if smallest:
        label = f"at batch {smallest.pop()}" if len(smallest) == 1 else "at the smallest batch measured"
        handles.append(sheet.marker(label, "D", "black", filled=False))
    sheet.legend(figure, handles)
    return figure


def _bars(axes: Any, at: Mapping[float, Record], thick: float, look: tuple[str, str]) -> None:
    """From 1, where neither side is faster."""
    colour, hatch = look
    places, gains = list(at), [_within(r.over_stock or 1) - 1 for r in at.values()]
    axes.barh(places, gains, thick, 1, color=colour, hatch=hatch, edgecolor=sheet.GREY, linewidth=0.4)
    for place, r in at.items():
        if (r.over_stock or 1) > _MOST:
            axes.text(_MOST, place, f"{r.over_stock:.0f}×", va="center", ha="right", fontsize=6, bbox=_BOX)
        else:
            axes.hlines(place, r.over_stock_q20, _within(r.over_stock_q80 or 1), color="black", linewidth=0.9)


def _diamonds(axes: Any, at: Mapping[float, Record]) -> None:
    gains = [_within(r.over_stock or 1) for r in at.values()]
    axes.plot(gains, list(at), "D", linestyle="", markersize=3, mfc="white", mec="black", mew=0.7)


def _within(ratio: float) -> float:
    """What is drawn of a ratio: of one that is off the scale, up to its end."""
    return min(ratio, _MOST)


def _scale(axes: Any, drawn: list[Record]) -> None:
    """Logarithmic, where half and double are as far from 1."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ends = [_within(end) for r in drawn for end in (r.over_stock, r.over_stock_q20, r.over_stock_q80) if end is not None]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.95, *ends) / 1.06, max(1.05, *ends) * 1.06)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.3g}"))
