"""The training loop: the same net on fastconv's and on torch's layers, epoch about, on the same batches."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastconv.bench.timing import stopwatch
from fastconv.models import recipe_net
from fastconv.train.data import Augmentation, Dataset, Split, batches

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_RISE = 0.25  # of the steps
_LEAST = 1e-3  # of the highest learning rate


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the data. All of it goes into the checkpoint.

    Attributes:
        resolution, width, max_width, downsample: the recipe net's.
        epochs, batch_size, learning_rate, weight_decay, label_smoothing: AdamW under a one-cycle schedule.
        turn, scale, shift: how far images are moved at random, as in data.Augmentation.
        seed: of the initial weights, of the order of images and of their moves.
        dtype: "float32", or "bfloat16" / "float16" by autocast.
        device: "cpu", "cuda", "cuda:1", ...
    """

    resolution: int = 32
    width: int = 32
    max_width: int = 256
    downsample: str = "max"
    epochs: int = 16
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    turn: float = 10.0
    scale: float = 0.1
    shift: float = 0.08
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {name}={getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"train: dtype must be one of {', '.join(DTYPES)}, got dtype={self.dtype!r}")

    def as_dict(self) -> dict[str, int | float | str]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Epoch:
    """One epoch of one net. Losses are means over images; accuracies are shares in [0, 1]; seconds are of training only."""

    layers: str
    seed: int
    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """A finished training of one net: its epochs and, measured once after the last of them, its test accuracy."""

    layers: str
    settings: Settings
    model: nn.Module
    epochs: tuple[Epoch, ...]
    test_accuracy: float


class _Trainee:
    """A net with its optimizer."""

    def __init__(self, layers: str, data: Dataset, settings: Settings) -> None:
        self.layers, self._settings = layers, settings
        self._device = torch.device(settings.device)
        torch.manual_seed(settings.seed)
        model = build(settings, data.train.images.shape[1], data.classes, layers)
        self.model = model.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        steps = settings.epochs * steps_per_epoch(data, settings)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: one_cycle(step / steps))
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=settings.dtype == "float16")
        self._loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self.epochs: list[Epoch] = []

    def train_epoch(self, data: Dataset, epoch: int, on_step: Callable[[], None]) -> Epoch:
        settings = self._settings
        # Seeded by the epoch and not by the net: both nets see the same images, moved alike, in the same order.
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        augmentation = Augmentation(settings.turn, settings.scale, settings.shift)
        loss_sum = torch.zeros((), device=self._device)
        right = torch.zeros((), dtype=torch.int64, device=self._device)
        self.model.train()
        with stopwatch(self._device) as watch:
            for images, labels in batches(
                data.train, settings.batch_size, augmentation, background=data.background, generator=generator
            ):
                scores = self._scores(images)
                loss = self._loss(scores, labels)
                self._optimizer.zero_grad(set_to_none=True)
                self._scaler.scale(loss).backward()
                self._scaler.step(self._optimizer)
                self._scaler.update()
                self._schedule.step()
                loss_sum += loss.detach() * len(labels)
                right += (scores.detach().argmax(1) == labels).sum()
                on_step()
        validation_loss, validation_accuracy = self.evaluate(data.validation)
        self.epochs.append(
            Epoch(
                layers=self.layers,
                seed=settings.seed,
                epoch=epoch + 1,
                train_loss=loss_sum.item() / len(data.train),
                train_accuracy=right.item() / len(data.train),
                validation_loss=validation_loss,
                validation_accuracy=validation_accuracy,
                seconds=watch.seconds,
            )
        )
        return self.epochs[-1]

    @torch.no_grad()
    def evaluate(self, split: Split) -> tuple[float, float]:
        """Mean loss and accuracy over all images of a split, unmoved."""
        self.model.eval()
        scores = torch.cat([self._scores(part) for part in split.images.split(256)])
        accuracy = (scores.argmax(1) == split.labels).double().mean().item()
        return self._loss(scores, split.labels).item(), accuracy

    def _scores(self, images: Tensor) -> Tensor:
        dtype = DTYPES[self._settings.dtype]
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype != torch.float32):
            scores: Tensor = self.model(images)
        return scores.float()


def build(settings: Settings, in_channels: int, classes: int, layers: str) -> nn.Module:
    """The net of these settings; its initial weights follow torch's global seed."""
    return recipe_net(
        settings.resolution,
        classes,
        in_channels=in_channels,
        width=settings.width,
        max_width=settings.max_width,
        downsample=settings.downsample,
        layers=layers,
    )


def one_cycle(progress: float) -> float:
    """The share of the highest learning rate after `progress` in [0, 1] of all steps: a linear rise, a half cosine down."""
    if progress < _RISE:
        return max(progress / _RISE, _LEAST)
    return max(0.5 * (1 + math.cos(math.pi * (progress - _RISE) / (1 - _RISE))), _LEAST)


def steps_per_epoch(data: Dataset, settings: Settings) -> int:
    return -(-len(data.train) // settings.batch_size)


def fit(
    data: Dataset,
    settings: Settings,
    *,
    layers: tuple[str, ...] = ("fastconv", "torch"),
    on_step: Callable[[], None] = lambda: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Outcome]:
    """Train one net per entry of `layers`, side by side: epoch about, so that their times are paired.

    All nets get the same initial weights, batches, schedule, memory format and threads. Which of them goes first is
    drawn anew for each epoch. The test images are looked at once, after the last epoch.

    Args:
        data: on any device; it is moved to `settings.device`.
        on_step: called after every step of every net.
        on_epoch: called after every epoch of every net.

    Raises:
        ValueError: settings that make no net, such as a resolution that does not halve exactly.
    """
    data = data.to(torch.device(settings.device))
    trainees = [_Trainee(name, data, settings) for name in layers]
    turns = random.Random(settings.seed)
    for epoch in range(settings.epochs):
        for trainee in turns.sample(trainees, len(trainees)):
            on_epoch(trainee.train_epoch(data, epoch, on_step))
    return [Outcome(t.layers, settings, t.model, tuple(t.epochs), test_accuracy=t.evaluate(data.test)[1]) for t in trainees]
