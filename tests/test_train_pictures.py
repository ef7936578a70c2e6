"""What the pictures of a training show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastconv.train import canvas, pictures

pytest.importorskip("matplotlib")

DIGITS = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class Epoch:
    label: str
    seed: int
    epoch: int
    train_loss: float
    train_accuracy: float
    held_out: str
    held_out_loss: float
    held_out_accuracy: float


def _epochs(label: str, seed: int, count: int, held_out: str = "validation") -> list[Epoch]:
    at = range(1, count + 1)
    return [Epoch(label, seed, e, (1 + seed) / e, 0.5 + 0.1 * seed, held_out, 2 / e, 1 - 1 / (1 + e)) for e in at]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []
    save = canvas.sheet.save

    def keeping(figure: Any, path: Path, notes: dict[str, str]) -> None:
        figures.append(figure)
        save(figure, path, notes)

    monkeypatch.setattr(canvas.sheet, "save", keeping)
    return figures


def _texts(figure: Any) -> list[str]:
    """Title and note."""
    return [text.get_text() for text in figure.texts]


def _tiles(axes: Any) -> list[Tensor]:
    return [torch.from_numpy(image.get_array().filled(math.nan)) for image in axes.images]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_curves_of_seeds_and_their_mean(tmp_path: Path, drawn: list[Any]) -> None:
    # The second seed of torch was cut short: there is no mean beyond.
    epochs = [*_epochs("torch", 0, 4), *_epochs("torch", 1, 3), *_epochs("fastconv", 0, 4), *_epochs("fastconv", 1, 4)]
    pictures.draw_curves(tmp_path / "deep" / "curves.png", epochs)
    content = (tmp_path / "deep" / "curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) < 150_000
    (figure,) = drawn
    assert _texts(figure)[0] == "Loss and accuracy over epochs, training and validation images"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("fastconv, training", "fastconv, validation"),
        *("torch, training", "torch, validation"),
    ]
    loss, accuracy = figure.axes
    found = [(line.get_color(), line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in loss.lines]
    assert len(found) == len(accuracy.lines) == 2 * 2 * 3
    blue, red = (handle.get_color() for handle in figure.legends[0].legend_handles[::2])
    assert (blue, "-", [1, 2, 3, 4], [1.5, 0.75, 0.5, 0.375]) in found, "the mean"
    assert (blue, "-", [1, 2, 3, 4], [2, 1, 2 / 3, 0.5]) in found, "a seed"
    assert (red, "-", [1, 2, 3], [1.5, 0.75, 0.5]) in found, "the mean, where there are both"
    assert (red, "--", [1, 2, 3, 4], [2, 1, 2 / 3, 0.5]) in found, "held-out images"
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([55] * 4), "in percent"
    widths = [max(line.get_linewidth() for line in loss.lines if line.get_color() == colour) for colour in (blue, red)]
    assert widths[0] > widths[1], "what lies below shows on both sides"


def test_curves_of_one_epoch_are_points(tmp_path: Path, drawn: list[Any]) -> None:
    pictures.draw_curves(tmp_path / "curves.png", _epochs("my net", 3, 1, "test"))
    (figure,) = drawn
    assert "Seed 3." in _texts(figure)[1]
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o", "o"]
    assert [tick for tick in figure.axes[0].get_xticks() if 0 < tick < 2] == [1]
    with pytest.raises(ValueError, match="at least one"):
        pictures.draw_curves(tmp_path / "none.png", [])


def test_filters_of_colours_are_scaled_one_by_one(tmp_path: Path, drawn: list[Any]) -> None:
    weight = torch.stack([_random(3, 5, 5) - 0.5, 100 * (_random(3, 5, 5, seed=1) - 0.5), torch.zeros(3, 5, 5)])
    pictures.draw_filters(tmp_path / "filters.png", weight)
    (figure,) = drawn
    assert _texts(figure)[0] == "First layer: 3 filters of 5×5"
    tiles = _tiles(figure.axes[0])
    assert [list(tile.shape) for tile in tiles] == [[5, 5, 3]] * 3
    for tile, filter_ in zip(tiles[:2], weight, strict=False):
        assert (tile - 0.5).abs().max() == pytest.approx(0.5)
        torch.testing.assert_close(2 * (tile - 0.5) * filter_.abs().max(), filter_.permute(1, 2, 0))
    assert (tiles[2] == 0.5).all(), "grey is 0"


@pytest.mark.parametrize("channels", [1, 2])
def test_filters_share_a_scale(channels: int, tmp_path: Path, drawn: list[Any]) -> None:
    weight = _random(70, channels, 3, 3) - 0.7
    pictures.draw_filters(tmp_path / "filters.png", weight)
    (figure,) = drawn
    title, note = _texts(figure)
    assert title == "First layer: the first 64 of 70 filters of 3×3"
    assert ("Means over 2 channels" in note) == (channels == 2)
    images = figure.axes[0].images
    assert len(images) == 64
    means = weight[:64].mean(1)
    torch.testing.assert_close(torch.stack(_tiles(figure.axes[0])), means)
    assert {image.get_clim() for image in images} == {(-means.abs().max().item(), means.abs().max().item())}
    assert len(figure.axes) == 2, "a colour bar"
    left, right, bottom, top = images[10].get_extent()
    assert (round(left, 2), round(right, 2), round(top, 2), round(bottom, 2)) == (2.16, 3.16, 1.08, 2.08), "eight a row"


def test_features_are_those_that_vary_most(tmp_path: Path, drawn: list[Any]) -> None:
    maps = _random(12, 4, 6) * torch.arange(12)[:, None, None]
    few = torch.stack([torch.zeros(3, 3), torch.ones(3, 3), torch.eye(3)])
    pictures.draw_features(tmp_path / "features.png", _random(1, 8, 8), [("features.4", maps), ("last", few)])
    assert (tmp_path / "features.png").stat().st_size < 150_000
    (figure,) = drawn
    image, first, last = figure.axes
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["image: 1 × 8 × 8", "features.4: 12 maps of 4×6, 1 dead", "last: 3 maps of 3×3, 1 dead"]
    assert image.images[0].get_clim() == (0, 1)
    order = maps.flatten(1).var(1).argsort(descending=True)[:8]
    torch.testing.assert_close(torch.stack(_tiles(first)), maps[order])
    assert not first.texts
    torch.testing.assert_close(_tiles(last)[0], few[2])
    assert _tiles(last)[1].isnan().all(), "no colour of the scale"
    assert [text.get_text() for text in last.texts] == ["dead"]


def test_embedding(tmp_path: Path, drawn: list[Any]) -> None:
    labels = torch.arange(90) % 3
    points = _random(90, 2) + 10 * labels[:, None]
    points[labels == 2] = points[labels == 1]  # one class upon another: a name too many
    pictures.draw_embedding(tmp_path / "embedding.png", points, labels, ["cat", "dog", "cow", "none"])
    assert (tmp_path / "embedding.png").stat().st_size < 150_000
    (figure,) = drawn
    (axes,) = figure.axes
    assert _texts(figure)[0] == "90 images in the space of the 2-unit layer"
    for cloud, label in zip(axes.collections, range(3), strict=True):
        torch.testing.assert_close(torch.from_numpy(cloud.get_offsets().data), points[labels == label].double())
    assert len({tuple(cloud.get_facecolor()[0]) for cloud in axes.collections}) == 3
    assert len({len(cloud.get_paths()[0].vertices) for cloud in axes.collections}) > 1, "markers differ too"
    shown = {text.get_text(): text.get_visible() for text in axes.texts}
    assert shown == {"cat": True, "dog": True, "cow": False}
    assert axes.texts[0].get_position() == pytest.approx(points[labels == 0].median(0).values.tolist())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["cat", "dog", "cow"]
    assert axes.get_aspect() == 1


def test_confusion(tmp_path: Path, drawn: list[Any]) -> None:
    matrix = torch.tensor([[98, 2, 0], [0, 50, 0], [0, 0, 0]])
    pictures.draw_confusion(tmp_path / "confusion.png", matrix, ["cat", "dog", "a name of some thirty characters"])
    (figure,) = drawn
    axes = figure.axes[0]
    assert _texts(figure)[0] == "Confusion matrix: 98.67 % of 150 images right"
    numbers = {tuple(map(round, text.get_position())): (text.get_text(), text.get_color()) for text in axes.texts}
    assert numbers == {(0, 0): ("98", "white"), (1, 0): ("2", "black"), (1, 1): ("50", "white")}, "column, row"
    (image,) = axes.images
    torch.testing.assert_close(_tiles(axes)[0], torch.tensor([[0.98, 0.02, 0], [0, 1, 0], [0, 0, 0]]))
    assert image.norm(0.01) == pytest.approx(0.1), "one of a hundred shows"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "actual")
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:2] == ["cat", "dog"] and len(names[2]) == 24 and names[2].startswith("a name of") and "…" in names[2]


@pytest.mark.parametrize(("classes", "has_numbers", "has_names"), [(20, True, True), (21, False, True), (61, False, False)])
def test_confusion_of_many(classes: int, has_numbers: bool, has_names: bool, tmp_path: Path, drawn: list[Any]) -> None:
    names = [f"class {label}" for label in range(classes)]
    pictures.draw_confusion(tmp_path / "confusion.png", torch.eye(classes, dtype=torch.int64), names)
    axes = drawn[0].axes[0]
    assert len(axes.texts) == classes * has_numbers
    assert ("class 7" in [label.get_text() for label in axes.get_yticklabels()]) == has_names


def test_mistakes_are_ordered_by_confidence(tmp_path: Path, drawn: list[Any]) -> None:
    images = _random(30, 3, 4, 4)
    scores = torch.linspace(0.5, 0.79, 30)
    predicted, actual = torch.arange(30) % 10, (torch.arange(30) + 1) % 10
    told = {"names": DIGITS, "total": 40, "among": 1000}
    pictures.draw_mistakes(tmp_path / "mistakes.png", images, predicted, actual, scores, **told)
    (figure,) = drawn
    (axes,) = figure.axes
    assert _texts(figure)[0] == "The 25 most confident of 40 mistakes among 1,000 images"
    torch.testing.assert_close(torch.stack(_tiles(axes)), images.flip(0)[:25].permute(0, 2, 3, 1))
    captions = [text.get_text() for text in axes.texts]
    assert len(captions) == 25
    assert captions[:2] == ["9 / 0, 79 %", "8 / 9, 78 %"]
    with pytest.raises(ValueError, match="must differ"):
        pictures.draw_mistakes(tmp_path / "mistakes.png", images, actual, actual, scores, **told)


def test_long_names_take_two_lines(tmp_path: Path, drawn: list[Any]) -> None:
    names = ["an automobile of some kind", "a pickup truck"]
    one, of = torch.tensor([1]), {"names": names, "total": 1, "among": 1}
    pictures.draw_mistakes(tmp_path / "mistakes.png", _random(1, 1, 4, 4), one - 1, one, torch.tensor([0.5]), **of)
    assert _texts(drawn[0])[0] == "1 mistake among 1 image"
    (caption,) = drawn[0].axes[0].texts
    assert caption.get_text() == "an auto…e kind /\na pickup truck, 50 %"


def test_no_mistakes(tmp_path: Path, drawn: list[Any]) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    told = {"names": DIGITS, "total": 0, "among": 360}
    pictures.draw_mistakes(tmp_path / "mistakes.png", torch.zeros(0, 1, 8, 8), none, none, torch.zeros(0), **told)
    assert _texts(drawn[0])[0] == "No mistakes among 360 images"
    assert (tmp_path / "mistakes.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: pictures.draw_filters(path, torch.zeros(3, 3)), r"weight must be \[K, C, R, S\], got \[3, 3\]"),
        (lambda path: pictures.draw_embedding(path, torch.zeros(4, 3), torch.zeros(4), ["a"]), r"points must be \[N, 2\]"),
        (lambda path: pictures.draw_confusion(path, torch.zeros(2, 2), ["a"]), r"matrix must be \[1, 1\] as names"),
    ],
)
def test_shapes(call: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "picture.png")
