"""Pictures of a chip's records: ratios over stock torch as bars, a roofline, and what becomes of a layer that grows."""

from __future__ import annotations

import hashlib
import importlib
import json
import struct
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from fastconv.bench.plots import bars, roofline, scaling, sheet
from fastconv.bench.records import Record

_KEY = "records"  # of the text chunk that holds a picture's digest
_DIRECTIONS = {"forward": "forward", "both": "forward + backward"}

# Name → what selects a picture's records, in parts where they are more than one picture holds, and what draws a part.
_PICTURES: dict[str, tuple[Callable[[list[Record]], list[list[Record]]], Callable[[list[Record]], Any]]] = {
    name: (
        partial(bars.select, suites=suites, directions=directions),
        partial(bars.paint, title=title, directions=directions),
    )
    for name, title, suites, directions in (
        ("nets", "Whole nets", ("models", "training"), {"forward": "inference", "step": "training step"}),
        ("layers", "Single layers", ("layers",), _DIRECTIONS),
        ("pools", "Pools", ("pools",), _DIRECTIONS),
    )
} | {
    "roofline": (partial(roofline.select, directions=_DIRECTIONS), partial(roofline.paint, directions=_DIRECTIONS)),
    "scaling": (partial(scaling.select, directions=_DIRECTIONS), partial(scaling.paint, directions=_DIRECTIONS)),
}


def draw(records: Iterable[Record], folder: Path) -> list[Path]:
    """Write the pictures that records of one chip allow, each with the digest of its records in its metadata.

    The same records give the same bytes under the same matplotlib.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message holds the command.
        ValueError: the records are of several chips.
    """
    made = _selected(records)
    if not made:
        return []
    require()
    from matplotlib import style

    folder.mkdir(parents=True, exist_ok=True)
    for file, (paint, drawn) in made.items():
        with style.context(["default", sheet.STYLE]):  # whatever the user's own settings are
            sheet.save(paint(drawn), folder / file, {_KEY: digest(drawn)})
    return [folder / file for file in made]


def require() -> None:
    """Raise where pictures cannot be drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message holds the command.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures are drawn by matplotlib, which is not installed: pip install 'fastconv[bench]' (or matplotlib)"
        ) from error


def pictures(records: Iterable[Record]) -> dict[str, list[Record]]:
    """What `draw` would write: name of the file → the records that it is drawn from."""
    return {file: drawn for file, (_, drawn) in _selected(records).items()}


def digest(records: Iterable[Record]) -> str:
    """Of exactly these records, in their order."""
    rows = [vars(record) for record in records]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def drawn_from(path: Path) -> str | None:
    """The digest of the records that a PNG was drawn from; None where it says nothing of them."""
    content = path.read_bytes()
    at = 8  # behind the signature; a chunk is a length, a name, its data and a checksum
    while at < len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        key, _, value = content[at + 8 : at + 8 + length].partition(b"\0")
        if (name, key) == (b"tEXt", _KEY.encode()):
            return value.decode("latin-1")
        at += 12 + length
    return None


def _selected(records: Iterable[Record]) -> dict[str, tuple[Callable[[list[Record]], Any], list[Record]]]:
    listed = list(records)
    made = {}
    for name, (select, paint) in _PICTURES.items():
        for page, drawn in enumerate(select(listed), 1):
            made[f"{name}.png" if page == 1 else f"{name}_{page}.png"] = (paint, drawn)
    return made
