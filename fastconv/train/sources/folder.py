"""Images in a folder for each class, decoded by Pillow: at once, or when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fastconv.train.sources import Part, Source

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_RESOLUTION = 224
# ImageNet's, which nets for photographs are usually trained with: near enough to those of any photographs, and the same for
# every folder, so that a net goes on with another one.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TRAIN, _TESTS, _VALIDATIONS = "train", ("test",), ("val", "validation")
_TRANSPARENT = {"LA", "La", "PA", "RGBA", "RGBa"}
_AT_ONCE = 1024


def read(where: str) -> Source:
    """The images below `where`/CLASS, or `where`/train/CLASS and `where`/{test,val,validation}/CLASS.

    Where there is no test but a validation folder, it is what nets are tested by. Folders whose name starts with a dot are
    passed over, and so are files with other endings than ENDINGS, in capitals or not.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no or only one class, a class without images, or classes that differ between training and test.
    """
    if not where:
        raise ValueError("data: folder needs a path: 'folder:PATH'")
    root = Path(where)
    if not root.is_dir():
        raise FileNotFoundError(f"folder: {root} is not a folder; images are looked for in {root}/CLASS")
    inner = {path.name for path in _folders(root)}
    if _TRAIN not in inner or inner - {_TRAIN, *_TESTS, *_VALIDATIONS} or not _folders(root / _TRAIN):
        classes, train = _part(root)
        return Source(classes, train, None, None, _RESOLUTION, _MEAN, _STD)
    classes, train = _part(root / _TRAIN)
    if inner.issuperset(_VALIDATIONS):
        raise ValueError(f"folder: {root} holds both {' and '.join(_VALIDATIONS)}: leave one")
    others = []
    for name in (*_TESTS, *_VALIDATIONS):
        if name in inner:
            others.append(_part(root / name)[1])
            found = tuple(path.name for path in _folders(root / name))
            if found != classes:
                raise ValueError(
                    f"folder: the classes in {root / name} differ from those in {root / _TRAIN}: "
                    f"only one of them holds {', '.join(sorted({*found} ^ {*classes}))}"
                )
    test = others[0] if others else None
    validation = others[1] if len(others) > 1 else None
    return Source(classes, train, validation, test, _RESOLUTION, _MEAN, _STD)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _part(root: Path) -> tuple[tuple[str, ...], Part]:
    folders = _folders(root)
    if len(folders) < 2:
        raise ValueError(
            f"folder: {root} must hold a folder for each of two classes or more, it holds "
            f"{f'only {folders[0].name}' if folders else 'none'}"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(
            os.path.join(inner, name)
            for inner, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(ENDINGS) and not name.startswith(".")
        )
        if not found:
            raise ValueError(f"folder: no image in {folder}: files are looked for that end in {', '.join(ENDINGS)}")
        paths += found
        labels += [label] * len(found)
    return tuple(folder.name for folder in folders), Part(paths, torch.tensor(labels), paths)


class Files:
    """Images in files, decoded when they are asked for: uint8 [N, C, S, S].

    Attributes:
        paths: of the N files.
        shape: (N, C, S, S), where C is 3, or 1 for grey images.
        skip_corrupt: whether the place of a file that cannot be decoded is taken by the next one that can.

    Raises:
        ModuleNotFoundError: Pillow is not installed; the message holds the command.
    """

    def __init__(self, paths: Sequence[str], size: int, *, channels: int = 3, skip_corrupt: bool = False) -> None:
        _pillow()
        self.paths = paths
        self.shape = torch.Size((len(paths), channels, size, size))
        self.skip_corrupt = skip_corrupt
        self._corrupt: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def skipped(self) -> tuple[str, ...]:
        """The corrupt files that were met so far, each with the reason."""
        return tuple(self._corrupt[row] for row in sorted(self._corrupt))

    def take(self, rows: Tensor) -> Tensor:
        """The images of these rows, uint8 [B, C, S, S]; ask `read` instead where their labels matter."""
        return self.read(rows)[0]

    def read(self, rows: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images, and the rows that they are of: others than those asked for where corrupt files are skipped.

        Args:
            rows: int64 [B].
            out: uint8 [B, C, S, S] on the CPU, to decode to.

        Raises:
            ValueError: a file cannot be decoded, or with skip_corrupt none; the message holds its path and the reason.
        """
        images = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8) if out is None else out
        actual = rows.clone()
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            for place, (row, image) in enumerate(pool.map(self._readable, rows.tolist())):
                images[place] = image
                actual[place] = row
        return images, actual

    def all(self) -> tuple[Tensor, Tensor]:
        """All images that can be decoded, and their rows."""
        images = torch.empty(self.shape, dtype=torch.uint8)
        rows = torch.arange(len(self))
        actual = torch.cat([self.read(part, images[part[0] : part[-1] + 1])[1] for part in rows.split(_AT_ONCE)])
        whole = actual == rows
        return (images, rows) if whole.all() else (images[whole], rows[whole])

    def _readable(self, row: int) -> tuple[int, Tensor]:
        for step in range(len(self)):
            at = (row + step) % len(self)
            if at in self._corrupt:
                continue
            try:
                return at, decode(self.paths[at], self.shape[-1], channels=self.shape[1])
            except ValueError as error:
                if not self.skip_corrupt:
                    raise
                self._corrupt[at] = str(error)
        raise ValueError(f"none of {len(self)} images can be decoded, the first because {self._corrupt[0]}")


def decode(path: str | Path, size: int, *, channels: int = 3) -> Tensor:
    """The centre square of an image, turned as its EXIF data says and resized with antialiasing: uint8 [C, size, size].

    `channels` is 3 for RGB, 1 for grey.
    What is transparent is white, 16-bit greys lose their lower eight bits, of several frames the first is taken.

    Raises:
        ModuleNotFoundError: Pillow is not installed; the message holds the command.
        ValueError: the file cannot be decoded; the message holds its path and the reason.
    """
    _pillow()
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise ValueError(f"folder: an image has 1 channel or 3, got channels={channels}")
    try:
        with Image.open(path) as opened:
            opened.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at half, a quarter or an eighth of its size
            image = _rgb(ImageOps.exif_transpose(opened))
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        square = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        if channels == 1:
            square = square.convert("L")
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        raise ValueError(f"{path} cannot be decoded: {type(error).__name__}: {error}") from error
    # Planes and no operator of torch: its threads for each of these threads would be too many.
    planes = bytearray(b"".join(band.tobytes() for band in square.split()))
    return torch.frombuffer(planes, dtype=torch.uint8).view(channels, size, size)


def _rgb(image):
    from PIL import Image

    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers of unknown range")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "images are decoded by Pillow, which is not installed: pip install 'fastconv[train]' (or pillow)"
        ) from error
