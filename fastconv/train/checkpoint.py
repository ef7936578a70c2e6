"""Checkpoints: a net's weights and the settings that rebuild it, in a file that torch.load(weights_only=True) reads."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from fastconv.train.loop import Outcome, Settings, build

_FORMAT = 1


def save(path: Path, outcome: Outcome, *, in_channels: int, classes: int) -> None:
    """Write a trained net to `path`: the whole file or nothing, whatever interrupts it."""
    content = {
        "format": _FORMAT,
        "model": {name: tensor.detach().cpu() for name, tensor in outcome.model.state_dict().items()},
        "settings": outcome.settings.as_dict(),
        "in_channels": in_channels,
        "classes": classes,
        "layers": outcome.layers,
        "test_accuracy": outcome.test_accuracy,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, *, layers: str = "fastconv") -> tuple[nn.Module, Settings]:
    """The net in a checkpoint, in eval mode on the CPU, and the settings that it was trained with.

    Args:
        layers: "fastconv" or "torch", whichever it was trained on.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of `fastconv train` (format {_FORMAT})")
    settings = Settings(**content["settings"])
    model = build(settings, content["in_channels"], content["classes"], layers)
    model.load_state_dict(content["model"])
    return model.eval(), settings
