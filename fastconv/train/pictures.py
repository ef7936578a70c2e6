"""Curves of a training as a PNG."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from fastconv.train.loop import Epoch

# Okabe and Ito's colours, which stay apart under the common colour blindnesses; splits differ by line style too.
_COLOURS = {"fastconv": "#0072B2", "torch": "#D55E00"}
_OTHER = "#009E73"
_STYLES = {"train": "-", "validation": "--"}


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError, with the command to type, where curves could not be drawn."""
    try:
        importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "curves are drawn by matplotlib, which is not installed: pip install 'fastconv[train]' (or matplotlib)"
        ) from error


def draw_curves(path: Path, epochs: Sequence[Epoch]) -> None:
    """Loss and accuracy over epochs, training and validation, for each kind of layers; a line per seed.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message holds the command.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A canvas of its own: nothing depends on the machine's display or on pyplot's global state.
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        _draw(axes, epochs, quantity)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axes, epochs: Sequence[Epoch], quantity: str) -> None:  # type: ignore[no-untyped-def]
    lines = sorted({(e.layers, e.seed) for e in epochs})
    labelled: set[tuple[str, str]] = set()
    for layers, seed in lines:
        line = [e for e in epochs if (e.layers, e.seed) == (layers, seed)]
        for split, style in _STYLES.items():
            values = [getattr(e, f"{split}_{quantity}") for e in line]
            label = f"{layers}, {split}" if (layers, split) not in labelled else None
            labelled.add((layers, split))
            axes.plot(
                [e.epoch for e in line],
                [100 * v for v in values] if quantity == "accuracy" else values,
                linestyle=style,
                linewidth=1.6,
                color=_COLOURS.get(layers, _OTHER),
                alpha=1.0 if len(lines) <= len(_COLOURS) else 0.55,
                marker="o" if len(line) == 1 else None,
                label=label,
            )
    axes.set_xlabel("epoch")
    axes.set_ylabel("cross-entropy loss" if quantity == "loss" else "accuracy / %")
    axes.grid(alpha=0.3)
    axes.legend()
