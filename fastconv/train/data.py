"""Data sets to train and test nets on: what they are made of, and `load`, which makes one of its name."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv.train.augment import GREY
from fastconv.train.sources import Part, Source, cifar10, digits, folder, mnist, stratified, synthetic
from fastconv.train.sources.folder import Files

__all__ = ["NAMES", "Dataset", "Files", "Split", "load"]

_READERS: dict[str, Callable[[str], Source]] = {
    "digits": digits.read,
    "cifar10": cifar10.read,
    "mnist": mnist.read,
    "folder": folder.read,
    "synthetic": synthetic.read,
}
NAMES = ("digits", "cifar10[:PATH]", "mnist[:PATH]", "folder:PATH", "synthetic[:[CHANNELSx]IMAGES]")

_TEST = 0.2  # of every class, where a source has no test images of its own
MARGIN = 8 / 7  # training images in files are stored this much larger than nets see them: crops are drawn from them
_LEAST_STD = 1 / 255  # a channel that is the same everywhere is no reason to divide by zero
_AT_ONCE = 256


@dataclass(frozen=True)
class Split:
    """Images of one purpose.

    Attributes:
        images: uint8 [N, C, S, S]; Files where they do not fit into memory.
        labels: int64 [N].
        names: what a person calls each image: a file's path, or "digits 17".
    """

    images: Tensor | Files
    labels: Tensor
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Disjoint splits of labelled images.

    Attributes:
        name: "digits", "cifar10", "mnist", "folder", "synthetic".
        classes: their names, by label.
        train: training images; those of a folder are stored larger than nets see them, S = 8/7 R.
        validation: images held out of the training ones, that choices may be made by; None where none are.
        test: images that no choice may be made by.
        mean, std: by channel, of pixels in [0, 1], over the training images; of a folder, ImageNet's.
        resolution: R, what nets see.
        skipped: corrupt files that were left out, each with the reason.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resolution: int
    skipped: tuple[str, ...] = ()

    def digest(self) -> str:
        """Of the names and labels of all images, in order: another one when images came, went or moved."""
        found = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            if split is not None:
                found.update(split.labels.numpy().tobytes())
                found.update("\0".join(map(str, split.names)).encode())
        return found.hexdigest()[:16]


def load(
    name: str,
    *,
    resolution: int | None = None,
    classes: Sequence[str] = (),
    validation: float | None = None,
    skip_corrupt: bool = False,
    channels: int | None = None,
    memory_limit: int | None = None,
) -> Dataset:
    """A data set from this machine's disk: nothing is ever downloaded.

    Args:
        name: `digits` (scikit-learn's); `cifar10[:PATH]`, `mnist[:PATH]`: the official files in PATH, data/cifar10 and
            data/mnist by default; `folder:PATH`: image files in PATH/CLASS, or PATH/train/CLASS and
            PATH/{test,val,validation}/CLASS; `synthetic[:[CHANNELSx]IMAGES]`: made up.
        resolution: of what nets see; None: the set's own, 224 for a folder. Others are resized to, with antialiasing.
        classes: only these, labelled in this order; (): all of them.
        validation: the share of every class's training images that is held out, the same ones in every run; a validation
            split that the set has by itself joins the training images before. None: the set's own, if it has one.
        skip_corrupt: leave out files that cannot be decoded instead of raising.
        channels: 1 makes images grey, 3 those of one channel RGB; None: as they are, RGB in a folder.
        memory_limit: bytes that the images of a folder may take in memory; those of a larger one are decoded when they are
            asked for. None: half of what is available.

    Raises:
        FileNotFoundError: the files are not there; the message says what was looked for and how to get it.
        ModuleNotFoundError: a library that the set needs is not installed; the message holds the command.
        ValueError: an argument out of range, or files that hold something else than they should.
    """
    kind, _, where = name.partition(":")
    if kind not in _READERS:
        raise ValueError(f"data: the data set must be one of {', '.join(NAMES)}, got {name!r}")
    if resolution is not None and resolution < 1:
        raise ValueError(f"data: resolution must be at least 1, got resolution={resolution}")
    if validation is not None and not 0 <= validation < 1:
        raise ValueError(f"data: validation must be in [0, 1), got validation={validation}")
    source = _only(_divided(_READERS[kind](where), validation, classes), classes)
    assert source.test is not None
    seen = resolution or source.resolution
    parts = {"training": source.train, "validation": source.validation, "test": source.test}
    sizes = {what: round(seen * MARGIN) if what == "training" else seen for what in parts}
    needed = sum(3 * sizes[what] ** 2 * len(part) for what, part in parts.items() if part is not None)
    fits = needed <= (available_memory() // 2 if memory_limit is None else memory_limit)

    splits: dict[str, Split | None] = {}
    skipped: tuple[str, ...] = ()
    for what, part in parts.items():
        if part is None:
            splits[what] = None
        elif isinstance(part.images, Tensor):
            splits[what] = Split(_resized(_with_channels(part.images, channels), seen), part.labels, part.names)
        else:
            files = Files(part.images, sizes[what], channels=channels or 3, skip_corrupt=skip_corrupt)
            splits[what] = _decoded(files, part, source.classes, what) if fits else Split(files, part.labels, part.names)
            skipped += files.skipped
    train, test = splits["training"], splits["test"]
    assert train is not None and test is not None
    if source.mean is None or source.std is None:
        assert isinstance(train.images, Tensor)
        mean, std = _statistics(train.images)
    else:
        mean, std = source.mean, source.std
        if channels == 1:
            mean, std = ((sum(w * v for w, v in zip(GREY, values, strict=True)),) for values in (mean, std))
    return Dataset(kind, source.classes, train, splits["validation"], test, mean, std, seen, skipped)


def _with_channels(images: Tensor, channels: int | None) -> Tensor:
    if channels in (None, images.shape[1]):
        return images
    if (images.shape[1], channels) == (1, 3):
        return images.expand(-1, 3, -1, -1)
    if channels != 1 or images.shape[1] != 3:
        raise ValueError(f"data: channels={channels} cannot be made of images of {images.shape[1]} channels")
    grey = sum(weight * images[:, channel].float() for channel, weight in enumerate(GREY))
    assert isinstance(grey, Tensor)
    return grey[:, None]


def _divided(source: Source, validation: float | None, classes: Sequence[str]) -> Source:
    """With test images, and with validation images as asked for: the same ones whichever classes are asked for."""
    train, held, test = source.train, source.validation, source.test
    if test is None:
        train, test = _held_out(source, train, _TEST, classes)
    if validation is not None:
        train, held = train if held is None else train.joined(held), None
        if validation:
            train, held = _held_out(source, train, validation, classes)
    return dataclasses.replace(source, train=train, validation=held, test=test)


def _held_out(source: Source, part: Part, share: float, classes: Sequence[str]) -> tuple[Part, Part]:
    """What stays, and what is held out. Of classes that nobody asked for, those too small to divide are dropped."""
    counts = part.labels.bincount(minlength=len(source.classes))
    too_few = counts < 2
    for label in too_few.nonzero().flatten().tolist():
        name = source.classes[label]
        if not classes or name in classes:
            raise ValueError(f"data: class {name!r} has only {counts[label]} training image, none of which can be held out")
    part = part.take((~too_few[part.labels]).nonzero().flatten())
    stay, held = stratified(part.labels, share)
    return part.take(stay), part.take(held)


def _only(source: Source, classes: Sequence[str]) -> Source:
    """The images of these classes, labelled in this order."""
    if not classes:
        return source
    if len(classes) < 2 or len({*classes}) < len(classes) or not {*classes} <= {*source.classes}:
        raise ValueError(
            f"data: classes must be at least two different ones of {', '.join(source.classes)}; got {', '.join(classes)}"
        )
    label = torch.full((len(source.classes),), -1)
    label[torch.tensor([source.classes.index(name) for name in classes])] = torch.arange(len(classes))

    def chosen(part: Part) -> Part:
        part = part.take((label[part.labels] >= 0).nonzero().flatten())
        return dataclasses.replace(part, labels=label[part.labels])

    held, test = (part and chosen(part) for part in (source.validation, source.test))
    return dataclasses.replace(source, classes=tuple(classes), train=chosen(source.train), validation=held, test=test)


def _resized(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, size, size]."""
    if images.shape[-1] == size and images.dtype == torch.uint8:
        return images
    out = torch.empty((*images.shape[:2], size, size), dtype=torch.uint8)
    for rows in torch.arange(len(images)).split(_AT_ONCE):
        some = images[rows].to(torch.float32)
        if some.shape[-1] != size:
            some = F.interpolate(some, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        out[rows] = some.round().clamp(0, 255).to(torch.uint8)
    return out


def _decoded(files: Files, part: Part, classes: tuple[str, ...], what: str) -> Split:
    images, rows = files.all()
    part = part.take(rows)
    counts = part.labels.bincount(minlength=len(classes))
    if not counts.all():
        empty = classes[int(counts.argmin())]
        raise ValueError(f"data: no {what} image of class {empty!r} can be decoded: {'; '.join(files.skipped[:3])}")
    return Split(images, part.labels, part.names)


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel, from counts of the 256 values: exact, and without a copy as floats."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256)
        mean = float((counts * values).sum() / counts.sum())
        variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(mean)
        stds.append(max(math.sqrt(variance), _LEAST_STD))
    return tuple(means), tuple(stds)


def available_memory() -> int:
    """Bytes that can be had without swapping; where Linux does not say, all that there are."""
    information = Path("/proc/meminfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
