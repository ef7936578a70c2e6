"""What the values of options may be, for all commands."""

from __future__ import annotations

import argparse

import torch


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def device(name: str) -> str:
    """A device's name; 'auto' is a GPU where there is one.

    Raises:
        ValueError: torch has no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(name).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device; `fastconv info` says why")
    return name
