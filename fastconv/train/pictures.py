"""Pictures of a training and of what came of it, as PNGs: curves, filters, feature maps, a 2-unit embedding, mistakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastconv.bench.plots import sheet
from fastconv.train.canvas import GAP, GREYS, colours, counted, cut, draw_tiles, picture, save, titled

MOST_FILTERS, MOST_MAPS, MOST_MISTAKES = 64, 8, 25  # of a picture; of a layer

# Okabe and Ito's colours, which stay apart under the common colour blindnesses; line styles and markers tell the same.
_LABELS = {"fastconv": sheet.OURS, "torch": sheet.STOCK, "compile": "#009E73"}
_CLASSES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
_MARKERS = "os^DvPX*p"  # one more than colours: together they repeat only after 72 classes

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
    for each in sorted(epochs, key=lambda each: (_place(each.label), each.epoch)):
        runs.setdefault(each.label, {}).setdefault(each.seed, []).append(each)
    free = [colour for colour in _CLASSES if colour not in _LABELS.values()]
    inks = {label: _LABELS.get(label, free[at % len(free)]) for at, label in enumerate(runs)}
    seeds = max(map(len, runs.values()))
    held_out = " and ".join(sorted({each.held_out for each in epochs}))
    splits = {"train": ("training", "-", True), "held_out": (held_out, "--", False)}
    point = "o" if len({each.epoch for each in epochs}) == 1 else ""  # a line of one point would not show

    what = f"{seeds} seeds as hair lines, and their mean." if seeds > 1 else f"Seed {epochs[0].seed}."
    figure = titled(
        f"Loss and accuracy over epochs, training and {held_out} images",
        f"{what} Where lines coincide, the wider one lies below." if len(runs) > 1 else what,
        *(10.0, 3.6),
        [
            sheet.marker(f"{label}, {split}", point, inks[label], is_filled, style)
            for label in runs
            for split, style, is_filled in splits.values()
        ],
    )
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        scale = 100 if quantity == "accuracy" else 1
        for at, (label, of_seeds) in enumerate(runs.items()):
            for name, (_, style, is_filled) in splits.items():
                look = {"linestyle": style, "marker": point, "color": inks[label]}
                look["mfc"] = inks[label] if is_filled else "white"
                lines = [{e.epoch: scale * getattr(e, f"{name}_{quantity}") for e in run} for run in of_seeds.values()]
                shared = [epoch for epoch in lines[0] if all(epoch in line for line in lines)]
                means = [sum(line[epoch] for line in lines) / len(lines) for epoch in shared]
                axes.plot(shared, means, linewidth=min(1.4 + 1.2 * (len(runs) - 1 - at), 4.0), **look)
                for line in lines if len(lines) > 1 else []:
                    axes.plot(list(line), list(line.values()), linewidth=0.5, alpha=0.6, **look)
        axes.set(xlabel="epoch", ylabel="cross-entropy loss" if quantity == "loss" else "accuracy / %")
        if point:
            axes.set_xlim(epochs[0].epoch - 1, epochs[0].epoch + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
    return figure


def _place(label: str) -> tuple[int, str]:
    """Of a label among others, whatever was trained first."""
    return (list(_LABELS).index(label) if label in _LABELS else len(_LABELS), label)


def _filters(weight: Tensor) -> Any:
    count, channels, height, width = weight.shape
    shown = weight[:MOST_FILTERS]
    columns = math.ceil(math.sqrt(len(shown)))
    cell, rows = min(1.2, 4.9 / columns), math.ceil(len(shown) / columns)
    kept = "" if count == len(shown) else f"the first {len(shown)} of "
    if channels == 3:
        note = "Red, green and blue weights, each filter scaled for itself; grey is 0."
    else:
        note = f"{'W' if channels == 1 else f'Means over {channels} channels of w'}eights, on one scale; white is 0."
    figure = titled(
        f"First layer: {kept}{counted(count, 'filter')} of {height}×{width}",
        note,
        columns * cell * (1 + GAP) + (0.2 if channels == 3 else 1.0),
        rows * cell * (height / width + GAP) + 0.15,
    )
    axes = figure.subplots()
    if channels == 3:
        most = shown.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        draw_tiles(axes, list((0.5 + shown / (2 * most)).permute(0, 2, 3, 1)), columns)
    else:
        means = shown.mean(1)
        end = means.abs().amax().item() or 1.0
        draw_tiles(axes, list(means), columns, cmap=colours("RdBu_r"), vmin=-end, vmax=end)
        _bar(figure, axes, columns * cell, rows * cell * height / width, label="weight")
    return figure


def _features(image: Tensor, layers: Sequence[tuple[str, Tensor]]) -> Any:
    heights = [2 * image.shape[-2] / image.shape[-1], *(maps.shape[-2] / maps.shape[-1] for _, maps in layers)]
    cell, title = 0.72, 0.32
    figure = titled(
        "What each layer makes of one image",
        f"The up to {MOST_MAPS} maps that vary most; bright is large, each has a scale of its own. Dead: 0 all over.",
        cell * (MOST_MAPS * (1 + GAP)) + 0.2,
        sum(cell * height + title for height in heights),
    )
    rows = figure.subplots(len(heights), squeeze=False, gridspec_kw={"height_ratios": [cell * h + title for h in heights]})
    first, *others = rows[:, 0]
    draw_tiles(first, [picture(image)], MOST_MAPS // 2, **GREYS)
    first.set_title(f"image: {' × '.join(map(str, image.shape))}", loc="left")
    scale = colours("viridis").with_extremes(bad="#DDDDDD")
    for axes, (name, maps) in zip(others, layers, strict=True):
        is_dead = ~maps.flatten(1).any(1)
        dead = f", {int(is_dead.sum())} dead" if is_dead.any() else ""
        axes.set_title(f"{name}: {counted(len(maps), 'map')} of {maps.shape[1]}×{maps.shape[2]}{dead}", loc="left")
        chosen = maps.flatten(1).var(1, correction=0).argsort(descending=True, stable=True)[:MOST_MAPS]
        tiles = [maps[at] / 0 if is_dead[at] else maps[at] for at in chosen]  # 0 / 0, which is drawn as no number
        cells = draw_tiles(axes, tiles, MOST_MAPS, cmap=scale)
        for at, (x, y, tall) in zip(chosen, cells, strict=True):
            if is_dead[at]:
                axes.text(x + 0.5, y + tall / 2, "dead", ha="center", va="center", fontsize=7, color=sheet.GREY)
    return figure


def _embedding(points: Tensor, labels: Tensor, names: Sequence[str]) -> Any:
    from matplotlib.patheffects import withStroke

    columns = math.ceil(len(names) / 32)
    figure = titled(
        f"{counted(len(points), 'image')} in the space of the 2-unit layer",
        "A point is an image, by its actual class, whose name stands at the median of its points where there is room.",
        6.5 + columns,
        5.8,
    )
    axes = figure.subplots()
    written: list[Any] = []
    size = min(20.0, max(4.0, 8000 / max(len(points), 1)))
    for label, name in enumerate(names):
        own = points[labels == label]
        if not len(own):
            continue
        look = {"color": _CLASSES[label % len(_CLASSES)], "marker": _MARKERS[label % len(_MARKERS)]}
        axes.scatter(*own.T.numpy(), s=size, alpha=0.7, linewidths=0.25, edgecolors="black", label=cut(name, 24), **look)
        centre = own.nanmedian(0).values.tolist()
        if all(map(math.isfinite, centre)):
            halo = [withStroke(linewidth=2.5, foreground="white")]
            text = axes.text(*centre, cut(name, 16), ha="center", va="center", fontweight="bold")
            text.set_path_effects(halo)
            written.append(text)
    axes.set(xlabel="unit 1", ylabel="unit 2")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid()
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=columns, markerscale=math.sqrt(24 / size))
    figure.draw_without_rendering()  # texts get their places and sizes
    boxes: list[Any] = []
    for text in written:
        box = text.get_window_extent()
        text.set_visible(not any(box.overlaps(other) for other in boxes))
        boxes += [box.padded(5)] if text.get_visible() else []
    return figure


def _confusion(matrix: Tensor, names: Sequence[str]) -> Any:
    from matplotlib.colors import PowerNorm

    count, images = len(names), int(matrix.sum())
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    cell = max(0.42, min(1.0, 3.5 / count)) if count <= _NUMBERED else 0.2 if count <= _NAMED else 9 / count
    room = 0.06 * max(len(cut(name, 24)) for name in names) if count <= _NAMED else 0.3
    is_long = count <= _NAMED and max(map(len, names)) > 6 * cell / 0.42
    note = "Colour: share of the row" + ("; cells without a number hold none." if count <= _NUMBERED else ".")
    figure = titled(
        f"Confusion matrix: {100 * int(matrix.trace()) / max(images, 1):.2f} % of {counted(images, 'image')} right",
        note,
        count * cell + room + 1.6,
        count * cell + (0.75 * room if is_long else 0.2) + 0.4,
    )
    axes = figure.subplots()
    blues, scale = colours("Blues"), PowerNorm(0.5, 0, 1)  # the root, that few mistakes show
    axes.imshow(shares.numpy(), cmap=blues, norm=scale)
    if count <= _NUMBERED:
        for row, column in matrix.nonzero().tolist():
            red, green, blue, _ = blues(scale(shares[row, column].item()))
            ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
            axes.text(column, row, f"{matrix[row, column]}", color=ink, fontsize=7, ha="center", va="center")
    if count <= _NAMED:
        labels = [cut(name, 24) for name in names]
        axes.set_yticks(range(count), labels)
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
        axes.set_xticks(range(count), labels, **turned)
        between = [at - 0.5 for at in range(1, count)]
        axes.hlines(between, -0.5, count - 0.5, color="#CCCCCC", linewidth=0.4)
        axes.vlines(between, -0.5, count - 0.5, color="#CCCCCC", linewidth=0.4)
    axes.spines[:].set_visible(True)
    axes.set(xlabel="predicted", ylabel="actual", anchor="W")
    bar = _bar(figure, axes, count * cell, count * cell, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    return figure


def _mistakes(images: Tensor, captions: Sequence[str], total: int, among: int) -> Any:
    if not captions:
        return titled(f"No mistakes among {counted(among, 'image')}", "Every one was given its own class.", 5.0, 0.1)
    columns = min(5, len(captions))
    tall = images.shape[-2] / images.shape[-1]
    under = 0.24 if any("\n" in caption for caption in captions) else 0.14
    cell = 1.3
    kept = "" if len(captions) == total else f"The {len(captions)} most confident of "
    figure = titled(
        f"{kept}{counted(total, 'mistake')} among {counted(among, 'image')}",
        "Below: predicted / actual class, probability of the predicted one; the most confident first.",
        columns * cell * (1 + GAP) + 0.1,
        math.ceil(len(captions) / columns) * cell * (tall + GAP + under),
    )
    axes = figure.subplots()
    cells = draw_tiles(axes, [picture(image) for image in images], columns, under=under, **GREYS)
    for caption, (x, y, _) in zip(captions, cells, strict=True):
        axes.text(x + 0.5, y + tall + 0.03, caption, ha="center", va="top", fontsize=7)
    return figure


def _caption(predicted: str, actual: str, score: float) -> str:
    predicted, actual = cut(predicted, 14), cut(actual, 14)
    behind = " " if len(predicted) + len(actual) <= 12 else "\n"
    return f"{predicted} /{behind}{actual}, {100 * score:.0f} %"


def _bar(figure: Any, axes: Any, width: float, height: float, **look: Any) -> Any:
    """The scale of what was drawn last, right of `axes`, which are some `width` × `height` inches."""
    return figure.colorbar(axes.images[-1], ax=axes, fraction=0.18 / width, aspect=height / 0.16, panchor=False, **look)
