"""The data, the loop, checkpoints and pictures of a training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tolerances import assert_close

from fastconv.train import checkpoint, pictures
from fastconv.train.data import Augmentation, Dataset, Split, batches, load_digits
from fastconv.train.loop import Epoch, Settings, fit, one_cycle

pytest.importorskip("sklearn")

TINY = Settings(resolution=8, width=8, max_width=16, epochs=2, batch_size=32)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_digits(8)


@pytest.fixture(scope="module")
def few(digits: Dataset) -> Dataset:
    def head(split: Split, count: int) -> Split:
        return Split(split.images[:count], split.labels[:count], split.rows[:count])

    return dataclasses.replace(
        digits, train=head(digits.train, 100), validation=head(digits.validation, 40), test=head(digits.test, 40)
    )


def _generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_splits_are_disjoint_complete_and_stratified(digits: Dataset) -> None:
    splits = (digits.train, digits.validation, digits.test)
    rows = torch.cat([split.rows for split in splits])
    assert sorted(rows.tolist()) == list(range(1797))
    whole = torch.cat([split.labels for split in splits]).bincount()
    for split, share in zip(splits, (0.7, 0.1, 0.2), strict=True):
        assert (split.labels.bincount() - share * whole).abs().max() <= 1


def test_splits_do_not_follow_the_training_seed(digits: Dataset) -> None:
    torch.manual_seed(99)
    again = load_digits(8)
    assert torch.equal(again.test.rows, digits.test.rows)
    assert torch.equal(again.train.images, digits.train.images)


def test_images_are_resized_and_standardised(digits: Dataset) -> None:
    assert digits.train.images.shape[1:] == (1, 8, 8)
    assert load_digits(32).test.images.shape == (len(digits.test), 1, 32, 32)
    variance, mean = torch.var_mean(digits.train.images)
    assert mean.item() == pytest.approx(0, abs=1e-4)
    assert variance.item() == pytest.approx(1, abs=1e-3)
    assert digits.background == pytest.approx(digits.train.images.min().item(), abs=1e-4)


def test_batches_are_seeded_and_cover_every_image(few: Dataset) -> None:
    def epoch(generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(batches(few.train, 32, Augmentation(), background=few.background, generator=generator))

    first, second = epoch(_generator()), epoch(_generator())
    assert [len(labels) for _, labels in first] == [32, 32, 32, 4]
    for (a, la), (b, lb) in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)
    labels = torch.cat([labels for _, labels in first])
    assert torch.equal(labels.sort().values, few.train.labels.sort().values)
    other = epoch(_generator(4))
    assert not torch.equal(first[0][0], other[0][0])


def test_an_image_that_is_not_moved_stays_itself(few: Dataset) -> None:
    still = Augmentation(turn=0, scale=0, shift=0)
    ((images, labels),) = batches(few.train, 1000, still, background=few.background, generator=_generator())
    order = torch.randperm(len(few.train), generator=_generator())
    assert_close(images, few.train.images[order].double(), torch.float32, 4)  # bilinear: four products
    assert torch.equal(labels, few.train.labels[order])


def test_moves_stay_small_and_fill_with_background(few: Dataset) -> None:
    shift = Augmentation(turn=0, scale=0, shift=0.125)  # one pixel of eight
    ((images, _),) = batches(few.train, 1000, shift, background=few.background, generator=_generator())
    assert images.min() >= few.background - 1e-4
    assert not torch.equal(images, few.train.images)
    blank = Split(torch.full((4, 1, 8, 8), few.background), few.train.labels[:4], few.train.rows[:4])
    ((images, _),) = batches(blank, 4, Augmentation(), background=few.background, generator=_generator())
    torch.testing.assert_close(images, blank.images)
    inked = dataclasses.replace(blank, images=blank.images + 1)
    ((images, _),) = batches(inked, 4, shift, background=few.background, generator=_generator())
    assert (images.amin((1, 2, 3)) < few.background + 1).all(), "the side that an image moved away from is background"


def test_both_nets_learn_alike(few: Dataset) -> None:
    seen: list[Epoch] = []
    steps: list[int] = []
    outcomes = fit(few, TINY, on_step=lambda: steps.append(1), on_epoch=seen.append)
    assert [outcome.layers for outcome in outcomes] == ["fastconv", "torch"]
    assert len(steps) == 2 * 2 * 4
    assert sorted((e.epoch, e.layers) for e in seen) == [
        *((1, "fastconv"), (1, "torch")),
        *((2, "fastconv"), (2, "torch")),
    ]
    fused, plain = (outcome.epochs for outcome in outcomes)
    # Same weights, same batches: the first epochs differ by rounding only.
    assert fused[0].train_loss == pytest.approx(plain[0].train_loss, rel=1e-3)
    assert fused[1].train_loss < fused[0].train_loss
    assert all(0 <= outcome.test_accuracy <= 1 for outcome in outcomes)
    assert all(epoch.seconds > 0 for epoch in seen)


def test_the_seed_decides(few: Dataset) -> None:
    one = dataclasses.replace(TINY, epochs=1)
    (a,), (b,) = (fit(few, one, layers=("torch",)) for _ in range(2))
    (c,) = fit(few, dataclasses.replace(one, seed=1), layers=("torch",))
    losses = [outcome.epochs[0].train_loss for outcome in (a, b, c)]
    assert losses[0] == losses[1] != losses[2]


def test_one_cycle() -> None:
    shares = [one_cycle(step / 100) for step in range(101)]
    assert max(shares) == one_cycle(0.25) == 1
    assert shares == [*sorted(shares[:26]), *sorted(shares[26:], reverse=True)]
    assert 0 < shares[0] < 0.01
    assert 0 < shares[-1] < 0.01


@pytest.mark.slow
def test_digits_are_learnt() -> None:
    (outcome,) = fit(load_digits(Settings().resolution), Settings(), layers=("fastconv",))
    # Five seeds average 98.8% and more; a single one may fall a little short.
    assert outcome.test_accuracy >= 0.98


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"dtype": "int8"}], ids=str)
def test_settings(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        Settings(**wrong)


def test_bfloat16(few: Dataset) -> None:
    (outcome,) = fit(few, dataclasses.replace(TINY, dtype="bfloat16", epochs=1), layers=("fastconv",))
    assert outcome.epochs[0].train_loss > 0
    assert next(outcome.model.parameters()).dtype == torch.float32


def test_checkpoint(few: Dataset, tmp_path: Path) -> None:
    (outcome,) = fit(few, dataclasses.replace(TINY, epochs=1), layers=("fastconv",))
    path = tmp_path / "deep" / "net.pt"
    checkpoint.save(path, outcome, in_channels=1, classes=10)
    assert [file.name for file in path.parent.iterdir()] == ["net.pt"], "no partial file is left"
    outcome.model.eval()
    for layers in ("fastconv", "torch"):
        model, settings = checkpoint.load(path, layers=layers)
        assert settings == outcome.settings
        wanted = outcome.model(few.test.images).double()
        assert_close(model(few.test.images), wanted, torch.float32, TINY.max_width * 9)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.load(path)


def test_a_failed_save_leaves_the_old_file(few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (outcome,) = fit(few, dataclasses.replace(TINY, epochs=1), layers=("torch",))
    path = tmp_path / "net.pt"
    path.write_bytes(b"old")

    def full_disk(content: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, outcome, in_channels=1, classes=10)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    epochs = [
        Epoch(layers, seed, epoch, 1 / epoch, 1 - 1 / epoch, 1 / epoch, 1 - 1 / epoch, 1.0)
        for layers in ("fastconv", "torch")
        for seed in (0, 1)
        for epoch in (1, 2, 3)
    ]
    pictures.draw_curves(tmp_path / "curves.png", epochs)
    content = (tmp_path / "curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(content) > 10_000
