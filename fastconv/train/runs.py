"""The folder of a run: what it is, its records as they come, its checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fastconv.train import checkpoint
from fastconv.train.checkpoint import Checkpoint
from fastconv.train.keeper import checkpoint_name
from fastconv.train.settings import Settings

PICTURES = ("curves.png", "filters.png", "features.png", "embedding.png", "confusion.png", "mistakes.png")

_PLAN, _METRICS = "run.json", "metrics.jsonl"


@dataclass(frozen=True)
class Plan:
    """The trainings of a run: `settings` with each of the seeds, each by all of the labels side by side."""

    settings: Settings
    labels: tuple[str, ...]
    seeds: tuple[int, ...]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"settings": self.settings.as_dict(), "labels": list(self.labels), "seeds": list(self.seeds)}
        partial = folder / f"{_PLAN}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / _PLAN)

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of a run that was begun in `folder`.

        Raises:
            FileNotFoundError: none was.
            ValueError: its file holds something else.
        """
        path = folder / _PLAN
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no run to go on with")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(Settings.from_dict(content["settings"]), tuple(content["labels"]), tuple(content["seeds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the plan of a run: {error}") from error


def claim(runs: Path, name: str) -> int:
    """Make the first of the folders `name`, `name-2`, `name-3`, ... that there is not; its number."""
    runs.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            folder(runs, name, number).mkdir()  # of two runs that begin together one gets it
        except FileExistsError:
            number += 1
        else:
            return number


def last(runs: Path, name: str) -> int:
    """The greatest number of these folders.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [path.name.removeprefix(f"{name}-") for path in runs.glob(f"{name}-*")]
    numbers = [int(text) for text in found if text.isdecimal()] + [1] * folder(runs, name, 1).exists()
    if not numbers:
        raise FileNotFoundError(f"{runs / name} holds no run to go on with")
    return max(numbers)


def folder(runs: Path, name: str, number: int) -> Path:
    return runs / (name if number == 1 else f"{name}-{number}")


def clear(at: Path) -> None:
    """Remove what a former run left in a folder, and nothing else."""
    if at.is_dir():
        for pattern in (_PLAN, _METRICS, "*-seed*.pt", *PICTURES):
            for file in at.glob(pattern):
                file.unlink()


def is_begun(at: Path) -> bool:
    return (at / _PLAN).is_file()


class Metrics:
    """metrics.jsonl: a line for the start, one for each epoch of each net, one for each net's result."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def write(self, event: str, **values: object) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"event": event, **values}) + "\n")
            self._file.flush()


@contextmanager
def metrics(at: Path | None, plan: Plan, environment: Mapping[str, object]) -> Iterator[Metrics]:
    """The records of a run, which begin with those of epochs that its checkpoints hold; without a folder there are none."""
    if at is None:
        yield Metrics(None)
        return
    with open(at / _METRICS, "w", encoding="utf-8") as file:
        records = Metrics(file)
        records.write("start", **environment, **plan.settings.as_dict(), labels=plan.labels, seeds=plan.seeds)
        for kept in _kept(at, plan):
            for epoch in kept.state["epochs"]:
                records.write("epoch", **epoch)
        yield records


def changed(at: Path, plan: Plan, environment: Mapping[str, object]) -> Iterator[str]:
    """What is not as it was when the checkpoints were written, so that going on may differ in the last bits."""
    said: set[str] = set()
    for kept in _kept(at, plan):
        for name, value in environment.items():
            if kept.environment.get(name) != value and name not in said:
                said.add(name)
                yield f"{name} was {kept.environment.get(name)} and is {value}: what follows may differ by rounding"


def _kept(at: Path, plan: Plan) -> Iterator[Checkpoint]:
    for seed in plan.seeds:
        for label in plan.labels:
            path = at / checkpoint_name(label, seed)
            if path.is_file():
                yield checkpoint.load(path)
