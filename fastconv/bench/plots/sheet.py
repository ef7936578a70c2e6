"""What all pictures have in common: size, colours, the lines above the panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastconv.bench import pairs
from fastconv.bench.records import Record

_WIDTH, _DPI = 9.0, 150  # inches; a page shows a picture some 900 pixels wide
_COLOURS = 256  # of a file; as many as its format's indices tell apart, which makes it three times as small
_HEADER = 0.96  # inches: title, where and when, a note, legend

# Okabe and Ito's colours, which stay apart under the common colour blindnesses; hatches and markers tell the same.
OURS, STOCK, GREY = "#0072B2", "#D55E00", "#555555"
BARS = (("#56B4E9", ""), ("#E69F00", "////"))

STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.6,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
}


def figure(title: str, note: str, drawn: Sequence[Record], height: float) -> Any:
    """An empty one: `title`, in smaller print where and when its records were taken and a note, and `height` below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A canvas of its own: nothing depends on the machine's display or on pyplot's global state.
    whole = height + _HEADER
    made = Figure(figsize=(_WIDTH, whole), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(made)
    engine: Any = made.get_layout_engine()
    engine.set(rect=(0.008, 0.01, 0.984, height / whole - 0.01))
    where = f"{pairs.chip(drawn)}, torch {pairs.span(r.torch for r in drawn)}, {pairs.dates(drawn)}"
    made.text(0.01, 1 - 0.08 / whole, title, va="top", fontsize=11, fontweight="bold")
    made.text(0.01, 1 - 0.32 / whole, f"{where}\n{note}", va="top", color=GREY, linespacing=1.3)
    return made


def save(figure: Any, path: Path, notes: Mapping[str, str]) -> None:
    """As a PNG with text chunks: nothing in it hangs on when it was made."""
    from PIL import Image, PngImagePlugin

    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    pixels = Image.frombytes("RGBA", (width, height), bytes(figure.canvas.buffer_rgba()))
    chunks = PngImagePlugin.PngInfo()
    for key, text in notes.items():
        chunks.add_text(key, text)
    pixels.convert("RGB").quantize(_COLOURS).save(path, pnginfo=chunks, optimize=True)


def legend(figure: Any, handles: Sequence[Any]) -> None:
    top = 1 - 0.63 / figure.get_figheight()
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.0, top), ncols=len(handles), columnspacing=1.5)


def marker(label: str, marker: str, colour: str, filled: bool = True, line: Any = "") -> Any:
    """A legend's entry."""
    from matplotlib.lines import Line2D

    face = colour if filled else "white"
    return Line2D([], [], label=label, marker=marker, color=colour, linestyle=line, markersize=4, markerfacecolor=face)


def present(names: Sequence[str], used: Sequence[str]) -> list[str]:
    return [name for name in names if name in used]
