"""Checkpoints: files that torch.load(weights_only=True) reads, each of which is there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastconv.train.data import Dataset
from fastconv.train.nets import build
from fastconv.train.settings import Settings

_FORMAT = 2


@dataclass(frozen=True)
class Facts:
    """What a net has to know of its data: names by label, channels, mean and std of pixels in [0, 1]."""

    classes: tuple[str, ...]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, data: Dataset) -> Facts:
        return cls(data.classes, data.train.images.shape[1], data.mean, data.std)

    def as_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Checkpoint:
    """A file's content: what a training is, and where it stands."""

    settings: Settings
    facts: Facts
    state: Mapping[str, Any]
    result: Mapping[str, float] | None
    environment: Mapping[str, Any]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: whatever ends the process meanwhile, `path` holds the former content or the new one."""
    content = {
        "format": _FORMAT,
        "settings": checkpoint.settings.as_dict(),
        "facts": checkpoint.facts.as_dict(),
        "state": dict(checkpoint.state),
        "result": None if checkpoint.result is None else dict(checkpoint.result),
        "environment": dict(checkpoint.environment),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*.partial"):  # of a process that was killed
        left.unlink(missing_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # a name must not come to stand for bytes that a power cut takes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's reader of weights raises whatever strange bytes lead it to
        raise ValueError(f"{path} is not a checkpoint of `fastconv train`: {type(error).__name__}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of `fastconv train` (format {_FORMAT})")
    facts = content["facts"]
    known = Facts(tuple(facts["classes"]), facts["channels"], tuple(facts["mean"]), tuple(facts["std"]))
    settings = Settings.from_dict(content["settings"])
    return Checkpoint(settings, known, content["state"], content["result"], content["environment"])


def load_model(path: Path, *, layers: str = "fastconv") -> tuple[nn.Module, Checkpoint]:
    """The net in a checkpoint, in evaluation mode on the CPU, and all else that the file holds.

    Args:
        layers: "fastconv" or "torch", whichever it was trained on.

    Raises:
        FileNotFoundError, ValueError: as `load`, and as the building of the net.
    """
    checkpoint = load(path)
    facts = checkpoint.facts
    model = build(checkpoint.settings, classes=len(facts.classes), channels=facts.channels, layers=layers)
    model.load_state_dict(checkpoint.state["model"])
    return model.eval(), checkpoint
