"""Training on a GPU: captured steps, the loss scale, going on, and where images lie."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch

from fastconv import models
from fastconv.train import Dataset, Settings, Stopped, fit, load
from fastconv.train.distributed import Group
from fastconv.train.loop import batches_of
from fastconv.train.step import Step
from fastconv.train.trainee import Trainee

pytestmark = pytest.mark.gpu

SMALL = Settings.of(
    "synthetic:400",
    resolution=32,
    options={"width": 16, "max_width": 32, "batch_norm": True},
    epochs=2,
    batch_size=32,
    device="cuda",
)
HOW = [
    pytest.param({"optimizer": kind, "dtype": dtype, "learning_rate": rate}, id=f"{kind}-{dtype}")
    for kind, rate in (("adamw", 2e-3), ("sgd", 5e-2))
    for dtype in ("float32", "bfloat16", "float16")
]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("synthetic:400", resolution=32)


@pytest.mark.parametrize("how", HOW)
def test_a_captured_step_learns_what_an_eager_one_learns(data: Dataset, how: dict) -> None:
    eager, captured = (fit(dataclasses.replace(SMALL, **how, cuda_graph=graph), data=data) for graph in (False, True))
    for ours, theirs in zip(captured.epochs, eager.epochs, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=0.05)
    assert captured.epochs[-1].train_loss < 0.9 * captured.epochs[0].train_loss
    assert all(epoch.growth > 0 for epoch in (*captured.epochs, *eager.epochs))


@pytest.mark.parametrize("how", HOW)
def test_the_first_captured_step_is_the_eager_one(data: Dataset, how: dict) -> None:
    """What warming up and capturing did to weights, statistics, optimizer and loss scale is undone."""
    states = []
    for graph in (False, True):
        settings = dataclasses.replace(SMALL, **how, cuda_graph=graph)
        torch.manual_seed(0)
        model = models.build("recipe", resolution=32, **SMALL.options).to("cuda", memory_format=torch.channels_last)
        step = Step(model, settings, Group(), compiled=False)
        step.mode()
        images, labels = next(batches_of(settings, data, Group()).epoch(0))
        step(images, labels, 1e-3)
        states.append({**model.state_dict(), "loss": step.loss_sum, "right": step.right})
        if how["dtype"] == "float16":
            states[-1]["scale"] = torch.tensor(step.scaler.get_scale())
    for name, value in states[0].items():
        torch.testing.assert_close(
            states[1][name], value, rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("graph", [False, True])
def test_going_on_is_as_if_nothing_had_happened(data: Dataset, tmp_path: Path, graph: bool) -> None:
    settings = dataclasses.replace(SMALL, cuda_graph=graph, dtype="bfloat16")

    def stop(trainee: Trainee) -> None:
        if (trainee.epoch, trainee.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    whole = fit(settings, data=data)
    with pytest.raises(Stopped):
        fit(settings, data=data, folder=tmp_path, on_step=stop)
    resumed = fit(settings, data=data, folder=tmp_path, resume=True)
    assert resumed.epochs[-1].train_loss == pytest.approx(whole.epochs[-1].train_loss, rel=0.02)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0.1, atol=0.02)


def test_images_lie_on_the_device(data: Dataset) -> None:
    batches = batches_of(SMALL, data, Group())
    images, labels = next(batches.epoch(0))
    assert batches.placement == "device"
    assert images.is_cuda and labels.is_cuda and images.is_contiguous(memory_format=torch.channels_last)
