"""What a trained net says of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastconv.train import checkpoint
from fastconv.train.batches import standardise
from fastconv.train.checkpoint import Checkpoint
from fastconv.train.data import MARGIN
from fastconv.train.sources import folder
from fastconv.train.step import autocast, probabilities


class Predictor:
    """The net of a checkpoint, ready for images.

    Args:
        path: of a checkpoint of `fastconv train`.
        device: "cpu", "cuda", ...
        layers: "fastconv" or "torch".
        tta: "test-time augmentation": scores are the mean over five crops (corners and centre) and their reflections, of an
            image whose smaller side is 8/7 of the net's resolution (Krizhevsky, Sutskever and Hinton, 2012).
        model: the net's file or module, where it is one of one's own, as for `checkpoint.load_model`.

    Attributes:
        classes: names, by label.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there.
    """

    def __init__(
        self, path: Path, *, device: str = "cpu", layers: str = "fastconv", tta: bool = False, model: str | None = None
    ) -> None:
        self._model: nn.Module
        self._checkpoint: Checkpoint
        self._model, self._checkpoint = checkpoint.load_model(path, layers=layers, model=model)
        self._settings = self._checkpoint.settings.on(device)
        self._model.to(device)
        self._tta = tta
        self.classes = self._checkpoint.facts.classes

    def scores(self, files: Iterable[Path]) -> Iterator[Tensor]:
        """Of each file, float32 [classes] in [0, 1], of sum 1.

        Raises:
            FileNotFoundError, ValueError: a file is not there, or is no image; the message names it.
        """
        facts, side = self._checkpoint.facts, self._settings.resolution
        for file in files:
            pixels = folder.decode(file, round(side * MARGIN) if self._tta else side, channels=facts.channels)
            views = crops(pixels, side) if self._tta else pixels[None]
            yield self._probabilities(standardise(views, facts.mean, facts.std)).mean(0)

    def top(self, scores: Tensor, count: int) -> list[tuple[str, float]]:
        """The likeliest classes, first the likeliest, with their scores."""
        best = scores.topk(min(count, len(self.classes)))
        return [
            (self.classes[label], score) for label, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def _probabilities(self, images: Tensor) -> Tensor:
        with autocast(self._settings):
            scores = self._model(images.to(self._settings.device))
        return probabilities(scores).cpu()


def crops(image: Tensor, side: int) -> Tensor:
    """The crops at the four corners and in the centre of an image [C, S, S], and their reflections: [10, C, side, side]."""
    last = image.shape[-1] - side
    corners = ((0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 2))
    five = torch.stack([image[:, top : top + side, left : left + side] for top, left in corners])
    return torch.cat((five, five.flip(3)))
