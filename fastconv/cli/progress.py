"""What a person sees of a training while it runs: a bar on a terminal, a line for each epoch everywhere."""

from __future__ import annotations

import importlib
import os
import sys
import time
from types import TracebackType
from typing import Any

from fastconv.train.trainee import Epoch, Trainee

_LOOK_EVERY = 0.25  # seconds: to read a loss is to wait for the GPU


def require_tqdm() -> None:
    """Raise ModuleNotFoundError, with the command to type, where no progress could be shown."""
    try:
        importlib.import_module("tqdm")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress is shown by tqdm, which is not installed: pip install 'fastconv[train]' (or tqdm)"
        ) from error


class Progress:
    """A context; `quiet` says nothing at all."""

    def __init__(self, images: int, epochs: int, quiet: bool) -> None:
        require_tqdm()
        from tqdm import tqdm

        self._epochs, self._quiet, self._looked = epochs, quiet, 0.0
        self._bar: Any = tqdm(
            total=images,
            unit="img",
            unit_scale=True,
            disable=True if quiet else None,  # None: where it is not a terminal
            smoothing=0.05,
            colour="blue" if _coloured() else None,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def step(self, trainee: Trainee, images: int) -> None:
        now = time.monotonic()
        if not self._bar.disable and now - self._looked > _LOOK_EVERY:
            self._looked = now
            loss, accuracy = trainee.loss_and_accuracy
            self._bar.set_postfix_str(f"{trainee.label} loss {loss:.3f} accuracy {100 * accuracy:.1f} %", refresh=False)
        self._bar.update(images)

    def epoch(self, epoch: Epoch) -> None:
        self.say(
            f"seed {epoch.seed} epoch {epoch.epoch:>{len(str(self._epochs))}}/{self._epochs} {epoch.label:<8}  "
            f"train {epoch.train_loss:.3f} {100 * epoch.train_accuracy:6.2f} %  "
            f"{epoch.held_out} {epoch.held_out_loss:.3f} {100 * epoch.held_out_accuracy:6.2f} %  "
            f"{epoch.images_per_second:,.0f} images/s"
        )

    def reach(self, images: int) -> None:
        """So many are done, those of nets that were finished before among them."""
        self._bar.update(images - self._bar.n)

    def say(self, text: str) -> None:
        if not self._quiet:
            self._bar.write(text)


def _coloured() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
