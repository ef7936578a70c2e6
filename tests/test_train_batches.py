"""Batches of a training: seeded, shared among processes, resumed in the middle, wherever images lie; and evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import made_data
import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from fastconv.train import augment
from fastconv.train.augment import Augmentation
from fastconv.train.batches import Batches, evaluation, standardise
from fastconv.train.data import Dataset, Files, Split, load

CPU = torch.device("cpu")
NONE, CIFAR, WRITTEN, PHOTOS = map(augment.default, ("synthetic", "cifar10", "digits", "folder"))
Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def data() -> Dataset:
    """80 training images, each of one value: its row."""
    data = load("synthetic:100", resolution=8)
    return dataclasses.replace(data, train=numbered(data.train))


def numbered(split: Split) -> Split:
    rows = torch.arange(len(split), dtype=torch.uint8)
    return Split(rows[:, None, None, None].expand(-1, 3, 8, 8).contiguous(), split.labels, split.names)


def make(data: Dataset, augmentation: Augmentation = NONE, **options) -> Batches:
    return Batches(data, **{"batch_size": 12, "device": CPU, "augmentation": augmentation, "seed": 3, **options})


def rows_of(data: Dataset, batch: Batch) -> list[int]:
    images, labels = batch
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    rows = ((images * std + mean) * 255).round()
    assert (rows == rows[:, :1, :1, :1]).all()
    found = [int(row) for row in rows[:, 0, 0, 0]]
    assert torch.equal(labels, data.train.labels[found])
    return found


def same(first: list[Batch], second: list[Batch]) -> bool:
    assert len(first) == len(second)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True))


def test_batches(data: Dataset) -> None:
    batches = make(data)
    assert (batches.steps, batches.batch_size, batches.images_per_epoch, batches.placement) == (6, 12, 72, "device")
    epoch = list(batches.epoch(0))
    assert len(epoch) == 6
    for images, labels in epoch:
        assert images.shape == (12, 3, 8, 8)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
    rows = [row for batch in epoch for row in rows_of(data, batch)]
    assert len({*rows}) == 72, "no image twice; those left over wait"
    others = [row for number in range(1, 6) for batch in batches.epoch(number) for row in rows_of(data, batch)]
    assert others[:72] != rows
    assert {*rows, *others} == set(range(80))


@pytest.mark.parametrize("augmentation", [CIFAR, WRITTEN, PHOTOS], ids=["cifar10", "digits", "folder"])
def test_seed_and_epoch_decide(data: Dataset, augmentation: Augmentation) -> None:
    first = list(make(data, augmentation).epoch(2))
    torch.manual_seed(5)
    batches = make(data, augmentation)
    list(batches.epoch(7))
    assert same(list(batches.epoch(2)), first)
    assert not same(list(batches.epoch(3)), first)
    assert not same(list(make(data, augmentation, seed=4).epoch(2)), first)


def test_any_seed(data: Dataset) -> None:
    assert not same(*(list(make(data, seed=seed).epoch(0)) for seed in (2**62, -1)))


@pytest.mark.parametrize("augmentation", [CIFAR, WRITTEN, PHOTOS], ids=["cifar10", "digits", "folder"])
@pytest.mark.parametrize("limit", [None, 0], ids=["device", "host"])
def test_resumed_in_the_middle(data: Dataset, augmentation: Augmentation, limit: int | None) -> None:
    whole = list(make(data, augmentation).epoch(1))
    batches = make(data, augmentation, memory_limit=limit)
    assert batches.placement == ("device" if limit is None else "host")
    for first in range(7):
        assert same(list(batches.epoch(1, first)), whole[first:])
    for wrong in (-1, 7):
        with pytest.raises(ValueError, match=rf"first_step must be in \[0, 6\], got first_step={wrong}"):
            batches.epoch(1, wrong)


@pytest.mark.parametrize("augmentation", [CIFAR, WRITTEN, PHOTOS], ids=["cifar10", "digits", "folder"])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_batch(data: Dataset, augmentation: Augmentation, world: int) -> None:
    alone = list(make(data, augmentation).epoch(1, 2))
    ranks = [make(data, augmentation, rank=rank, world=world) for rank in range(world)]
    for rank, batches in enumerate(ranks):
        assert (batches.steps, batches.batch_size) == (6, 12)
        assert same(list(batches.epoch(1, 2)), [(images[rank::world], labels[rank::world]) for images, labels in alone])


def test_a_batch_is_no_larger_than_the_split(data: Dataset) -> None:
    whole = make(data, batch_size=1000)
    assert (whole.steps, whole.batch_size) == (1, 80)
    shared = make(data, batch_size=999, rank=1, world=3)
    assert (shared.steps, shared.batch_size, shared.images_per_epoch) == (1, 78, 78)
    ((images, _),) = shared.epoch(0)
    assert len(images) == 26


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be a multiple of world=1, got batch_size=0"),
        ({"batch_size": 10, "world": 4}, "batch_size must be a multiple of world=4, got batch_size=10"),
        ({"batch_size": 81, "world": 81}, "80 training images cannot be divided among world=81 processes"),
        ({"rank": 2, "world": 2}, r"rank must be in \[0, 2\) for world=2, got rank=2"),
        ({"rank": -1}, r"rank must be in \[0, 1\) for world=1, got rank=-1"),
        ({"world": 0}, r"rank must be in \[0, 0\) for world=0, got rank=0"),
    ],
)
def test_wrong_arguments(data: Dataset, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(data, **options)


def test_unmoved_images_are_those_of_evaluation() -> None:
    data = load("synthetic:100", resolution=8)
    seen = {
        row: image
        for images, _, rows in evaluation(data, data.train, device=CPU)
        for row, image in zip(rows.tolist(), images, strict=True)
    }
    order = torch.cat([labels for _, labels in make(data).epoch(0)])
    images = torch.cat([images for images, _ in make(data).epoch(0)])
    found = [next(row for row, image in seen.items() if torch.equal(image, one)) for one in images]
    assert torch.equal(data.train.labels[found], order), "bit for bit"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL")
    return made_data.folder(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("augmentation", [PHOTOS, NONE, CIFAR], ids=["folder", "none", "cifar10"])
def test_images_on_disk_are_those_in_memory(root: Path, augmentation: Augmentation) -> None:
    memory, disk = (load(f"folder:{root}", resolution=14, memory_limit=limit) for limit in (None, 0))
    assert (make(memory).placement, make(disk).placement) == ("device", "disk")
    wanted = list(make(memory, augmentation).epoch(1))
    assert wanted[0][0].shape == (12, 3, 14, 14)
    assert same(list(make(disk, augmentation).epoch(1)), wanted)
    assert same(list(make(memory, augmentation, memory_limit=0).epoch(1)), wanted)
    part = make(disk, augmentation, rank=1, world=2).epoch(1, 1)
    assert same(list(part), [(images[1::2], labels[1::2]) for images, labels in wanted[1:]])
    both = [list(evaluation(data, data.test, batch_size=4, device=CPU)) for data in (memory, disk)]
    for first, second in zip(*both, strict=True):
        assert all(map(torch.equal, first, second))


def test_an_epoch_may_be_left(root: Path) -> None:
    disk = load(f"folder:{root}", resolution=14, memory_limit=0)
    batches = make(disk, batch_size=4)
    epoch = batches.epoch(0)
    next(epoch)
    epoch.close()
    assert len(list(batches.epoch(0))) == 6


def test_a_corrupt_image_met_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    made_data.folder(tmp_path)
    data, skipping = (load(f"folder:{tmp_path}", resolution=14, memory_limit=0, skip_corrupt=skip) for skip in (False, True))
    whole = load(f"folder:{tmp_path}", resolution=14)
    broken = int((data.train.labels == 0).nonzero().max())  # the next image is of another class
    Path(data.train.names[broken]).write_bytes(b"no image")
    Path(data.test.names[1]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"cat.{Path(data.train.names[broken]).name} cannot be decoded: Unidentified"):
        list(make(data).epoch(0))

    images = whole.train.images
    assert isinstance(images, Tensor)
    replaced = Split(images.clone(), whole.train.labels.clone(), whole.train.names)
    replaced.images[broken], replaced.labels[broken] = images[broken + 1], 1
    wanted = make(dataclasses.replace(whole, train=replaced)).epoch(0)
    assert same(list(make(skipping).epoch(0)), list(wanted)), "the next image, and its label"
    assert isinstance(skipping.train.images, Files)
    assert len(skipping.train.images.skipped) == 1

    found = list(evaluation(skipping, skipping.test, batch_size=2, device=CPU))
    assert [rows.tolist() for _, _, rows in found] == [[0], [2, 3], [4, 5]], "evaluated without it"
    assert [len(images) for images, _, _ in found] == [1, 2, 2]
    assert torch.equal(torch.cat([labels for _, labels, _ in found]), skipping.test.labels[[0, 2, 3, 4, 5]])


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_shows_every_image_once(data: Dataset, world: int) -> None:
    split = numbered(data.test)
    seen: list[int] = []
    for rank in range(world):
        batches = list(evaluation(data, split, batch_size=4, device=CPU, rank=rank, world=world))
        assert all(len(images) == 4 for images, _, _ in batches[:-1])
        for images, labels, rows in batches:
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images, standardise(split.images[rows], data.mean, data.std))
            assert torch.equal(labels, split.labels[rows])
            seen += rows.tolist()
    assert sorted(seen) == list(range(20))
    assert not list(evaluation(data, split, device=CPU, rank=20, world=21)), "nothing is left for it"


def test_what_cannot_be_evaluated(root: Path, data: Dataset) -> None:
    photos = load(f"folder:{root}", resolution=14)
    with pytest.raises(ValueError, match="images of 14×14 pixels are wanted, these are 16×16: training images"):
        evaluation(photos, photos.train, device=CPU)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got batch_size=0"):
        evaluation(data, data.test, batch_size=0, device=CPU)
    with pytest.raises(ValueError, match="got rank=2"):
        evaluation(data, data.test, device=CPU, rank=2, world=2)


def test_standardise() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    pixels = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    wanted = (pixels.double() / 255 - torch.tensor(mean)[:, None, None].double()) / torch.tensor(std)[:, None, None].double()
    out = standardise(pixels, mean, std)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, wanted, torch.float32, 1)
    assert torch.equal(standardise(pixels.to(torch.float32) / 255, mean, std), out)
    assert torch.equal(standardise(pixels[2], torch.tensor(mean), torch.tensor(std)), out[2])


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [None, 0], ids=["device", "host"])
def test_on_a_gpu(data: Dataset, limit: int | None) -> None:
    wanted = list(make(data, CIFAR).epoch(1))
    batches = make(data, CIFAR, device=torch.device("cuda"), memory_limit=limit)
    assert batches.placement == ("device" if limit is None else "host")
    for (images, labels), (moved, of) in zip(wanted, batches.epoch(1), strict=True):
        assert moved.device.type == of.device.type == "cuda"
        assert moved.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(of.cpu(), labels)
        assert_close(moved.cpu(), images.double(), torch.float32, 1)
    for images, labels, rows in evaluation(data, data.test, batch_size=4, device=torch.device("cuda")):
        assert images.device.type == labels.device.type == "cuda"
        assert rows.device.type == "cpu"
