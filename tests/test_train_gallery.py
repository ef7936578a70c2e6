"""What of a trained net is drawn, and that looking changes nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

from fastconv.convert import convert
from fastconv.models import recipe_net, with_embedding
from fastconv.train import gallery, pictures

pytest.importorskip("matplotlib")

DIGITS = [str(digit) for digit in range(10)]


def _random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def _net(units: int | None = None, classes: int = 10, channels: int = 1) -> Any:
    torch.manual_seed(0)
    net = recipe_net(8, classes, in_channels=channels, width=8, max_width=16, layers="torch", batch_norm=True)
    return net if units is None else with_embedding(net, units)


def _batches(classes: int = 10, channels: int = 1, sizes: tuple[int, ...] = (20, 20, 7)) -> Iterator[tuple[Tensor, Tensor]]:
    """Once, as a loader gives them."""
    for seed, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(size, channels, 8, 8, generator=generator)
        yield images, torch.randint(classes, (size,), generator=generator)


def _state(model: nn.Module) -> list[Any]:
    """Whatever looking must not change: tensors, modes, hooks, classes."""
    modules = [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [*modules, *((name, id(t), t._version, t.stride()) for name, t in model.state_dict(keep_vars=True).items())]


def _half_training(model: nn.Module) -> nn.Module:
    model.train()
    model.features[1].eval()
    return model


@pytest.mark.parametrize("how", ["plain", "converted", "compiled"])
def test_feature_maps_are_those_of_the_layers(how: str) -> None:
    net = _net()
    image = next(_batches())[0][0]
    wanted, at = [], image[None].double()
    for name, layer in copy.deepcopy(net.features).double().eval().named_children():
        at = layer(at)
        if isinstance(layer, (nn.ReLU, nn.MaxPool2d)):
            wanted.append((f"features.{name}", at[0].clone()))
    model: Any = _half_training(convert(net) if how == "converted" else net)
    if how == "compiled":
        model = torch.compile(model, backend="eager")
    before = _state(model)
    found = gallery.feature_maps(model, image)
    assert _state(model) == before
    assert [name for name, _ in found] == [name for name, _ in wanted] == [f"features.{at}" for at in (2, 5, 6, 9, 12)]
    for (name, maps), (_, expected) in zip(found, wanted, strict=True):
        assert_close(maps, expected.detach(), torch.float32, 8 * 16 * 9, name)
        assert not maps.requires_grad


def test_looking_is_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    layers = OrderedDict(conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), drop=nn.Dropout(0.5), relu=nn.ReLU())
    layers |= OrderedDict(flatten=nn.Flatten(), embedding=nn.Linear(4 * 36, 2))
    model = nn.Sequential(layers)
    before = _state(model)
    ((_, maps),) = gallery.feature_maps(model, next(_batches())[0][0])
    points, _ = gallery.embedding(model, _batches())
    assert _state(model) == before
    images = torch.cat([images for images, _ in _batches()])
    model.eval()
    torch.testing.assert_close(maps, model[:4](images[:1])[0].detach())
    torch.testing.assert_close(points, model(images).detach())


class _Twice(nn.Module):
    """One ReLU at two sites, whose output is changed in place behind it; no convolution shows."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x - 1).add_(1)
        if self.fails:
            raise RuntimeError("on purpose")
        return self.relu(x).mean((2, 3))


def test_a_layer_that_is_called_twice_and_what_comes_behind() -> None:
    image = 2 * _random(1, 4, 4)
    (first, maps), (second, more) = gallery.feature_maps(_Twice(), image.clone())
    assert (first, second) == ("relu", "relu, call 2")
    assert torch.equal(maps, (image - 1).relu())
    assert torch.equal(more, maps + 1)


def test_hooks_are_gone_after_an_error() -> None:
    model = _Twice(fails=True)
    before = _state(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        gallery.feature_maps(model, torch.ones(1, 4, 4))
    assert _state(model) == before


def test_convolutions_stand_for_missing_activations() -> None:
    conv = nn.Conv2d(1, 2, 3)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    image = _random(1, 6, 6)
    ((name, maps),) = gallery.feature_maps(model, image)
    assert name == "0"
    torch.testing.assert_close(maps, conv(image[None])[0].detach())
    assert gallery.feature_maps(nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.ReLU()), image) == []


