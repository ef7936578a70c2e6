"""Checkpoints: files that torch.load(weights_only=True) reads, each of which is there as a whole or not at all."""

from __future__ import annotations

import dataclasses
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
    """What a net has to know of its data: names by label, channels, mean and std of pixels in [0, 1]; and which they are."""

    classes: tuple[str, ...]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    @classmethod
    def of(cls, data: Dataset) -> Facts:
        return cls(data.classes, data.train.images.shape[1], data.mean, data.std, data.digest())

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Facts:
        known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        return cls(**known)

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
    try:
        facts, settings = Facts.from_dict(content["facts"]), Settings.from_dict(content["settings"])
        return Checkpoint(settings, facts, content["state"], content["result"], content["environment"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of this version of `fastconv train`: {error}") from error


def transferring(path: Path, data: str, **given: Any) -> Settings:
    """The settings that suit a data set, for the net and the size of a checkpoint, whose weights are the first ones.

    Args:
        given: as those of `Settings.of`; a model among them is taken in place of the checkpoint's, with its own size.

    Raises:
        FileNotFoundError, ValueError: as `load` and `Settings.of`.
    """
    lent, model = load(path).settings, given.get("model")
    if model not in (None, lent.model):
        return Settings.of(data, **given, transfer=str(path))
    trust(lent, path, model)
    asked = {name: value for name, value in given.items() if value is not None}
    own = {"model": lent.model, "resolution": lent.resolution, "embedding": lent.embedding}
    settings = Settings.of(data, **{**own, **asked}, transfer=str(path))
    return dataclasses.replace(settings, options={**lent.options, **asked.get("options", {})})


def trust(settings: Settings, path: Path, model: str | None) -> None:
    """
    Raises:
        ValueError: the net of a checkpoint is built by code that `model` does not name.
    """
    if ":" in settings.model and model != settings.model:
        raise ValueError(
            f"{path}: its net is built by running {settings.model}; if that is what you want, name it: "
            f"{'model' if model is None else f'model={model!r} is another one,'} must be {settings.model!r}"
        )


def load_model(path: Path, *, layers: str = "fastconv", model: str | None = None) -> tuple[nn.Module, Checkpoint]:
    """The net in a checkpoint, in evaluation mode on the CPU, and all else that the file holds.

    Args:
        layers: "fastconv" or "torch", whichever it was trained on.
        model: what the checkpoint must name. A net of one's own, by file or module, is built by running that code: it has to
            be named here too, as no file of weights may decide on what is run.

    Raises:
        FileNotFoundError, ValueError: as `load`, and as the building of the net; a net of one's own that is not named.
    """
    checkpoint = load(path)
    trust(checkpoint.settings, path, model)
    facts = checkpoint.facts
    net = build(checkpoint.settings, classes=len(facts.classes), channels=facts.channels, layers=layers)
    net.load_state_dict(checkpoint.state["model"])
    return net.eval(), checkpoint
