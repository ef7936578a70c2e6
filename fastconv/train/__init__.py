"""Training the recipe net: data, loop, checkpoint, pictures."""

from __future__ import annotations

from fastconv.train.data import Dataset, Split, load_digits
from fastconv.train.loop import Epoch, Outcome, Settings, fit

__all__ = ["Dataset", "Epoch", "Outcome", "Settings", "Split", "fit", "load_digits"]
