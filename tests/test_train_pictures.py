"""What is drawn of a training: the numbers behind each picture, and that looking at a net does not change it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv import models
from fastconv.train import canvas, gallery, pictures

pytest.importorskip("matplotlib")

NAMES = ("cat", "dog", "a class of a name that is much too long")


@dataclass(frozen=True)
class Line:
    label: str
    seed: int
    epoch: int
    train_loss: float
    train_accuracy: float
    held_out: str
    held_out_loss: float
    held_out_accuracy: float


def _lines(labels: tuple[str, ...], seeds: int, epochs: int) -> list[Line]:
    return [
        Line(label, seed, epoch, 2 / epoch + seed, 1 - 1 / (epoch + 1), "test", 1 / epoch, 1 - 0.5 / epoch)
        for label in labels
        for seed in range(seeds)
        for epoch in range(1, epochs + 1)
    ]


def _texts(figure) -> list[str]:
    found = [*figure.texts]
    for axes in figure.axes:
        found += [*axes.texts, axes.title, axes._left_title]
    return [text.get_text() for text in found if text.get_text()]


def _is_png(path: Path, least: int = 3_000) -> bool:
    content = path.read_bytes()
    return content[:8] == b"\x89PNG\r\n\x1a\n" and least < len(content) < 200_000


@pytest.mark.parametrize(("labels", "seeds", "epochs"), [(("fastconv",), 1, 1), (("fastconv", "torch", "compile"), 2, 3)])
def test_curves(labels: tuple[str, ...], seeds: int, epochs: int, tmp_path: Path) -> None:
    figure = pictures._curves(_lines(labels, seeds, epochs))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [f"{label}, {split}" for label in labels for split in ("training", "test")]
    loss, accuracy = figure.axes
    lines_each = len(labels) * 2 * (seeds + (seeds > 1))
    assert len(loss.lines) == len(accuracy.lines) == lines_each
    assert loss.lines[0].get_ydata().tolist() == [2 / epoch for epoch in range(1, epochs + 1)]
    if seeds > 1:
        assert loss.lines[seeds].get_ydata().tolist() == [2 / epoch + 0.5 for epoch in range(1, epochs + 1)], "the mean"
    held_out = accuracy.lines[seeds + (seeds > 1)]
    assert held_out.get_ydata().tolist() == pytest.approx([100 - 50 / epoch for epoch in range(1, epochs + 1)])
    pictures.draw_curves(tmp_path / "deep" / "curves.png", _lines(labels, seeds, epochs))
    assert _is_png(tmp_path / "deep" / "curves.png")
    with pytest.raises(ValueError, match="epochs must hold at least one"):
        pictures.draw_curves(tmp_path / "none.png", [])


@pytest.mark.parametrize(
    ("shape", "said"), [((70, 1, 3, 3), "the first 64 of 70"), ((5, 3, 7, 7), "5 of 7×7"), ((1, 4, 1, 1), "1 of 1×1")]
)
def test_filters(shape: tuple[int, ...], said: str, tmp_path: Path) -> None:
    weight = torch.randn(shape)
    figure = pictures._filters(weight)
    assert said in _texts(figure)[0]
    shown = figure.axes[0].images
    assert len(shown) == min(64, shape[0])
    for tile, own in zip(shown, weight, strict=False):
        if shape[1] == 3:
            expected = 0.5 + own.permute(1, 2, 0) / (2 * own.abs().max())
            assert expected.min() >= 0 and expected.max() <= 1
        else:
            expected = own.mean(0)
            assert tile.get_clim() == (-weight.mean(1).abs().max(), weight.mean(1).abs().max()), "one scale, 0 in its middle"
        torch.testing.assert_close(torch.from_numpy(tile.get_array().data), expected)
    pictures.draw_filters(tmp_path / "filters.png", weight)
    assert _is_png(tmp_path / "filters.png", 1_000)
    with pytest.raises(ValueError, match=r"weight must be \[K, C, R, S\], got \[3, 3\]"):
        pictures.draw_filters(tmp_path / "x.png", torch.zeros(3, 3))


def test_features_show_the_maps_that_vary_most() -> None:
    maps = torch.zeros(12, 4, 4)
    for channel in range(9):  # three are dead
        maps[channel, 0, 0] = channel + 1.0
    figure = pictures._features(torch.rand(1, 8, 8), [("features.1", maps), ("one", torch.rand(1, 2, 2))])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["image: 1 × 8 × 8", "features.1: 12 maps of 4×4, 3 dead", "one: 1 maps of 2×2"]
    shown = [tile.get_array().data[0, 0] for tile in figure.axes[1].images]
    assert shown == [9, 8, 7, 6, 5, 4, 3, 2]
    dead = pictures._features(torch.rand(3, 8, 8), [("x", torch.zeros(2, 3, 3))])
    assert [text.get_text() for text in dead.axes[1].texts] == ["dead", "dead"]


def test_embedding_names_each_class_at_its_points() -> None:
    points, labels = torch.tensor([[0.0, 1.0], [0.0, 3.0], [5.0, 5.0]]), torch.tensor([0, 0, 2])
    figure = pictures._embedding(points, labels, NAMES)
    (axes,) = figure.axes
    assert (axes.texts[0].get_text(), *axes.texts[0].get_position()) == ("cat", 0.0, 1.0)
    assert len(axes.texts) == len(axes.collections) == 2, "a class without images has no place"
    assert axes.texts[1].get_text().endswith("…")
    with pytest.raises(ValueError, match=r"points must be \[N, 2\], got \[4, 3\]"):
        pictures.draw_embedding(Path("x.png"), torch.zeros(4, 3), torch.zeros(4), NAMES)


def test_confusion_tells_counts_and_accuracy(tmp_path: Path) -> None:
    matrix = gallery.confusion(torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 1]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]], "rows are actual classes"
    figure = pictures._confusion(matrix, NAMES)
    assert "60.00 % of 5 images right" in _texts(figure)[0]
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert cells == {(0, 0): "1", (1, 0): "1", (1, 1): "1", (2, 1): "1", (2, 2): "1"}
    many = pictures._confusion(torch.eye(25), [str(number) for number in range(25)])
    assert not many.axes[0].texts, "no numbers in small cells"
    with pytest.raises(ValueError, match=r"matrix must be \[3, 3\] as names, got \[2, 2\]"):
        pictures.draw_confusion(tmp_path / "x.png", torch.eye(2), NAMES)


def test_mistakes_come_most_confident_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda path, paint: drawn.append(paint()))
    images = torch.arange(30.0).view(30, 1, 1, 1).expand(-1, 1, 4, 4) / 30
    predicted, actual, scores = torch.zeros(30).long(), torch.ones(30).long(), torch.linspace(0.3, 0.9, 30)
    told = {"names": NAMES, "total": 31, "among": 100}
    pictures.draw_mistakes(tmp_path / "x.png", images, predicted, actual, scores, **told)
    assert "The 25 most confident of 31 mistakes among 100 images" in _texts(drawn[0])[0]
    captions = [text.get_text() for text in drawn[0].axes[0].texts]
    assert len(captions) == 25 and captions[0] == "cat / dog, 90 %"
    assert drawn[0].axes[0].images[0].get_array().data[0, 0] == pytest.approx(29 / 30)
    none = torch.zeros(0).long()
    pictures.draw_mistakes(tmp_path / "x.png", images[:0], none, none, scores[:0], **{**told, "total": 0})
    assert _texts(drawn[1])[0] == "No mistakes among 100 images"
    with pytest.raises(ValueError, match="predicted must differ from actual"):
        pictures.draw_mistakes(tmp_path / "x.png", images, predicted, predicted, scores, **told)


def _net() -> nn.Module:
    torch.manual_seed(3)
    return models.with_embedding(models.recipe_net(16, 3, width=8, max_width=16, layers="torch", batch_norm=True), 2)


def _batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(20, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 3, (20,), generator=generator)
    return list(zip(images.split(8), labels.split(8), strict=True))


@pytest.mark.parametrize("converted", [False, True])
def test_a_net_is_looked_at_and_not_changed(converted: bool, tmp_path: Path) -> None:
    plain = _net()
    model = fastconv.convert(plain) if converted else plain
    model.train()
    model.features[0].eval()  # modes may be mixed
    modes = [module.training for module in model.modules()]
    kinds = [type(module) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    written = gallery.draw(tmp_path, model, _batches(), names=NAMES, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert [path.name for path in written] == [
        "filters.png",
        "features.png",
        "embedding.png",
        "confusion.png",
        "mistakes.png",
    ]
    assert all(_is_png(path) for path in written)
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for tree in (model, plain) for module in tree.modules())

    plain.eval()
    image = _batches()[0][0][0]
    maps, x = [], image[None]
    for name, layer in plain.features.named_children():
        x = layer(x)
        if isinstance(layer, (nn.ReLU, nn.MaxPool2d)):
            maps.append((f"features.{name}", x[0].detach().clone()))
    found = gallery.feature_maps(model, image)
    assert [name for name, _ in found] == [name for name, _ in maps]
    for (_, ours), (_, theirs) in zip(found, maps, strict=True):
        assert torch.equal(ours, theirs), "as before a later layer changed them in place"

    points, labels = gallery.embedding(model, _batches())
    images = torch.cat([images for images, _ in _batches()])
    with torch.no_grad():
        expected = plain.classifier.embedding(plain.flatten(plain.pool(plain.features(images))))
        scores = plain(images).softmax(1)
    torch.testing.assert_close(points, expected)
    assert torch.equal(labels, torch.cat([labels for _, labels in _batches()]))
    torch.testing.assert_close(gallery.predictions(model, _batches())[0], scores, rtol=1e-3, atol=1e-4)
    filters = gallery.first_filters(model)
    assert filters is not None and torch.equal(filters, plain.features[0].weight)


def test_a_net_of_one_output_and_without_maps(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 1))
    images = torch.cat([images for images, _ in _batches()])
    labels = torch.randint(0, 2, (20,))
    written = gallery.draw(tmp_path, model, [(images, labels)], names=("car", "truck"), mean=0.5, std=0.2)
    assert [path.name for path in written] == ["confusion.png", "mistakes.png"]
    scores, _ = gallery.predictions(model, [(images, labels)])
    torch.testing.assert_close(scores[:, 1], model(images).sigmoid()[:, 0])
    with pytest.raises(ValueError, match="names must hold 2 classes as the scores do, got 3"):
        gallery.draw(tmp_path, model, [(images, labels)], names=NAMES, mean=0.5, std=0.2)
    with pytest.raises(ValueError, match="batches holds no images"):
        gallery.draw(tmp_path, model, [], names=("car", "truck"), mean=0.5, std=0.2)
    with pytest.raises(ValueError, match=r"must have a torch\.nn\.Linear named `embedding`"):
        gallery.embedding(model, [(images, labels)])


def test_pixels_are_shown_as_they_were() -> None:
    pixels = torch.rand(2, 3, 4, 4)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    standardised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(gallery._pixels(standardised, mean, std), pixels)
    assert canvas.picture(pixels[0]).shape == (4, 4, 3)
