"""Records as tables of Markdown, each a list of lines; an empty one where there is nothing to tell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

from fastconv.bench import pairs
from fastconv.bench.pairs import Pair, dtype_label
from fastconv.bench.records import Record

_SUMMED = ("layers", "pools", "scaling")  # suites
_MANY_BATCHES = 3  # more are one row
_PROVIDERS = {
    "eager_channels_last": "eager",
    "eager_nchw": "eager, NCHW",
    "eager_cuda_graph": "eager, CUDA graph",
    "cudnn_fused": "cuDNN, fused",
    "compile_default": "torch.compile",
    "compile_max_autotune": "torch.compile, max-autotune",
    "compile_freezing": "torch.compile, freezing",
}
_DIRECTIONS = {
    "input_grad": "input gradient",
    "weight_grad": "weight gradient",
    "both": "forward + backward",
    "step": "training step",
}
_PRODUCTS = re.compile(r"(\d+)-\d+@\d+ (\d+)x(\d+)/.*")  # input channels and window of a layer


def nets(records: Sequence[Record]) -> list[str]:
    """Inference and training step of each net, side by side."""
    found = {(p.ours.case, p.ours.dtype, p.ours.direction): p for p in pairs.pairs(records) if _is_net(p.ours)}
    header = ["net", "dtype"]
    for what in ("inference", "training step"):
        header += [f"{what}: fastconv / stock torch", "ratio"]
    rows = []
    for case, dtype in dict.fromkeys(key[:2] for key in found):
        whole, step = found.get((case, dtype, "forward")), found.get((case, dtype, "step"))
        rows.append([case, dtype_label(dtype), *_cells(whole), *_cells(step), "" if step is None else _peaks(step)])
    return table([*header, "peak memory of a step, MB"], rows)


def summary(records: Sequence[Record]) -> list[str]:
    """Of all layers and all pools the ratios' geometric mean and ends, by suite, batch and direction."""
    found = [r for r in records if r.provider == "fastconv" and r.suite in _SUMMED and r.over_stock is not None]
    dtypes = list(dict.fromkeys(r.dtype for r in found))
    rows = []
    for suite in _SUMMED:
        of = [r for r in found if r.suite == suite]
        batches = list(dict.fromkeys(pairs.split(r.case)[1] for r in of))
        for group in [batches] if len(batches) > _MANY_BATCHES else [[batch] for batch in batches]:
            ends = sorted(batch for batch in group if batch is not None)
            batch = "–".join(dict.fromkeys(map(str, (*ends[:1], *ends[-1:]))))
            for direction in ("forward", "both"):
                same = [r for r in of if r.direction == direction and pairs.split(r.case)[1] in group]
                cells = [_ratios([r for r in same if r.dtype == dtype]) for dtype in dtypes]
                cases = str(len({r.case for r in same}))
                rows += [[suite, batch, _direction(direction), cases, *cells]] if same else []
    return table(["suite", "batch", "direction", "cases", *map(dtype_label, dtypes)], rows)


def overhead(records: Sequence[Record]) -> list[str]:
    """What the host does for a call."""
    rows = []
    for ours, stock in pairs.pairs(r for r in records if r.suite == "overhead"):
        times = ["" if r is None else f"{r.median_ms * 1e3:.3g}" for r in (ours, stock)]
        above = "" if stock is None else f"{(ours.median_ms - stock.median_ms) * 1e3:.3g}"
        rows.append([ours.case, _direction(ours.direction), dtype_label(ours.dtype), *times, above])
    return table(["call", "direction", "dtype", "fastconv, µs", "stock torch, µs", "above it, µs"], rows)


def everything(records: Sequence[Record]) -> list[str]:
    """A row for each record of ours."""
    columns: dict[str, Callable[[Pair], str]] = {
        "case": lambda p: p.ours.case,
        "direction": lambda p: _direction(p.ours.direction),
        "dtype": lambda p: dtype_label(p.ours.dtype),
        "provider": lambda p: p.ours.provider if p.ours.provider != "fastconv" else "",
        "time": lambda p: _time(p.ours, spread=True),
        "fastest of stock torch": lambda p: _provider(p.ours.fastest_stock),
        "its time": lambda p: "" if p.stock is None else _time(p.stock),
        "ratio": lambda p: _ratio(p.ours),
        "of the roofline": lambda p: "" if p.ours.roofline_percent is None else f"{p.ours.roofline_percent:.0f} %",
        "peak, MB": lambda p: _peaks(p),
        "saved, MB": lambda p: "" if p.ours.saved_bytes is None else _mb(p.ours.saved_bytes),
        "launches": lambda p: "" if p.ours.launches is None else str(p.ours.launches),
        "RMS error": lambda p: f"{p.ours.rms_error:.1e}",
    }
    return table(list(columns), [[cell(p) for cell in columns.values()] for p in pairs.pairs(records, provider=None)])


