"""What the values of options may be, for all commands."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from fastconv import models

MODELS = f"{', '.join(models.list())}, path/to/file.py:callable or package.module:callable"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def device(name: str) -> str:
    """A device's name; 'auto' is a GPU where there is one.

    Raises:
        ValueError: torch has no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: allowed: auto, cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device; `fastconv info` says why")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices, the first one cuda:0")
    return name


def model_name(text: str) -> str:
    if ":" not in text:
        try:
            models.registry.entry(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text


def model(name: str, shape: tuple[int, ...], layers: str = "fastconv") -> nn.Module:
    """The net of --model for batches of --input [N, C, H, W].

    Args:
        name: of the registry, or of a callable, which is called without arguments.
        layers: of the registry's nets; a callable's net is what it is.

    Raises:
        ValueError: there is no such net, or the registry's does not take such images.
    """
    try:
        if ":" in name:
            return models.load(name)
        entry = models.registry.entry(name)
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error
    height, width = shape[2:]
    try:
        if height != width and entry.smallest is None:
            raise ValueError("takes square images")
        return models.build(name, in_channels=shape[1], resolution=min(height, width), layers=layers)
    except ValueError as error:
        raise ValueError(f"--model {name}, --input {'x'.join(map(str, shape))}: {error}") from error
