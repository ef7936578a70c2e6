"""Training: data sets, the loop, checkpoints, pictures, predictions."""

from __future__ import annotations

from fastconv.train.augment import Augmentation
from fastconv.train.data import Dataset, Split, load
from fastconv.train.loop import Outcome, fit
from fastconv.train.predict import Predictor
from fastconv.train.settings import Settings
from fastconv.train.stop import Stopped
from fastconv.train.trainee import Epoch, Score

__all__ = [
    "Augmentation",
    "Dataset",
    "Epoch",
    "Outcome",
    "Predictor",
    "Score",
    "Settings",
    "Split",
    "Stopped",
    "fit",
    "load",
]