def layer_errors(records: Sequence[Record], direction: str) -> list[str]:
    """Root mean square and largest error of one layer, the first, for each number of products that are summed."""
    of = [p for p in pairs.pairs(records) if p.ours.suite == "layers" and p.ours.direction == direction]
    found = {(*pairs.split(p.ours.case), p.ours.dtype): p for p in of}
    chosen: dict[int, str] = {}
    for what, *_ in found:
        if (layer := _PRODUCTS.fullmatch(what)) is not None:
            chosen.setdefault(math.prod(map(int, layer.groups())), what)
    rows: dict[tuple[str, str], Pair] = {}
    for _, what in sorted(chosen.items()):
        largest = max(batch or 0 for other, batch, _ in found if other == what)
        same = {dtype: pair for (other, batch, dtype), pair in found.items() if (other, batch or 0) == (what, largest)}
        rows |= {(pair.ours.case, dtype): pair for dtype, pair in same.items()}
    return _errors(rows)


def net_errors(records: Sequence[Record], direction: str) -> list[str]:
    of = [p for p in pairs.pairs(records) if _is_net(p.ours) and p.ours.direction == direction]
    return _errors({(p.ours.case, p.ours.dtype): p for p in of})


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns without a single entry are left out, and all of it without rows."""
    listed = list(rows)
    kept = [at for at in range(len(header)) if any(row[at] for row in listed)]
    lines = [[header[at] for at in kept], *([row[at].replace("|", "\\|") for at in kept] for row in listed)]
    drawn = [f"| {' | '.join(cells)} |" for cells in lines]
    return [drawn[0], "|---" * len(kept) + "|", *drawn[1:]] if listed else []


def _errors(found: dict[tuple[str, str], Pair]) -> list[str]:
    cases, dtypes = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 1))
    header = ["", *(f"{dtype_label(dtype)}: {whose}" for dtype in dtypes for whose in ("fastconv", "stock torch"))]
    rows = []
    for case in cases:
        both = [record for dtype in dtypes for record in found.get((case, dtype), (None, None))]
        rows.append([case, *("" if r is None else f"{r.rms_error:.1e} / {r.max_error:.1e}" for r in both)])
    return table(header, rows)


def _is_net(record: Record) -> bool:
    return record.suite in ("models", "training")


def _direction(direction: str) -> str:
    return _DIRECTIONS.get(direction, direction)


def _provider(provider: str | None) -> str:
    return _PROVIDERS.get(provider or "", provider or "")


def _cells(pair: Pair | None) -> tuple[str, str]:
    if pair is None:
        return "", ""
    stock = "" if pair.stock is None else f" / {_time(pair.stock)} ({_provider(pair.stock.provider)})"
    return _time(pair.ours) + stock, _ratio(pair.ours)


def _ratios(found: Sequence[Record]) -> str:
    """'1.41× (0.92–2.30), 2 slower': slower where the whole interval is below 1."""
    gains = [r.over_stock for r in found if r.over_stock is not None]
    if not gains:
        return ""
    mean = math.exp(sum(map(math.log, gains)) / len(gains))
    slower = sum(r.over_stock_q80 is not None and r.over_stock_q80 < 1 for r in found)
    return f"{mean:.2f}× ({min(gains):.2f}–{max(gains):.2f})" + (f", {slower} slower" if slower else "")


def _ratio(r: Record) -> str:
    return "" if r.over_stock is None else f"{r.over_stock:.2f}× ({r.over_stock_q20:.2f}–{r.over_stock_q80:.2f})"


def _time(r: Record, spread: bool = False) -> str:
    unit, scale = next(((u, s) for u, s in (("s", 1e-3), ("ms", 1.0)) if r.median_ms * s >= 1), ("µs", 1e3))
    low, mid, high = (_three(value * scale) for value in (r.q20_ms, r.median_ms, r.q80_ms))
    return f"{mid} {unit} ({low}–{high})" if spread else f"{mid} {unit}"


def _three(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"


def _peaks(pair: Pair) -> str:
    peaks = [r.peak_bytes for r in pair if r is not None]
    return "" if peaks[0] is None else " / ".join(_mb(peak) for peak in peaks if peak is not None)


def _mb(size: int) -> str:
    return _three(size / 1e6)
