"""Trainings from their first epoch, or from a checkpoint, to the test images."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastconv.bench.gate import searching
from fastconv.convert import convert
from fastconv.train import augment, checkpoint, nets
from fastconv.train.batches import Batches
from fastconv.train.checkpoint import Facts
from fastconv.train.data import Dataset, available_memory, load
from fastconv.train.distributed import Group, current
from fastconv.train.keeper import Keeper
from fastconv.train.settings import LABELS, Settings
from fastconv.train.trainee import Epoch, Score, Trainee

_TURNS = 1_000_003


@dataclass(frozen=True)
class Outcome:
    """A finished training of one net: its epochs and, measured once after the last of them, its score on the test images."""

    label: str
    settings: Settings
    model: nn.Module
    epochs: tuple[Epoch, ...]
    test: Score


def fit(
    settings: Settings | None = None,
    *,
    data: Dataset | None = None,
    model: nn.Module | None = None,
    folder: Path | None = None,
    resume: bool = False,
    on_step: Callable[[Trainee], None] = lambda trainee: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Outcome:
    """Train a net on fastconv's layers.

    Args:
        settings: what to train, on what and how; `Settings.of("cifar10", epochs=10)`, say. Without any, the recipe net on
            the digits.
        data: images, in place of those that `settings.data` names.
        model: a net with scores [N, classes], in place of the one that `settings.model` names. It is trained itself, by way
            of fused layers that share its Parameters, and goes to `settings.device` for that. Of its checkpoint
            `state["model"]` is to be loaded; `load_model` cannot build it.
        folder: where the checkpoint `fastconv-seed<seed>.pt` is written after each epoch, and when SIGINT or SIGTERM comes.
        resume: go on from that checkpoint, where there is one. On the same backend and number of threads, and with
            fastconv's own kernels, all is bit for bit as if it had not been interrupted; oneDNN's and cuDNN's kernels, which
            serve some layers, promise no such thing.
        on_step: called after each step with the net in training (`epoch`, `step`, `learning_rate`, `loss_and_accuracy`).
        on_epoch: called after each epoch.

    Returns:
        The trained net in evaluation mode, its epochs and its score on the test images.

    Raises:
        ValueError: settings, data and net that do not fit each other; a checkpoint of another training.
        FileNotFoundError, ModuleNotFoundError: data that are not there, or what they are read with.
        Stopped: a signal came, and the checkpoint is written; a KeyboardInterrupt.

    Example:
        >>> settings = Settings.of("synthetic:200", epochs=1, resolution=8, options={"width": 8, "max_width": 8})
        >>> len(fit(settings).epochs)
        1
    """
    (outcome,) = fit_together(
        settings or Settings(),
        ["fastconv"],
        data=data,
        model=model,
        folder=folder,
        resume=resume,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    return outcome


def fit_together(
    settings: Settings,
    labels: Sequence[str] = LABELS,
    *,
    data: Dataset | None = None,
    model: nn.Module | None = None,
    folder: Path | None = None,
    resume: bool = False,
    group: Group | None = None,
    environment: Mapping[str, Any] | None = None,
    on_step: Callable[[Trainee], None] = lambda trainee: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Outcome]:
    """Train one net for each label, side by side: epoch about, so that their times are paired.

    All get the same initial weights, batches, schedule, memory format and threads. Which of them goes first is drawn anew
    for each epoch. Where there are validation images, the test images are looked at once, after the last epoch.

    Arguments as those of `fit`, and:

    Args:
        labels: "fastconv", "torch" (eager, channels_last), "compile" (the same through torch.compile).
        group: the processes that train together, from `distributed.joined`.
        environment: kept in the checkpoint.
    """
    unknown = [label for label in labels if label not in LABELS]
    if unknown or not labels or len(set(labels)) < len(labels):
        raise ValueError(f"train: nets must be different ones of {', '.join(LABELS)}, got {', '.join(labels) or 'none'}")
    if model is not None and len(labels) > 1:
        raise ValueError(f"train: model must be named, not handed over, to be trained as {', '.join(labels)}")
    if model is not None:
        settings = dataclasses.replace(settings, model="")
    group = group or Group()
    data = data or of_settings(settings, group.world)
    device = torch.device(settings.device)
    batches = batches_of(settings, data, group)
    keeper = Keeper(folder, settings, Facts.of(data), group, environment or {})
    nets_by_label = {label: net_of(settings, data, label, model).to(device) for label in labels}
    trainees = [Trainee(label, net, data, batches, settings, group) for label, net in nets_by_label.items()]
    results = [keeper.restore(trainee) if resume else None for trainee in trainees]

    def after_step(trainee: Trainee) -> None:
        on_step(trainee)
        keeper.after_step(trainee)

    with keeper.listening(), searching(True), current(device):
        for trainee in trainees:
            if not trainee.is_finished:
                trainee.prepare(always=len(trainees) > 1)
        for epoch in range(settings.epochs):
            turns = random.Random(settings.seed * _TURNS + epoch)
            for trainee in turns.sample(trainees, len(trainees)):
                if trainee.epoch == epoch:
                    done = trainee.train_epoch(after_step)
                    keeper.save(trainee)
                    if group.is_first:
                        on_epoch(done)
                    keeper.stop_if_asked(trainee)
        outcomes = []
        for trainee, result in zip(trainees, results, strict=True):
            score = result or trainee.evaluate("test")
            if result is None:
                keeper.save(trainee, score)
                keeper.stop_if_asked(trainee)
            trainee.model.zero_grad(set_to_none=True)
            outcomes.append(Outcome(trainee.label, settings, trainee.model.eval(), tuple(trainee.epochs), score))
    return outcomes


def of_settings(settings: Settings, processes: int = 1) -> Dataset:
    """The data that settings name; for a net with borrowed weights, in the channels and on the scale that these know."""
    lent = checkpoint.load(Path(settings.transfer)).facts if settings.transfer else None
    data = load(
        settings.data,
        resolution=settings.resolution,
        classes=settings.classes,
        validation=settings.validation,
        skip_corrupt=settings.skip_corrupt,
        channels=None if lent is None else lent.channels,
        memory_limit=available_memory() // (2 * processes),
    )
    return data if lent is None else dataclasses.replace(data, mean=lent.mean, std=lent.std)


def batches_of(settings: Settings, data: Dataset, group: Group) -> Batches:
    """The training images of this process."""
    return Batches(
        data,
        batch_size=settings.batch_size,
        device=torch.device(settings.device),
        augmentation=augment.default(data.name) if settings.augmentation is None else settings.augmentation,
        seed=settings.seed,
        rank=group.rank,
        world=group.world,
    )


def net_of(settings: Settings, data: Dataset, label: str, given: nn.Module | None = None) -> nn.Module:
    """The net of a label with its first weights, on the CPU but for one that was handed over."""
    layers = "fastconv" if label == "fastconv" else "torch"
    if given is not None:
        given = given.to(settings.device)  # before its Parameters are shared: its buffers go with them
        return convert(given) if layers == "fastconv" else given
    facts = Facts.of(data)
    model = nets.build(settings, classes=len(facts.classes), channels=facts.channels, layers=layers)
    if settings.transfer:
        lent = checkpoint.load(Path(settings.transfer))
        nets.borrow(model, lent.state["model"], settings.transfer)
    return model
