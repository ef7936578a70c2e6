"""Data sets of image files in folders."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import made_data
import pytest
import torch
from torch import Tensor

from fastconv.train import data as train_data
from fastconv.train.data import Dataset, Files, load
from fastconv.train.sources import folder

Image = pytest.importorskip("PIL.Image")


def names(data: Dataset) -> dict[str, list[str]]:
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {what: [] if split is None else [str(path) for path in split.names] for what, split in splits.items()}


def test_a_folder_is_split_by_class(tmp_path: Path) -> None:
    made_data.folder(tmp_path, count=10)
    data = load(f"folder:{tmp_path}", resolution=14, validation=0.25)
    assert (data.name, data.resolution, data.skipped) == ("folder", 14, ())
    assert data.classes == ("cat", "dog", "owl")
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert data.validation is not None
    assert data.train.images.shape == (18, 3, 16, 16), "stored larger, for crops"
    assert data.validation.images.shape == (6, 3, 14, 14)
    assert data.test.images.shape == (6, 3, 14, 14)
    for split in (data.train, data.validation, data.test):
        assert [data.classes[label] for label in split.labels] == [Path(name).parent.name for name in split.names]
        assert split.labels.bincount().unique().numel() == 1
    found = names(data)
    assert sorted(itertools.chain(*found.values())) == sorted(map(str, tmp_path.rglob("*.png")))
    torch.manual_seed(4)
    assert names(load(f"folder:{tmp_path}", resolution=14, validation=0.25)) == found
    assert names(load(f"folder:{tmp_path}", resolution=14))["test"] == found["test"]


def test_classes_of_a_folder(tmp_path: Path) -> None:
    data = load(f"folder:{made_data.folder(tmp_path)}", resolution=8, classes=["owl", "cat"])
    assert data.classes == ("owl", "cat")
    assert {Path(name).parent.name for name in data.train.names} == {"owl", "cat"}
    assert Path(data.train.names[int((data.train.labels == 0).nonzero()[0])]).parent.name == "owl"


def test_what_is_held_out_does_not_depend_on_the_classes(tmp_path: Path) -> None:
    """Else a net that is trained further on some of the classes would be tested on images that it has seen."""
    made_data.folder(tmp_path, count=10)
    whole = names(load(f"folder:{tmp_path}", resolution=8, validation=0.25))
    some = names(load(f"folder:{tmp_path}", resolution=8, validation=0.25, classes=["owl", "cat"]))
    for what, found in whole.items():
        assert {*some[what]} == {name for name in found if Path(name).parent.name != "dog"}


def test_a_class_that_is_left_out_may_be_too_small_to_divide(tmp_path: Path) -> None:
    made_data.folder(tmp_path)
    for image in sorted((tmp_path / "dog").iterdir())[1:]:
        image.unlink()
    with pytest.raises(ValueError, match="class 'dog' has only 1 training image"):
        load(f"folder:{tmp_path}", resolution=8)
    assert load(f"folder:{tmp_path}", resolution=8, classes=["owl", "cat"]).classes == ("owl", "cat")


def test_the_usual_resolution_of_a_folder(tmp_path: Path) -> None:
    data = load(f"folder:{made_data.folder(tmp_path, count=2)}")
    assert data.train.images.shape[1:] == (3, 256, 256)
    assert data.test.images.shape[1:] == (3, 224, 224)


@pytest.mark.parametrize("others", [("test",), ("val",), ("validation",), ("test", "val"), ("validation", "test")])
def test_a_folder_with_splits_of_its_own(tmp_path: Path, others: tuple[str, ...]) -> None:
    made_data.folder(tmp_path / "train", count=4)
    for name in others:
        made_data.folder(tmp_path / name, count=2)
    data = load(f"folder:{tmp_path}", resolution=7)
    assert len(data.train) == 12
    assert len(data.test) == 6
    assert {Path(name).parent.parent.name for name in data.test.names} == {"test" if "test" in others else others[0]}
    assert (data.validation is None) == (len(others) == 1)
    held = load(f"folder:{tmp_path}", resolution=7, validation=0.5)
    assert held.validation is not None
    assert len(held.train) == len(held.validation) == (12 + 6 * (len(others) - 1)) // 2
    assert len(load(f"folder:{tmp_path}", resolution=7, validation=0).train) == 12 + 6 * (len(others) - 1)


def test_train_alone_has_test_images_held_out(tmp_path: Path) -> None:
    made_data.folder(tmp_path / "train", count=5)
    data = load(f"folder:{tmp_path}", resolution=7)
    assert (len(data.train), len(data.test)) == (12, 3)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load(f"folder:{made_data.folder(tmp_path, ('car', 'train'), 2)}", resolution=7).classes == ("car", "train")


def test_which_files_are_taken(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made_data.pictures(tmp_path / name / "deep" / "deeper", 2)
        for ending in ("JPG", "jpeg", "Png", "bmp", "webp", "gif", "tif", "TIFF", "ppm"):
            made_data.pictures(tmp_path / name, 1, ending=ending)
        Image.new("L", (9, 9)).save(tmp_path / name / "000.pgm")
        (tmp_path / name / "notes.txt").write_text("no image")
        (tmp_path / name / "._000.png").write_text("no image")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / "list.csv").write_text("no class")
    data = load(f"folder:{tmp_path}", resolution=7)
    assert data.classes == ("a", "b")
    assert len(data.train) + len(data.test) == 2 * 12
    assert list(data.train.names) == sorted(data.train.names)


def square(path: Path, size: int) -> Tensor:
    image = folder.decode(path, size)
    assert image.shape == (3, size, size)
    assert image.dtype == torch.uint8
    return image


def test_the_centre_is_cut_out(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (6, 10, 3), dtype=torch.uint8)
    for name, shown in (("wide", pixels), ("high", pixels.transpose(0, 1))):
        height, width, _ = shown.shape
        Image.frombytes("RGB", (width, height), bytes(shown.flatten().tolist())).save(tmp_path / f"{name}.png")
        centre = shown.permute(2, 0, 1)[:, (height - 6) // 2 :, (width - 6) // 2 :][:, :6, :6]
        assert torch.equal(square(tmp_path / f"{name}.png", 6), centre)


def test_images_are_resized_with_antialiasing(tmp_path: Path) -> None:
    """Chequers of single pixels become grey, whatever the ratio."""
    chequers = torch.arange(64)[:, None] + torch.arange(64)
    Image.frombytes("L", (64, 64), bytes((chequers % 2 * 255).flatten().tolist())).save(tmp_path / "chequers.png")
    assert ((square(tmp_path / "chequers.png", 8)[:, 1:-1, 1:-1].int() - 127).abs() <= 4).all()


def test_large_jpegs(tmp_path: Path) -> None:
    """Decoded at a part of their size: still what the whole image is."""
    blocks = torch.randint(0, 256, (32, 32)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    image = Image.frombytes("L", (256, 256), bytes(blocks.flatten().tolist()))
    image.save(tmp_path / "blocks.jpg", quality=95)
    image.save(tmp_path / "blocks.png")
    jpeg, png = (square(tmp_path / f"blocks.{ending}", 64).int() for ending in ("jpg", "png"))
    assert (jpeg - png).abs().max() <= 4


def test_the_camera_s_orientation_is_undone(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the sky
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    shown = square(tmp_path / "turned.png", 8)
    assert (shown[:, :, 4:] == 255).all()
    assert (shown[:, :, :4] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 4))
    image.convert(mode).save(tmp_path / "image.png")
    shown = square(tmp_path / "image.png", 8)
    assert (shown[:, :4] == 255).all()
    assert (shown[:, 4:] == 0).all()


def test_greys(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 100).save(tmp_path / "8.png")
    (tmp_path / "16.pgm").write_bytes(b"P5 8 8 65535 " + bytes((100, 7)) * 64)
    Image.frombytes("I;16", (8, 8), bytes((7, 100)) * 64).save(tmp_path / "16.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "1.png")
    for name, value in (("8.png", 100), ("16.pgm", 100), ("16.png", 100), ("1.png", 255)):
        assert square(tmp_path / name, 8).unique().tolist() == [value], name
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif cannot be decoded: .*floating point"):
        folder.decode(tmp_path / "float.tif", 8)


@pytest.mark.parametrize(
    "layout, message",
    [
        ([], "must hold a folder for each of two classes or more, it holds none"),
        (["cat/1.png"], "must hold a folder for each of two classes or more, it holds only cat"),
        (["cat/1.png", "dog/1.txt"], "no image in .*dog: files are looked for that end in .jpg, "),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"], "test differ from those in .* holds b, c"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "validation/a/1.png"], "both val and validation: leave one"),
        (["train/a/1.png", "test/a/1.png"], "train must hold a folder for each of two classes or more, it holds only a"),
        (["cat/1.png", "dog/1.png", "dog/2.png"], "class 'cat' has only 1 training image, none of which can be held out"),
    ],
)
def test_wrong_folders(tmp_path: Path, layout: list[str], message: str) -> None:
    for name in layout:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        load(f"folder:{tmp_path}")


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder needs a path: 'folder:PATH'"):
        load("folder")
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=f"{wrong.name} is not a folder; images are looked for in"):
            load(f"folder:{wrong}")


def test_missing_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_data.folder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for limit in (None, 0):
        with pytest.raises(ModuleNotFoundError, match=r"by Pillow, .* pip install 'fastconv\[train\]'"):
            load(f"folder:{tmp_path}", resolution=8, skip_corrupt=True, memory_limit=limit)


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:150])
    return path


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    made_data.folder(tmp_path)
    broken = cut(tmp_path / "dog" / "003.png")
    with pytest.raises(ValueError, match=r"dog.003\.png cannot be decoded: \w+: .*truncated"):
        load(f"folder:{tmp_path}", resolution=8)
    broken.write_text("<html>")
    with pytest.raises(ValueError, match=r"dog.003\.png cannot be decoded: UnidentifiedImageError: "):
        load(f"folder:{tmp_path}", resolution=8)


def test_corrupt_images_are_left_out(tmp_path: Path) -> None:
    made_data.folder(tmp_path)
    whole = load(f"folder:{tmp_path}", resolution=8)
    broken = [cut(Path(split.names[at])) for split in (whole.train, whole.test) for at in (0, 4)]
    data = load(f"folder:{tmp_path}", resolution=8, skip_corrupt=True)
    assert [reason.split(" cannot be decoded: OSError")[0] for reason in data.skipped] == [str(path) for path in broken]
    for split, before in ((data.train, whole.train), (data.test, whole.test)):
        kept = [row for row, name in enumerate(before.names) if Path(name) not in broken]
        assert list(split.names) == [before.names[row] for row in kept]
        assert torch.equal(split.labels, before.labels[kept])
        assert torch.equal(split.images, before.images[kept])


def test_a_class_without_a_whole_image(tmp_path: Path) -> None:
    made_data.folder(tmp_path)
    for path in (tmp_path / "dog").iterdir():
        cut(path)
    with pytest.raises(ValueError, match=r"no training image of class 'dog' can be decoded: .*dog.000\.png"):
        load(f"folder:{tmp_path}", resolution=8, skip_corrupt=True)


def test_a_folder_that_does_not_fit_into_memory_stays_on_disk(tmp_path: Path) -> None:
    made_data.folder(tmp_path)
    needed = 24 * 3 * 16**2 + 6 * 3 * 14**2
    whole = load(f"folder:{tmp_path}", resolution=14, memory_limit=needed)
    files = load(f"folder:{tmp_path}", resolution=14, memory_limit=needed - 1)
    for kept, left in ((whole.train, files.train), (whole.test, files.test)):
        assert isinstance(kept.images, Tensor)
        assert isinstance(left.images, Files)
        assert left.images.shape == kept.images.shape
        assert len(left.images) == len(kept.images)
        assert torch.equal(left.labels, kept.labels)
        rows = torch.tensor([3, 1, 4, 1, 5])
        assert torch.equal(left.images.take(rows), kept.images[rows])


def test_half_of_the_memory_may_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_data.available_memory() > 2**20
    made_data.folder(tmp_path)
    needed = 24 * 3 * 16**2 + 6 * 3 * 14**2
    for available, kind in ((2 * needed, Tensor), (2 * needed - 2, Files)):
        monkeypatch.setattr(train_data, "available_memory", lambda available=available: available)
        assert isinstance(load(f"folder:{tmp_path}", resolution=14).train.images, kind)


def test_corrupt_images_on_disk(tmp_path: Path) -> None:
    paths = [str(path) for path in made_data.pictures(tmp_path, 6)]
    images = Files(paths, 8).take(torch.arange(6))
    for row in (2, 3, 5):
        cut(Path(paths[row]))
    with pytest.raises(ValueError, match=r"002\.png cannot be decoded: OSError"):
        Files(paths, 8).take(torch.tensor([1, 2]))
    files = Files(paths, 8, skip_corrupt=True)
    read, rows = files.read(torch.tensor([1, 2, 3, 4, 5, 2]))
    assert rows.tolist() == [1, 4, 4, 4, 0, 4], "the next image that can be decoded; after the last one the first"
    assert torch.equal(read, images[rows])
    assert [reason.split(" ")[0] for reason in files.skipped] == [paths[row] for row in (2, 3, 5)]
    for path in paths:
        cut(Path(path))
    with pytest.raises(ValueError, match=r"none of 6 images can be decoded, the first because .*000\.png"):
        Files(paths, 8, skip_corrupt=True).take(torch.tensor([4]))
