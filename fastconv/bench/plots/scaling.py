"""A layer that grows: operations a second by batch, resolution and width."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastconv.bench import pairs
from fastconv.bench.plots import sheet
from fastconv.bench.records import Record

_LEAST = 3  # cases of a line
_LAYER = re.compile(r"(?P<inside>\d+)-(?P<outside>\d+)@(?P<size>\d+) (?P<window>.+) batch (?P<batch>\d+)(?P<layout> NCHW)?")
_MARKERS, _LINES = ("o", "s"), ("-", "--")  # of directions
_AXES = ("batch N", "resolution R", "channels C")


def select(records: Iterable[Record], directions: Mapping[str, str]) -> list[list[Record]]:
    """Ours and the fastest stock ones, of the longest series of layers for each axis."""
    layers = [r for r in records if r.suite == "scaling" and r.direction in directions and r.flops]
    drawn = {case for _, values in series(r.case for r in layers).values() for case in values.values()}
    found = pairs.flat(pair for pair in pairs.pairs(layers) if pair.ours.case in drawn)
    return [found] if found else []


def series(cases: Iterable[str]) -> dict[str, tuple[str, dict[int, str]]]:
    """By axis: what stays the same along the longest series of at least three cases, and its cases by size."""
    found: dict[str, dict[str, dict[int, str]]] = {axis: {} for axis in _AXES}
    for case in cases:
        if (layer := _LAYER.fullmatch(case)) is None:
            continue
        inside, outside, size, window, batch, layout = (part or "" for part in layer.groups())
        found["batch N"].setdefault(f"{inside}-{outside}@{size} {window} batch N{layout}", {})[int(batch)] = case
        found["resolution R"].setdefault(f"{inside}-{outside}@R {window} batch {batch}{layout}", {})[int(size)] = case
        if inside == outside:
            found["channels C"].setdefault(f"C-C@{size} {window} batch {batch}{layout}", {})[int(inside)] = case
    longest = {axis: max(named.items(), key=lambda item: len(item[1])) for axis, named in found.items() if named}
    return {axis: (kept, dict(sorted(cases.items()))) for axis, (kept, cases) in longest.items() if len(cases) >= _LEAST}


def paint(drawn: list[Record], directions: Mapping[str, str]) -> Any:
    lines = series(r.case for r in drawn)
    dtypes = list(dict.fromkeys(r.dtype for r in drawn))
    shown = sheet.present(list(directions), [r.direction for r in drawn])
    note = "Higher is better; bands: 20 % to 80 % of rounds."
    figure = sheet.figure(
        "Layers that grow by batch, resolution and channels: operations a second", note, drawn, 0.3 + 2.1 * len(dtypes)
    )
    unit, scale = ("TFLOP/s", 1e12) if max((r.flops or 0) / r.median_ms for r in drawn) > 1e10 else ("GFLOP/s", 1e9)
    grid = figure.subplots(len(dtypes), len(lines), squeeze=False)
    for axes, (kept, _) in zip(grid[0], lines.values(), strict=True):
        axes.set_title(kept)
    for axes, axis in zip(grid[-1], lines, strict=True):
        axes.set_xlabel(axis)
    for row, dtype in zip(grid, dtypes, strict=True):
        for axes, (_, cases) in zip(row, lines.values(), strict=True):
            for direction in shown:
                found = pairs.pairs(r for r in drawn if (r.dtype, r.direction) == (dtype, direction))
                by_case = {pair.ours.case: pair for pair in found}
                points = {size: by_case[case] for size, case in cases.items() if case in by_case}
                look = list(directions).index(direction)
                _line(axes, {size: p.stock for size, p in points.items() if p.stock is not None}, False, look, scale)
                _line(axes, {size: p.ours for size, p in points.items()}, True, look, scale)
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(cases), map(str, cases))
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.grid()
        row[0].set_ylabel(f"{pairs.dtype_label(dtype)}\n{unit}")
    handles = []
    for direction in shown:
        look = list(directions).index(direction)
        marker, line = _MARKERS[look], _LINES[look]
        handles += [
            sheet.marker(f"fastconv, {directions[direction]}", marker, sheet.OURS, True, line),
            sheet.marker(f"fastest of stock torch, {directions[direction]}", marker, sheet.STOCK, False, line),
        ]
    sheet.legend(figure, handles)
    return figure


def _line(axes: Any, points: Mapping[int, Record], is_ours: bool, look: int, scale: float) -> None:
    if not points:
        return
    colour = sheet.OURS if is_ours else sheet.STOCK
    low, mid, high = (
        [(r.flops or 0) / (getattr(r, time) * 1e-3) / scale for r in points.values()]
        for time in ("q80_ms", "median_ms", "q20_ms")
    )
    axes.fill_between(list(points), low, high, color=colour, alpha=0.2, linewidth=0)
    face = colour if is_ours else "white"
    axes.plot(list(points), mid, _LINES[look], marker=_MARKERS[look], markersize=4, color=colour, mfc=face, linewidth=1.2)