def test_first_filters() -> None:
    net = _net()
    weight = net.features[0].weight
    for model in (net, convert(net)):
        filters = gallery.first_filters(model)
        assert filters is not None and torch.equal(filters, weight) and not filters.requires_grad
    assert gallery.first_filters(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("how", ["plain", "converted", "compiled", "compiled in place"])
def test_embedding_of_a_net(how: str) -> None:
    model: Any = _net(units=3)
    images = torch.cat([images for images, _ in _batches()])
    features = nn.Sequential(*list(model.children())[:-1])
    expected = copy.deepcopy(nn.Sequential(features, model.classifier.embedding)).double().eval()
    expected = expected(images.double()).detach()
    if how == "converted":
        model = convert(model)
    if how == "compiled":
        model = torch.compile(model, backend="eager")
    if how == "compiled in place":
        model.compile(backend="eager")
    model.eval()(images)
    _half_training(model)
    before = _state(model)
    points, labels = gallery.embedding(model, _batches())
    assert _state(model) == before
    assert_close(points, expected, torch.float32, 16 * 16 * 9)
    assert torch.equal(labels, torch.cat([labels for _, labels in _batches()]))
    with pytest.raises(ValueError, match="named `embedding`"):
        gallery.embedding(_net(), _batches())


def test_predictions() -> None:
    model = _half_training(_net())
    before = _state(model)
    scores, labels = gallery.predictions(model, _batches())
    assert _state(model) == before
    assert scores.dtype == torch.float32 and not scores.requires_grad
    images = torch.cat([images for images, _ in _batches()])
    assert len(scores) == len(labels) == len(images)
    torch.testing.assert_close(scores.log(), model.eval()(images).log_softmax(1).detach())


def test_predictions_do_not_drop_and_keep_modes_after_an_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Dropout(0.5))
    model[0].eval()
    before = _state(model)
    first, again = (gallery.predictions(model, _batches(4))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert _state(model) == before
    with pytest.raises(RuntimeError):
        gallery.predictions(model, [(torch.zeros(1, 3), torch.zeros(1))])
    assert _state(model) == before


def test_a_single_score_is_of_two_classes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    scores, _ = gallery.predictions(model, _batches(2))
    images = torch.cat([images for images, _ in _batches(2)])
    second = model(images).sigmoid().detach()
    torch.testing.assert_close(scores, torch.cat((1 - second, second), 1))


def test_confusion_counts() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 1, 1, 2, 0])
    assert gallery.confusion(predicted, labels, 4).tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


ALWAYS = ["filters.png", "features.png", "confusion.png", "mistakes.png"]


@pytest.mark.parametrize("is_converted", [False, True])
@pytest.mark.parametrize(("units", "files"), [(None, ALWAYS), (3, ALWAYS), (2, [*ALWAYS[:2], "embedding.png", *ALWAYS[2:]])])
def test_what_applies_is_drawn(units: int | None, files: list[str], is_converted: bool, tmp_path: Path) -> None:
    net = _net(units)
    model = _half_training(convert(net) if is_converted else net)
    before = _state(model)
    written = gallery.draw(tmp_path / "net", model, _batches(), names=DIGITS, mean=0.5, std=0.25)
    assert _state(model) == before
    assert [path.name for path in written] == files
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == sorted(files)
    assert all(1000 < path.stat().st_size < 150_000 for path in written)


def test_a_net_without_maps_has_but_its_answers_drawn(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    written = gallery.draw(tmp_path, model, _batches(2), names=["no", "yes"], mean=0, std=1)
    assert [path.name for path in written] == ["confusion.png", "mistakes.png"]


def test_what_is_drawn_of_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst mistakes of all batches, and pixels as they were before they were standardised."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(pictures, "draw_mistakes", lambda path, *tensors, **told: seen.update(mistakes=tensors, **told))
    monkeypatch.setattr(pictures, "draw_features", lambda path, image, layers: seen.update(image=image))
    monkeypatch.setattr(pictures, "draw_confusion", lambda path, matrix, names: seen.update(matrix=matrix))
    model = _net(classes=4, channels=3)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1])
    pixels, labels = _random(90, 3, 8, 8), torch.arange(90) % 4
    images = (pixels - mean[:, None, None]) / std[:, None, None]
    parts = zip(images.split(40), labels.split(40), strict=True)
    gallery.draw(tmp_path, model, parts, names="abcd", mean=mean.tolist(), std=std)

    torch.testing.assert_close(seen["image"], pixels[0])
    top, predicted = gallery.predictions(model, [(images, labels)])[0].max(1)
    wrong = (predicted != labels).nonzero().flatten()
    assert len(wrong) > pictures.MOST_MISTAKES
    worst = wrong[top[wrong].argsort(descending=True)][: pictures.MOST_MISTAKES]
    shown, told, actual, scores = seen["mistakes"]
    torch.testing.assert_close(shown, pixels[worst])
    assert torch.equal(told, predicted[worst]) and torch.equal(actual, labels[worst])
    torch.testing.assert_close(scores, top[worst])
    assert (seen["total"], seen["among"]) == (len(wrong), 90)
    assert seen["matrix"].sum() == 90 and seen["matrix"].trace() == 90 - len(wrong)


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names must hold 10 classes as the scores do, got 2"):
        gallery.draw(tmp_path, _net(), _batches(), names=["a", "b"], mean=0, std=1)
    with pytest.raises(ValueError, match="holds no images"):
        gallery.draw(tmp_path, _net(), [], names=DIGITS, mean=0, std=1)
    assert not list(tmp_path.iterdir())
