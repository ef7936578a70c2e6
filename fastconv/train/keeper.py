"""What keeps a training: checkpoints after epochs and on signals, and going on from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastconv.train import checkpoint
from fastconv.train.checkpoint import Checkpoint, Facts
from fastconv.train.distributed import Group
from fastconv.train.settings import Settings
from fastconv.train.stop import Request, Stopped, requests
from fastconv.train.trainee import Score, Trainee

_AGREE_EVERY = 8  # steps, after which several processes ask each other whether to stop


class Keeper:
    """Of the nets of one training. Without a folder nothing is kept, and signals do what they always do.

    Args:
        folder: where `checkpoint_name(label, seed)` lies for each net.
        environment: told in the checkpoint: versions, threads and what else decides on the last bits.
    """

    def __init__(
        self, folder: Path | None, settings: Settings, facts: Facts, group: Group, environment: Mapping[str, Any]
    ) -> None:
        self._folder, self._settings, self._facts = folder, settings, facts
        self._group, self._environment = group, environment
        self._request = Request()

    def path(self, trainee: Trainee) -> Path | None:
        return None if self._folder is None else self._folder / checkpoint_name(trainee.label, self._settings.seed)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A block in which signals wait until `stop_if_asked`."""
        if self._folder is None:
            yield
            return
        with requests() as self._request:
            yield

    def after_step(self, trainee: Trainee) -> None:
        """Write a checkpoint and stop, if a signal came; at the end of an epoch that is done anyway.

        Raises:
            Stopped: one came.
        """
        if not trainee.ends_epoch and (self._group.world == 1 or trainee.step % _AGREE_EVERY == 0):
            self.stop_if_asked(trainee, is_kept=False)

    def stop_if_asked(self, trainee: Trainee, *, is_kept: bool = True) -> None:
        """Stop, if a signal came to one of the processes, which all call this; `is_kept`: the checkpoint is written.

        Raises:
            Stopped: one came.
        """
        if self._folder is None or not (number := self._group.any(self._request.number)):
            return
        if not is_kept:
            self.save(trainee)
        place = "at the end" if trainee.is_finished else f"at epoch {trainee.epoch + 1}, step {trainee.step}"
        raise Stopped(f"stopped {place}; {self.path(trainee)} is written, --resume goes on from it", number)

    def save(self, trainee: Trainee, score: Score | None = None) -> None:
        """Write the net's checkpoint; by one of the processes, which all call this."""
        path = self.path(trainee)
        if path is None:
            return
        state = trainee.state()
        if self._group.is_first:
            result = None if score is None else vars(score)
            checkpoint.save(path, Checkpoint(self._settings, self._facts, state, result, self._environment))
        self._group.barrier()  # none ends before the file is there

    def restore(self, trainee: Trainee) -> Score | None:
        """Go on from the net's checkpoint where there is one; the score on the test images if it was finished.

        Raises:
            ValueError: the checkpoint is of another training, or of another number of processes in the middle of an epoch.
        """
        path = self.path(trainee)
        if path is None or not path.is_file():
            return None
        kept = checkpoint.load(path)
        ours, theirs = self._settings.as_dict(), kept.settings.as_dict()
        names = ours.keys() - {"device", "cuda_graph"}  # of where it runs, not of what
        other = [f"{name}={theirs[name]!r}, now {ours[name]!r}" for name in sorted(names) if theirs[name] != ours[name]]
        if kept.facts != self._facts:
            other.append("the data have changed")
        if other:
            raise ValueError(f"train: {path} is of another training: {'; '.join(other)}")
        worlds = {len(values) for values in kept.state["by_rank"].values()}
        if worlds - {self._group.world}:
            raise ValueError(
                f"train: {path} was written in the middle of an epoch by {max(worlds)} processes; as many must "
                f"go on from it, got {self._group.world}"
            )
        trainee.restore(kept.state)
        return None if kept.result is None else Score(**kept.result)


def checkpoint_name(label: str, seed: int) -> str:
    return f"{label}-seed{seed}.pt"
