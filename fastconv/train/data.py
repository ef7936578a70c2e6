"""The embedded data set: scikit-learn's handwritten digits, split once and for all, and seeded batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SPLIT_SEED = 1797  # of the split only: it never moves with the seed of a training
_VALIDATION, _TEST = 0.1, 0.2
_LARGEST_PIXEL = 16.0


@dataclass(frozen=True)
class Split:
    """Images float32 [N, C, R, R], standardised; labels int64 [N]; `rows` int64 [N], their places in the source."""

    images: Tensor
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        images = self.images.to(device, memory_format=torch.channels_last)
        return Split(images, self.labels.to(device), self.rows)


@dataclass(frozen=True)
class Dataset:
    """Three disjoint, stratified splits. `background` is the value of an empty pixel after standardisation."""

    train: Split
    validation: Split
    test: Split
    classes: int
    background: float

    def to(self, device: torch.device) -> Dataset:
        train, validation, test = (s.to(device) for s in (self.train, self.validation, self.test))
        return Dataset(train, validation, test, self.classes, self.background)


def load_digits(resolution: int = 32) -> Dataset:
    """The 1,797 real images of 8×8 pixels that come with scikit-learn, resized bilinearly to `resolution`.

    One channel, mean 0 and variance 1 over the training images; 70% training, 10% validation and 20% test images of
    every class, the same ones in every run.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message holds the command.

    Source:
        E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install 'fastconv[train]' (or scikit-learn)"
        ) from error
    source = load()
    images = torch.from_numpy(source.images).to(torch.float32)[:, None] / _LARGEST_PIXEL
    labels = torch.from_numpy(source.target).to(torch.int64)
    images = F.interpolate(images, size=(resolution, resolution), mode="bilinear", align_corners=False)

    train, validation, test = _stratified(labels)
    variance, mean = torch.var_mean(images[train])
    images = (images - mean) / variance.sqrt()

    def split(rows: Tensor) -> Split:
        return Split(images[rows], labels[rows], rows)

    background = float(-mean / variance.sqrt())
    return Dataset(split(train), split(validation), split(test), classes=10, background=background)


@dataclass(frozen=True)
class Augmentation:
    """How far an image is moved at random: `turn` in degrees; `scale` and `shift` as shares of its size."""

    turn: float = 10.0
    scale: float = 0.1
    shift: float = 0.08


def batches(
    split: Split, batch_size: int, augmentation: Augmentation, *, background: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images once, shuffled, each turned, scaled and shifted at random.

    Everything random comes from `generator` (on the CPU): two nets given equal generators see equal batches.

    Yields:
        images float32 [B, C, R, R], channels_last, and labels int64 [B]; the last batch may be smaller.
    """
    device = split.images.device
    order = torch.randperm(len(split), generator=generator).to(device)
    moves = _affine(len(split), augmentation, generator).to(device)
    # grid_sample fills with zeros what lies outside: let zero be the background.
    source = split.images - background
    for start in range(0, len(split), batch_size):
        chosen = order[start : start + batch_size]
        images = source[chosen]
        grid = F.affine_grid(moves[start : start + batch_size], list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + background
        yield images.contiguous(memory_format=torch.channels_last), split.labels[chosen]


def _affine(count: int, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Random maps [count, 2, 3] from output to input coordinates, both in [-1, 1]."""
    turn, scale, right, down = torch.rand(4, count, generator=generator) * 2 - 1
    angle = torch.deg2rad(turn * augmentation.turn)
    scale = 1 + scale * augmentation.scale
    right, down = 2 * augmentation.shift * right, 2 * augmentation.shift * down
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    return torch.stack((cosine, -sine, right, sine, cosine, down), 1).view(count, 2, 3)


def _stratified(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of training, validation and test images: the same shares of every class."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        validation, test = round(_VALIDATION * len(rows)), round(_TEST * len(rows))
        sizes = (len(rows) - validation - test, validation, test)
        for part, chosen in zip(parts, rows.split(sizes), strict=True):
            part.append(chosen)
    train, validation_rows, test_rows = (torch.cat(part).sort().values for part in parts)
    return train, validation_rows, test_rows
