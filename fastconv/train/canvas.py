"""What pictures of a training are drawn on: a figure under a title, tiles on it, a file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastconv.bench.plots import sheet

GAP = 0.08  # between tiles, of their width
GREYS: dict[str, Any] = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0}  # of images in [0, 1] with one channel

_DPI = 120
_LEAST_WIDTH = 6.0  # inches, that titles fit
_PIXELS = 64  # of a tile's longer side, some as many as it is drawn with


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError, with the command to type, where nothing could be drawn."""
    try:
        importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures are drawn by matplotlib, which is not installed: pip install 'fastconv[train]' (or matplotlib)"
        ) from error


def titled(title: str, note: str, width: float, height: float, handles: Sequence[Any] = ()) -> Any:
    """An empty figure: `title`, in smaller print a note, a legend of `handles`, and below it `width` × `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A canvas of its own: nothing depends on the machine's display or on pyplot's global state.
    across, down = max(width, _LEAST_WIDTH), height + (0.78 if handles else 0.55)
    made = Figure(figsize=(across, down), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(made)
    engine: Any = made.get_layout_engine()
    engine.set(rect=(0.05 / across, 0.01, (width - 0.1) / across, height / down - 0.01))
    made.text(0.1 / across, 1 - 0.08 / down, title, va="top", fontsize=11, fontweight="bold")
    made.text(0.1 / across, 1 - 0.32 / down, note, va="top", color=sheet.GREY)
    if handles:
        top = 1 - 0.46 / down
        made.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0, top),
            ncols=len(handles),
            columnspacing=1.5,
            handlelength=2.6,
        )
    return made


def draw_tiles(
    axes: Any, shown: Sequence[Tensor], columns: int, *, under: float = 0.0, **look: Any
) -> list[tuple[float, float, float]]:
    """Draw pictures [H, W] or [H, W, 3] side by side in cells 1 wide, with `under` of room below each.

    Returns:
        Left, top and height of each.
    """
    from matplotlib.patches import Rectangle

    tall = shown[0].shape[0] / shown[0].shape[1]
    down = tall + under + GAP
    cells = [(at % columns * (1 + GAP), at // columns * down, tall) for at in range(len(shown))]
    for tile, (x, y, _) in zip(shown, cells, strict=True):
        # Small ones show their pixels; of large ones, drawn smaller than they are, none is left out.
        how = "nearest" if max(tile.shape[:2]) <= _PIXELS else "antialiased"
        axes.imshow(tile.numpy(), extent=(x, x + 1, y + tall, y), interpolation=how, **look)
        axes.add_patch(Rectangle((x, y), 1, tall, fill=False, edgecolor=sheet.GREY, linewidth=0.4, clip_on=False))
    axes.set(xlim=(0, columns * (1 + GAP) - GAP), ylim=(cells[-1][1] + down - GAP, 0), aspect="equal", anchor="NW")
    axes.set_axis_off()
    return cells


def colours(name: str) -> Any:
    """A map of matplotlib's in steps, few enough that a file with its 256 colours keeps every one; the middle is one."""
    from matplotlib import colormaps

    return colormaps[name].resampled(65)


def picture(image: Tensor) -> Tensor:
    """[C, H, W] as [H, W, 3] of three channels, or else as their mean [H, W]."""
    return image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)


def cut(name: str, most: int) -> str:
    """At most so many characters, of both ends."""
    end = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - end]}…{name[-end:]}"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def save(path: Path, paint: Callable[[], Any]) -> None:
    """Write the figure that `paint` makes, in the house's style."""
    require_matplotlib()
    from matplotlib import style

    path.parent.mkdir(parents=True, exist_ok=True)
    with style.context(["default", sheet.STYLE]):  # whatever the user's own settings are
        sheet.save(paint(), path, {})
