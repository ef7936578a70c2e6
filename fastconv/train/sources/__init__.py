"""Where images come from: each source reads its files as they are published, and none ever reaches for the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SPLIT_SEED = 1797  # of splits only: it never moves with the seed of a training


@dataclass(frozen=True)
class Part:
    """Some images of a source, as read.

    Attributes:
        images: [N, C, S, S], uint8, or float32 from 0 to 255 where pixels have still to be rounded; or the files' paths.
        labels: int64 [N].
        names: what a person calls each image.
    """

    images: Tensor | Sequence[str]
    labels: Tensor
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Part:
        places = rows.tolist()
        images = self.images[rows] if isinstance(self.images, Tensor) else [self.images[place] for place in places]
        return Part(images, self.labels[rows], [self.names[place] for place in places])

    def joined(self, other: Part) -> Part:
        if isinstance(self.images, Tensor) and isinstance(other.images, Tensor):
            images: Tensor | Sequence[str] = torch.cat((self.images, other.images))
        else:
            images = [*self.images, *other.images]
        return Part(images, torch.cat((self.labels, other.labels)), [*self.names, *other.names])


@dataclass(frozen=True)
class Source:
    """What there is to read. A source without `test` images of its own has some of the training ones held out.

    Attributes:
        resolution: of the images, or the usual one where they come in all sizes.
        mean, std: by channel, of pixels in [0, 1]; None: those of the training images.
    """

    classes: tuple[str, ...]
    train: Part
    validation: Part | None
    test: Part | None
    resolution: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def stratified(labels: Tensor, *shares: float) -> list[Tensor]:
    """Row numbers, in order, of those that stay and of each share that is held out: the same shares of every class.

    At least one image of every class is held out for each share.

    Raises:
        ValueError: no image of a class would stay; the message holds the label.
    """
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    parts: list[list[Tensor]] = [[] for _ in range(1 + len(shares))]
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held = [max(1, round(share * len(rows))) for share in shares]
        if sum(held) >= len(rows):
            raise ValueError(f"label {label}: of {len(rows)} images {sum(held)} cannot be held out and one stay")
        for part, chosen in zip(parts, rows.split([len(rows) - sum(held), *held]), strict=True):
            part.append(chosen)
    return [torch.cat(part).sort().values for part in parts]
