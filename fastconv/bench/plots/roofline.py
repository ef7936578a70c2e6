"""Layers under the roof: operations a byte against operations a second, ours joined to the fastest of stock torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastconv.bench import pairs
from fastconv.bench.pairs import Pair
from fastconv.bench.plots import sheet
from fastconv.bench.records import Record


def select(records: Iterable[Record], directions: Mapping[str, str]) -> list[list[Record]]:
    layers = [r for r in records if r.suite == "layers" and r.direction in directions and r.flops and r.bytes]
    found = pairs.flat(pairs.pairs(layers))
    return [found] if found else []


def paint(drawn: list[Record], directions: Mapping[str, str]) -> Any:
    """A column for each dtype, a row for each direction."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    dtypes = list(dict.fromkeys(r.dtype for r in drawn))
    shown = sheet.present(list(directions), [r.direction for r in drawn])
    note = "Operations by the definition: on a CPU Winograd's transforms do fewer, and may pass the roof."
    figure = sheet.figure("Single layers under the roof of memory and matrix products", note, drawn, 2.4 * len(shown) + 0.4)
    grid = figure.subplots(len(shown), len(dtypes), sharex="col", sharey="col", squeeze=False)
    unit, scale = ("TFLOP/s", 1e12) if max(_rate(r) for r in drawn) > 1e13 else ("GFLOP/s", 1e9)
    for row, direction in zip(grid, shown, strict=True):
        for axes, dtype in zip(row, dtypes, strict=True):
            _points(axes, pairs.pairs(r for r in drawn if (r.dtype, r.direction) == (dtype, direction)), scale)
            axes.set(xscale="log", yscale="log")
            axes.grid()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
                axis.set_minor_formatter(NullFormatter())
        row[0].set_ylabel(f"{directions[direction]}\n{unit}")
    for column, dtype in zip(grid.T, dtypes, strict=True):
        column[0].set_title(pairs.dtype_label(dtype))
        rates = _roof(column, [r for r in drawn if r.dtype == dtype], scale, unit)
        column[-1].set_xlabel("FLOP a byte" + rates)
    ours, stock = sheet.marker("fastconv", "o", sheet.OURS), sheet.marker("fastest of stock torch", "o", sheet.STOCK, False)
    sheet.legend(figure, [ours, stock, sheet.marker("roof", "", "black", line="-")])
    return figure


def _intensity(record: Record) -> float:
    return (record.flops or 0) / (record.bytes or 1)


def _rate(record: Record) -> float:
    return (record.flops or 0) / (record.median_ms * 1e-3)


def _points(axes: Any, found: Sequence[Pair], scale: float) -> None:
    joined = [(_intensity(ours), _rate(ours) / scale, _rate(stock) / scale) for ours, stock in found if stock is not None]
    if joined:
        at, own, stocks = zip(*joined, strict=True)
        axes.vlines(at, own, stocks, color=sheet.GREY, linewidth=0.5, zorder=1)
        axes.plot(at, stocks, "o", color=sheet.STOCK, mfc="white", markersize=3.5, mew=0.8, zorder=2)
    rates = [_rate(ours) / scale for ours, _ in found]
    axes.plot([_intensity(ours) for ours, _ in found], rates, "o", color=sheet.OURS, markersize=3.5, zorder=3)


def _roof(column: Sequence[Any], drawn: list[Record], scale: float, unit: str) -> str:
    """Of the best rates that were measured, which are told; a panel holds its points and where the roof bends."""
    copy = max((r.copy_gb_per_s for r in drawn if r.copy_gb_per_s is not None), default=None)
    matmul = max((r.matmul_tflop_per_s for r in drawn if r.matmul_tflop_per_s is not None), default=None)
    if copy is None or matmul is None:
        return ""
    top, slope = matmul * 1e12 / scale, copy * 1e9 / scale
    bend = top / slope
    at = [bend, *(_intensity(r) for r in drawn)]
    left, right = min(at) / 1.5, max(at) * 1.5
    for axes in column:
        axes.plot((left, bend, right), (left * slope, top, top), color="black", linewidth=1, zorder=1)
        axes.set_xlim(left, right)
    return f"\ncopy {copy:,.0f} GB/s,\nproduct {top:,.0f} {unit}"
