"""Pictures of a training and of what came of it, as PNGs: curves, filters, feature maps, a 2-unit embedding, mistakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastconv.bench.plots import sheet
from fastconv.train.canvas import GAP, GREYS, cut, draw_tiles, picture, save, titled

MOST_FILTERS, MOST_MAPS, MOST_MISTAKES = 64, 8, 25  # of a picture; of a layer

# Okabe and Ito's colours, which stay apart under the common colour blindnesses; line styles and markers tell the same.
_LABELS = {"fastconv": sheet.OURS, "torch": sheet.STOCK, "compile": "#009E73"}
_CLASSES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
_MARKERS = "os^DvPX*p"  # one more than colours: together they repeat only after 72 classes

_LEAST_WIDTH = 6.0  # inches, that titles fit
_SIGNED = "RdBu_r"  # a map of colours from negative to positive numbers
_NUMBERED, _NAMED = 20, 60  # classes up to which a matrix shows counts, and names


class Curve(Protocol):
    """What a line is drawn from: an epoch of one net. Losses are means over images; accuracies are shares in [0, 1]."""

    @property
    def label(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def train_loss(self) -> float: ...
    @property
    def train_accuracy(self) -> float: ...
    @property
    def held_out(self) -> str: ...
    @property
    def held_out_loss(self) -> float: ...
    @property
    def held_out_accuracy(self) -> float: ...


def draw_curves(path: Path, epochs: Sequence[Curve]) -> None:
    """Loss and accuracy over epochs, in training and on held-out images: a line for each label and seed.

    Of several seeds the lines are thin, and their mean, as far as every seed has come, is thick.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message holds the command.
        ValueError: no epochs.
    """
    if not epochs:
        raise ValueError("draw_curves: epochs must hold at least one, got none")
    save(path, lambda: _curves(epochs))


def draw_filters(path: Path, weight: Tensor) -> None:
    """The filters [K, C, R, S] of a first layer, each as a small picture; at most the first 64.

    With three channels they are colours, each filter scaled for itself around grey; else their mean over channels is
    drawn, on one scale for all that is white at 0.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message holds the command.
        ValueError: `weight` has not four dimensions.
    """
    if weight.dim() != 4:
        raise ValueError(f"draw_filters: weight must be [K, C, R, S], got {list(weight.shape)}")
    save(path, lambda: _filters(weight.detach().to("cpu", torch.float32)))


def draw_features(path: Path, image: Tensor, layers: Sequence[tuple[str, Tensor]]) -> None:
    """An image [C, H, W] in [0, 1], and below it a row for each layer: the 8 of its maps [C, H, W] that vary most.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message holds the command.
    """
    save(path, lambda: _features(image, layers))


def draw_embedding(path: Path, points: Tensor, labels: Tensor, names: Sequence[str]) -> None:
    """Points [N, 2], each an image in the space of a layer of two units, by colour and marker of its label [N].

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message holds the command.
        ValueError: `points` is not [N, 2].
    """
    if points.dim() != 2 or points.shape[1] != 2:
        raise ValueError(f"draw_embedding: points must be [N, 2], got {list(points.shape)}")
    save(path, lambda: _embedding(points.detach().to("cpu", torch.float32), labels.cpu(), names))


def draw_confusion(path: Path, matrix: Tensor, names: Sequence[str]) -> None:
    """Counts [K, K] of images of a class (row) that were taken for a class (column), coloured by their share of the row.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message holds the command.
        ValueError: `matrix` is not [K, K] for K names.
    """
    if list(matrix.shape) != [len(names), len(names)]:
        raise ValueError(f"draw_confusion: matrix must be [{len(names)}, {len(names)}] as names, got {list(matrix.shape)}")
    save(path, lambda: _confusion(matrix.cpu(), names))


def draw_mistakes(
    path: Path,
    images: Tensor,
    predicted: Tensor,
    actual: Tensor,
    scores: Tensor,
    *,
    names: Sequence[str],
    total: int,
    among: int,
) -> None:
    """Images [M, C, H, W] in [0, 1] that were taken for another class, the most confident mistakes first; at most 25.

    Args:
        predicted, actual: classes int64 [M].
        scores: probabilities [M] of the predicted classes.
        total, among: how many mistakes there are altogether, among how many images.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message holds the command.
        ValueError: one of them is no mistake.
    """
    if bool((predicted == actual).any()):
        raise ValueError("draw_mistakes: predicted must differ from actual for every image, but does not for some")
    order = scores.argsort(descending=True, stable=True)[:MOST_MISTAKES]
    told = zip(*(part[order].tolist() for part in (predicted, actual, scores)), strict=True)
    captions = [_caption(names[p], names[a], score) for p, a, score in told]
    save(path, lambda: _mistakes(images[order].cpu(), captions, total, among))


def _curves(epochs: Sequence[Curve]) -> Any:
    from matplotlib.ticker import MaxNLocator

    runs: dict[str, dict[int, list[Curve]]] = {}
    for each in sorted(epochs, key=lambda each: each.epoch):
        runs.setdefault(each.label, {}).setdefault(each.seed, []).append(each)
    free = [colour for colour in _CLASSES if colour not in _LABELS.values()]
    colours = {label: _LABELS.get(label, free[at % len(free)]) for at, label in enumerate(runs)}
    held_out = " and ".join(sorted({each.held_out for each in epochs}))
    splits = {"train": ("training", "-", True), "held_out": (held_out, "--", False)}
    seeds = max(map(len, runs.values()))
    point = "o" if len({each.epoch for each in epochs}) == 1 else ""

    figure = titled(
        f"Loss and accuracy over epochs, training and {held_out} images",
        f"Thin: {seeds} seeds, a line each; thick: their mean." if seeds > 1 else "One seed.",
        *(10.0, 3.6),
        [
            sheet.marker(f"{label}, {split}", point, colours[label], is_filled, style)
            for label in runs
            for split, style, is_filled in splits.values()
        ],
    )
    for axes, (quantity, unit, scale) in zip(
        figure.subplots(1, 2), (("loss", "cross-entropy loss", 1), ("accuracy", "accuracy / %", 100)), strict=True
    ):
        for label, of_seeds in runs.items():
            for name, (_, style, is_filled) in splits.items():
                colour = colours[label]
                look = {"linestyle": style, "marker": point, "color": colour, "mfc": colour if is_filled else "white"}
                lines = [{e.epoch: scale * getattr(e, f"{name}_{quantity}") for e in run} for run in of_seeds.values()]
                for line in lines:
                    axes.plot(list(line), list(line.values()), linewidth=0.6 if seeds > 1 else 1.6, **look)
                shared = [epoch for epoch in lines[0] if all(epoch in line for line in lines)]
                if seeds > 1:
                    means = [sum(line[epoch] for line in lines) / len(lines) for epoch in shared]
                    axes.plot(shared, means, linewidth=2.0, **look)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
    return figure


def _filters(weight: Tensor) -> Any:
    count, channels, height, width = weight.shape
    shown = weight[:MOST_FILTERS]
    which = f"the first {len(shown)} of {count}" if count > len(shown) else f"{count}"
    columns = math.ceil(math.sqrt(len(shown)))
    if channels == 3:
        note = "Red, green and blue weights, each filter scaled for itself; grey is 0."
    else:
        averaged = "" if channels == 1 else f"Means over the {channels} channels; "
        note = f"{averaged}one scale for all filters; white is 0.".capitalize()
    rows = math.ceil(len(shown) / columns)
    cell = min(0.9, 5.0 / columns)
    figure = titled(
        f"Filters of the first layer: {which} of {height}×{width}", note, _LEAST_WIDTH, rows * cell * height / width + 0.2
    )
    axes = figure.subplots()
    if channels == 3:
        most = shown.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        draw_tiles(axes, list((0.5 + shown / (2 * most)).permute(0, 2, 3, 1)), columns)
    else:
        tiles = shown.mean(1)
        end = tiles.abs().amax().item() or 1.0
        draw_tiles(axes, list(tiles), columns, cmap=_SIGNED, vmin=-end, vmax=end)
        figure.colorbar(axes.images[-1], ax=axes, label="weight", fraction=0.05, aspect=15)
    return figure


def _features(image: Tensor, layers: Sequence[tuple[str, Tensor]]) -> Any:
    from matplotlib import colormaps

    heights = [2 * image.shape[-2] / image.shape[-1], *(maps.shape[-2] / maps.shape[-1] for _, maps in layers)]
    cell, title = 0.72, 0.32
    figure = titled(
        "What each layer makes of one image",
        f"The up to {MOST_MAPS} maps that vary most; bright is large, each row has its own scale. Dead: 0 all over.",
        cell * (MOST_MAPS * (1 + GAP)) + 0.2,
        sum(cell * height + title for height in heights),
    )
    rows = figure.subplots(len(heights), squeeze=False, gridspec_kw={"height_ratios": [cell * h + title for h in heights]})
    first, *others = rows[:, 0]
    draw_tiles(first, [picture(image)], MOST_MAPS // 2, **GREYS)
    first.set_title(f"image: {' × '.join(map(str, image.shape))}", loc="left")
    colours = colormaps["viridis"].with_extremes(bad="#DDDDDD")
    for axes, (name, maps) in zip(others, layers, strict=True):
        is_dead = ~maps.flatten(1).any(1)
        dead = f", {int(is_dead.sum())} dead" if is_dead.any() else ""
        axes.set_title(f"{name}: {len(maps)} maps of {maps.shape[1]}×{maps.shape[2]}{dead}", loc="left")
        chosen = maps.flatten(1).var(1, correction=0).argsort(descending=True, stable=True)[:MOST_MAPS]
        shown = maps[chosen]
        low, high = min(0.0, shown.min().item()), shown.max().item()
        blank = torch.full_like(shown[0], math.nan)
        tiles = [blank if is_dead[at] else maps[at] for at in chosen]
        cells = draw_tiles(axes, tiles, MOST_MAPS, cmap=colours, vmin=low, vmax=high if high > low else low + 1)
        for at, (x, y, tall) in zip(chosen, cells, strict=True):
            if is_dead[at]:
                axes.text(x + 0.5, y + tall / 2, "dead", ha="center", va="center", fontsize=7, color=sheet.GREY)
    return figure


def _embedding(points: Tensor, labels: Tensor, names: Sequence[str]) -> Any:
    from matplotlib.patheffects import withStroke

    figure = titled(
        f"{len(points):,} images in the space of the 2-unit layer",
        "A point is an image, by its actual class, whose name stands at the median of its points.",
        *(7.5, 5.8),
    )
    axes = figure.subplots()
    size = min(20.0, max(4.0, 8000 / max(len(points), 1)))
    for label, name in enumerate(names):
        own = points[labels == label]
        if not len(own):
            continue
        look = {"color": _CLASSES[label % len(_CLASSES)], "marker": _MARKERS[label % len(_MARKERS)]}
        axes.scatter(*own.T.numpy(), s=size, alpha=0.7, linewidths=0.3, edgecolors="white", label=cut(name, 24), **look)
        centre = own.nanmedian(0).values.tolist()
        if all(map(math.isfinite, centre)):
            halo = [withStroke(linewidth=2.5, foreground="white")]
            axes.text(*centre, cut(name, 24), ha="center", va="center", fontweight="bold", path_effects=halo)
    axes.set(xlabel="unit 1", ylabel="unit 2")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid()
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=math.ceil(len(names) / 32))
    return figure


def _confusion(matrix: Tensor, names: Sequence[str]) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    count, images = len(names), int(matrix.sum())
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    cell = max(0.42, min(1.0, 3.5 / count)) if count <= _NUMBERED else 0.2 if count <= _NAMED else 9 / count
    room = 0.06 * max(len(cut(name, 24)) for name in names) if count <= _NAMED else 0.2
    is_long = count <= _NAMED and max(map(len, names)) > 6 * cell / 0.42
    note = "Colour: share of the row" + ("; cells without a number hold none." if count <= _NUMBERED else ".")
    figure = titled(
        f"Confusion matrix: {100 * int(matrix.trace()) / max(images, 1):.2f} % of {images:,} images right",
        note,
        max(_LEAST_WIDTH, count * cell + room + 1.6),
        count * cell + (0.75 * room if is_long else 0.2) + 0.4,
    )
    axes = figure.subplots()
    colours, scale = colormaps["Blues"], PowerNorm(0.5, 0, 1)  # the root, that few mistakes show
    drawn = axes.imshow(shares.numpy(), cmap=colours, norm=scale)
    if count <= _NUMBERED:
        for row, column in matrix.nonzero().tolist():
            red, green, blue, _ = colours(scale(shares[row, column].item()))
            is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            where = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(column, row, f"{matrix[row, column]}", color="white" if is_dark else "black", **where)
    if count <= _NAMED:
        labels = [cut(name, 24) for name in names]
        axes.set_yticks(range(count), labels)
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
        axes.set_xticks(range(count), labels, **turned)
    axes.spines[:].set_visible(True)
    axes.set(xlabel="predicted", ylabel="actual", anchor="W")
    bar = figure.colorbar(drawn, ax=axes, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], fraction=0.05, aspect=25)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    return figure


def _mistakes(images: Tensor, captions: Sequence[str], total: int, among: int) -> Any:
    if not captions:
        return titled(f"No mistakes among {among:,} images", "Every one was given its own class.", _LEAST_WIDTH, 0.1)
    columns = min(5, len(captions))
    tall = images.shape[-2] / images.shape[-1]
    under = 0.24 if any("\n" in caption for caption in captions) else 0.14
    cell = 1.3
    what = f"{total:,} mistakes" if len(captions) == total else f"The {len(captions)} most confident of {total:,} mistakes"
    figure = titled(
        f"{what} among {among:,} images",
        "Below: predicted / actual class, probability of the predicted one; the most confident first.",
        max(_LEAST_WIDTH, columns * cell * (1 + GAP)),
        math.ceil(len(captions) / columns) * cell * (tall + GAP + under),
    )
    axes = figure.subplots()
    cells = draw_tiles(axes, [picture(image) for image in images], columns, under=under, **GREYS)
    for caption, (x, y, _) in zip(captions, cells, strict=True):
        axes.text(x + 0.5, y + tall + 0.03, caption, ha="center", va="top", fontsize=7)
    return figure


def _caption(predicted: str, actual: str, score: float) -> str:
    predicted, actual = cut(predicted, 20), cut(actual, 20)
    behind = " " if len(predicted) + len(actual) <= 14 else "\n"
    return f"{predicted} /{behind}{actual}, {100 * score:.0f} %"
