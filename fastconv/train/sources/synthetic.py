"""Made-up images of any number: for tests, and for times that no disk has a part in."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

from fastconv.train.sources import Part, Source

_CLASSES = 10
_SIZE = 32
_SEED = 10


def read(where: str) -> Source:
    """`where` is "IMAGES" or "CHANNELSxIMAGES": "2000", "1x2000"; "" is 3x1000.

    Ten classes: each a smooth random pattern of its own, the same in every run, under noise anew for each image.

    Raises:
        ValueError: anything else, or fewer than two images a class.
    """
    form = re.fullmatch(r"(?:([1-9]\d*)x)?(\d+)", where or "3x1000")
    if form is None or int(form[2]) < 2 * _CLASSES:
        raise ValueError(
            f"data: synthetic takes the number of images, at least {2 * _CLASSES}, after that of channels if it is not 3: "
            f"'synthetic:2000' or 'synthetic:1x2000'; got 'synthetic:{where}'"
        )
    channels, count = int(form[1] or 3), int(form[2])
    generator = torch.Generator().manual_seed(_SEED)
    coarse = torch.randn(_CLASSES, channels, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=(_SIZE, _SIZE), mode="bicubic", align_corners=False)
    labels = torch.arange(count) % _CLASSES
    images = torch.empty(count, channels, _SIZE, _SIZE, dtype=torch.uint8)
    for rows in torch.arange(count).split(256):
        noise = torch.randn(len(rows), channels, _SIZE, _SIZE, generator=generator)
        images[rows] = (127.5 + 50 * patterns[labels[rows]] + 40 * noise).round().clamp(0, 255).to(torch.uint8)
    whole = Part(images, labels, [f"synthetic {row}" for row in range(count)])
    return Source(tuple("0123456789"), whole, None, None, resolution=_SIZE)
