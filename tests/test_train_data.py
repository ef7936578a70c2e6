"""Data sets as they are loaded: digits, CIFAR-10, MNIST and the made-up one; their splits and their errors."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tarfile
from pathlib import Path

import made_data
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv.train.data import NAMES, Dataset, Split, load
from fastconv.train.sources import cifar10


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("data sets never reach for the network")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "_PER_FILE", made_data.PER_FILE)


def pixels(split: Split) -> Tensor:
    assert isinstance(split.images, Tensor)
    assert split.images.dtype == torch.uint8
    assert split.labels.dtype == torch.int64
    assert len(split.images) == len(split.labels) == len(split.names) == len(split)
    return split.images


def rows(split: Split) -> list[int]:
    return [int(name.split()[-1]) for name in split.names]


def digits(resolution: int = 8, **options: object) -> Dataset:
    pytest.importorskip("sklearn")
    return load("digits", resolution=resolution, **options)


def test_digits_are_split_disjointly_completely_and_by_class() -> None:
    data = digits()
    assert data.validation is not None
    splits = (data.train, data.validation, data.test)
    assert [len(split) for split in splits] == [1259, 179, 359]
    assert sorted(row for split in splits for row in rows(split)) == list(range(1797))
    whole = torch.cat([split.labels for split in splits]).bincount()
    for split, share in zip(splits, (0.7, 0.1, 0.2), strict=True):
        assert (split.labels.bincount() - share * whole).abs().max() <= 1
    # The rows that accuracies were measured on ever since: they never move.
    assert rows(data.validation)[:5] == [2, 18, 22, 25, 62]
    assert rows(data.test)[:5] == [3, 5, 6, 11, 12]
    assert [sum(rows(split)) for split in splits] == [1137502, 155744, 320460]


def test_splits_do_not_follow_the_training_seed() -> None:
    first = digits()
    torch.manual_seed(99)
    again = digits()
    assert rows(again.test) == rows(first.test)
    assert torch.equal(pixels(again.train), pixels(first.train))


def test_digits_are_the_images_of_scikit_learn() -> None:
    data = digits(8)
    source = torch.from_numpy(pytest.importorskip("sklearn.datasets").load_digits().images)
    assert torch.equal(pixels(data.test)[:, 0], (source[rows(data.test)] * 255 / 16).round().to(torch.uint8))
    large = digits(32)
    assert large.resolution == 32 == load("digits").resolution
    resized = F.interpolate(source[rows(large.test)][:, None] * 255 / 16, size=(32, 32), mode="bilinear")
    assert (pixels(large.test) - resized).abs().max() <= 0.5 + 1e-3


def test_mean_and_std_are_of_the_training_images() -> None:
    data = digits()
    std, mean = torch.std_mean(pixels(data.train).double() / 255, correction=0)
    assert data.mean == pytest.approx([mean.item()])
    assert data.std == pytest.approx([std.item()])
    colours = load("synthetic:100")
    std, mean = torch.std_mean(pixels(colours.train).double() / 255, (0, 2, 3), correction=0)
    assert colours.mean == pytest.approx(mean.tolist())
    assert colours.std == pytest.approx(std.tolist())


@pytest.mark.parametrize("share", [0, 0.25])
def test_digits_held_out_as_asked(share: float) -> None:
    data = digits(validation=share)
    assert rows(data.test) == rows(digits().test)
    if not share:
        assert data.validation is None
        assert len(data.train) == 1797 - 359
    else:
        assert data.validation is not None
        assert not {*rows(data.validation)} & {*rows(data.train)}
        counts, whole = data.validation.labels.bincount(), data.train.labels.bincount() + data.validation.labels.bincount()
        assert (counts - share * whole).abs().max() <= 0.5


def test_classes_are_labelled_in_the_order_given() -> None:
    whole, some = digits(), digits(classes=["7", "2"])
    assert some.classes == ("7", "2")
    seven = [row for row, label in zip(rows(whole.test), whole.test.labels, strict=True) if label == 7]
    assert [row for row, label in zip(rows(some.test), some.test.labels, strict=True) if label == 0] == seven
    assert {*rows(some.train)} < {*rows(whole.train)}
    assert some.test.labels.unique().tolist() == [0, 1]
    assert some.mean != whole.mean


@pytest.mark.parametrize("classes", [["7"], ["7", "7"], ["7", "seven"]], ids=str)
def test_wrong_classes(classes: list[str]) -> None:
    with pytest.raises(ValueError, match="two different ones of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; got 7"):
        load("synthetic:100", classes=classes)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("imagenet", {}, f"must be one of {', '.join(NAMES)}, got 'imagenet'"),
        ("digits:here", {}, "take no path, got 'digits:here'"),
        ("synthetic:3", {}, "at least 20.*got 'synthetic:3'"),
        ("synthetic:many", {}, "synthetic:1x2000.*got 'synthetic:many'"),
        ("synthetic", {"resolution": 0}, "resolution must be at least 1, got resolution=0"),
        ("synthetic", {"validation": 1.0}, r"validation must be in \[0, 1\), got validation=1.0"),
        ("synthetic", {"validation": -0.1}, r"validation must be in \[0, 1\), got validation=-0.1"),
    ],
)
def test_wrong_arguments(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[:", r"\[:").replace("[C", r"\[C").replace("]I", r"\]I")):
        load(name, **options)


def test_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastconv\[train\]'"):
        load("digits")


def test_missing_numpy(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("py", "bin"):
        made_data.cifar10(tmp_path / form, form)
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastconv\[train\]' .*binary\.tar\.gz needs none"):
        load(f"cifar10:{tmp_path / 'py'}")
    assert len(load(f"cifar10:{tmp_path / 'bin'}").test) == made_data.PER_FILE


def test_synthetic_images_can_be_told_apart() -> None:
    data = load("synthetic:1x500", resolution=16)
    assert (data.name, data.resolution, len(data.classes)) == ("synthetic", 16, 10)
    assert pixels(data.train).shape == (400, 1, 16, 16)
    assert pixels(data.test).shape == (100, 1, 16, 16)
    assert not {*rows(data.train)} & {*rows(data.test)}
    assert pixels(load("synthetic").train).shape == (800, 3, 32, 32)
    images, tested = (pixels(split).double().flatten(1) for split in (data.train, data.test))
    means = torch.stack([images[data.train.labels == label].mean(0) for label in range(10)])
    assert (torch.cdist(tested, means).argmin(1) == data.test.labels).double().mean() > 0.95


@pytest.mark.parametrize("form", ["py", "bin", "python.tar.gz", "binary.tar.gz"])
@pytest.mark.parametrize("at", ["above", "itself"])
def test_cifar10(tmp_path: Path, small: None, form: str, at: str) -> None:
    batches = made_data.cifar10(tmp_path, form)
    (itself,) = tmp_path.iterdir()
    data = load(f"cifar10:{tmp_path if at == 'above' else itself}")
    assert (data.name, data.resolution, data.validation) == ("cifar10", 32, None)
    assert data.classes[:2] == ("airplane", "automobile")
    assert torch.equal(pixels(data.train), torch.cat([images for images, _ in batches[:5]]).view(-1, 3, 32, 32))
    assert torch.equal(data.train.labels, torch.cat([labels for _, labels in batches[:5]]))
    assert torch.equal(pixels(data.test), batches[5][0].view(-1, 3, 32, 32))
    assert data.train.names[17] == "cifar10 train 17"
    held = load(f"cifar10:{tmp_path}", validation=0.1, resolution=16)
    assert held.validation is not None
    assert held.validation.labels.bincount().tolist() == [1] * 10
    assert pixels(held.validation).shape == (10, 3, 16, 16)


def test_cifar10_is_looked_for_in_its_folder(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = "cifar-10-batches-py, cifar-10-batches-bin, cifar-10-python.tar.gz, cifar-10-binary.tar.gz in data/cifar10"
    with pytest.raises(FileNotFoundError, match=f"none of {names}. Download https://www.cs.toronto.edu/~kriz/cifar-10-p"):
        load("cifar10")
    made_data.cifar10(Path("data/cifar10"), "bin")
    assert len(load("cifar10").test) == made_data.PER_FILE


def test_images_are_resized_with_antialiasing(tmp_path: Path, small: None) -> None:
    (first, _), *_ = made_data.cifar10(tmp_path, "bin")
    data = load(f"cifar10:{tmp_path}", resolution=8)
    resized = F.interpolate(first.view(-1, 3, 32, 32).double(), size=(8, 8), mode="bilinear", antialias=True)
    assert (pixels(data.train)[: made_data.PER_FILE] - resized).abs().max() <= 0.5 + 1e-3


class Command:
    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.file,)


def test_a_pickle_that_does_more_than_hold_arrays_is_refused(tmp_path: Path, small: None) -> None:
    made_data.cifar10(tmp_path, "py")
    wrong = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    made = tmp_path / "made"
    wrong.write_bytes(pickle.dumps({b"data": Command(made)}, protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_3: .*calls for (posix|nt)\.mkdir, which is refused"):
        load(f"cifar10:{tmp_path}")
    assert not made.exists()
    wrong.write_bytes(b"cbuiltins\neval\n(V1\ntR.")
    with pytest.raises(ValueError, match=r"data_batch_3: .*calls for builtins\.eval, which is refused"):
        load(f"cifar10:{tmp_path}")


PIXELS, LABELS = torch.zeros(made_data.PER_FILE, 3072, dtype=torch.uint8), torch.zeros(made_data.PER_FILE, dtype=torch.int64)


@pytest.mark.parametrize(
    "content, message",
    [
        (made_data.pickled(PIXELS, LABELS)[:-500], "not a batch of CIFAR-10"),
        (b"", "not a batch of CIFAR-10"),
        (b"\x89PNG\r\n", "not a batch of CIFAR-10"),
        (pickle.dumps([1, 2], protocol=2), "it holds a list, not a dict"),
        (pickle.dumps({b"labels": []}, protocol=2), r"data must be uint8 \[20, 3072\], it is None"),
        (made_data.pickled(PIXELS[:7], LABELS), r"data must be uint8 \[20, 3072\], it is uint8 \[7, 3072\]"),
        (made_data.pickled(PIXELS.double(), LABELS), r"data must be uint8 \[20, 3072\], it is float64 \[20, 3072\]"),
        (made_data.pickled(PIXELS, LABELS[:7]), "labels must be a list of 20 ints, it is a list of 7"),
        (made_data.pickled(PIXELS, LABELS + 10), r"labels from 0 to 9 are wanted, these are \[10\]"),
    ],
)
def test_wrong_pickles_of_cifar10(tmp_path: Path, small: None, content: bytes, message: str) -> None:
    made_data.cifar10(tmp_path, "py")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=f"test_batch: {message}|test_batch: .*{message}"):
        load(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    "content, message",
    [
        (made_data.binary(PIXELS, LABELS)[:-1], "61460 bytes are wanted, it holds 61459"),
        (made_data.binary(PIXELS[1:], LABELS[1:]), "61460 bytes are wanted, it holds 58387"),
        (made_data.binary(PIXELS, LABELS + 200), r"labels from 0 to 9 are wanted, these are \[200\]"),
    ],
)
def test_wrong_binaries_of_cifar10(tmp_path: Path, small: None, content: bytes, message: str) -> None:
    made_data.cifar10(tmp_path, "bin")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"test_batch\.bin: {message}"):
        load(f"cifar10:{tmp_path}")


def test_incomplete_cifar10(tmp_path: Path, small: None) -> None:
    made_data.cifar10(tmp_path / "folder", "py")
    (tmp_path / "folder" / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=r"no data_batch_4 in .*cifar-10-batches-py\. Download https"):
        load(f"cifar10:{tmp_path / 'folder'}")
    made_data.cifar10(tmp_path, "binary.tar.gz")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    whole = archive.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        archive.write_bytes(broken)
        with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz.*download it again"):
            load(f"cifar10:{archive}")
    made_data.pack(archive, {"cifar-10-batches-bin/data_batch_1.bin": b""})
    with pytest.raises(ValueError, match=r"does not hold data_batch_2\.bin, .*test_batch\.bin; download it again"):
        load(f"cifar10:{tmp_path}")
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"cifar\.tar\.gz: an archive must be named .* cifar-10-python\.tar\.gz or"):
        load(f"cifar10:{tmp_path / 'cifar.tar.gz'}")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("inner", ["", "raw", "MNIST/raw"])
def test_mnist(tmp_path: Path, zipped: bool, mark: str, inner: str) -> None:
    content = made_data.mnist(tmp_path / inner, mark=mark, zipped=zipped)
    data = load(f"mnist:{tmp_path}")
    assert (data.name, data.resolution, data.validation) == ("mnist", 28, None)
    assert torch.equal(pixels(data.train)[:, 0], content[f"train-images{mark}idx3-ubyte"].to(torch.uint8))
    assert torch.equal(data.test.labels, content[f"t10k-labels{mark}idx1-ubyte"])
    assert data.test.names[3] == "mnist test 3"


def test_mnist_is_looked_for_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = (
        r"in data/mnist, data/mnist/raw, data/mnist/MNIST/raw\. Download train-images-idx3-ubyte\.gz, .* into data/mnist"
    )
    with pytest.raises(FileNotFoundError, match=wanted):
        load("mnist")
    made_data.mnist(Path("data/mnist"))
    Path("data/mnist/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"no t10k-labels-idx1-ubyte, .* from https://ossci-datasets\.s3\.amaz"):
        load("mnist")


IMAGES = made_data.idx(torch.zeros(20, 28, 28))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("images-idx3", IMAGES[:-1], r"15696 bytes are wanted for the sizes \(20, 28, 28\), it holds 15695"),
        ("images-idx3", IMAGES + b"0", r"15696 bytes are wanted for the sizes \(20, 28, 28\), it holds 15697"),
        ("images-idx3", IMAGES[:9], "not an idx3-ubyte file"),
        ("images-idx3", b"", "not an idx3-ubyte file"),
        ("images-idx3", b"\0\0\x0d" + IMAGES[3:], "not an idx3-ubyte file: it starts with 00 00 0d 03, not 00 00 08 03"),
        ("images-idx3", made_data.idx(torch.zeros(20, 8, 8)), r"images of 28×28 pixels are wanted, these are \(8, 8\)"),
        ("images-idx3", made_data.idx(torch.zeros(0, 28, 28)), "it is empty"),
        ("labels-idx1", IMAGES, "not an idx1-ubyte file: it starts with 00 00 08 03, not 00 00 08 01"),
        ("labels-idx1", made_data.idx(torch.arange(5)), "holds 5 labels for the 20 images of .*t10k-images-idx3-ubyte"),
        ("labels-idx1", made_data.idx(torch.full((20,), 10)), r"labels from 0 to 9 are wanted, these are \[10\]"),
    ],
)
def test_wrong_files_of_mnist(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    made_data.mnist(tmp_path)
    (tmp_path / f"t10k-{name}-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=f"t10k-{name}-ubyte.*{message}"):
        load(f"mnist:{tmp_path}")


def test_a_cut_gzip_file_of_mnist(tmp_path: Path) -> None:
    made_data.mnist(tmp_path, zipped=True)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for broken in (whole[:-6], b"no gzip", whole[:12] + bytes(8) + whole[20:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz: not a whole gzip file"):
            load(f"mnist:{tmp_path}")
