"""The net of a training: built, given its embedding, its borrowed weights and its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import models
from fastconv.convert import convert
from fastconv.train.settings import Settings


def build(settings: Settings, *, classes: int, channels: int, layers: str = "fastconv") -> nn.Module:
    """The net that these settings name, on the CPU, in channels_last; its initial weights follow `settings.seed`.

    Args:
        classes: of the data. A net of one output tells two classes apart.
        channels: of the images.
        layers: "fastconv" or "torch".

    Raises:
        ValueError: the net cannot be built so, or has another number of outputs.
    """
    if not settings.model:
        raise ValueError("train: this net was handed over, not named: build it, and load the checkpoint's state['model']")
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        wanted: dict[str, Any] = {"num_classes": classes, "in_channels": channels, "resolution": settings.resolution}
        if ":" in settings.model:
            model = models.load(settings.model, wanted, **settings.options)
        else:
            model = models.build(settings.model, layers="torch", **{**wanted, **settings.options})
        if settings.embedding:
            models.with_embedding(model, settings.embedding)
    outputs = _outputs(model, channels, settings.resolution)
    if outputs != classes and not (outputs == 1 and classes == 2):
        raise ValueError(f"train: the data have {classes} classes, but model={settings.model} has {outputs} outputs")
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return convert(model, inplace=True) if layers == "fastconv" else model


def borrow(model: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """Load the weights of a trained net of the same kind, but for a head that has other classes.

    The head is the child of the net that holds its last layer. What of it has the same name and shape is loaded too.

    Raises:
        ValueError: other weights than the head's are missing or have other shapes.
    """
    own = model.state_dict()
    fresh = [name for name in own if name not in state or state[name].shape != own[name].shape]
    head = next(reversed([name for name, _ in model.named_parameters()])).split(".")[0]
    wrong = [name for name in fresh if name.split(".")[0] != head]
    if wrong:
        name = wrong[0]
        held = f"{name} of shape {list(state[name].shape)}" if name in state else f"no {name}"
        raise ValueError(
            f"train: transfer={source} has {held}, but the net has {name} of shape {list(own[name].shape)}; only {head!r}, "
            f"the net's head, may differ"
        )
    model.load_state_dict({**state, **{name: own[name] for name in fresh}}, strict=False)


def _outputs(model: nn.Module, channels: int, resolution: int) -> int:
    """How many scores the net gives an image.

    Raises:
        ValueError: it does not run on one, or gives something else.
    """
    was_training = model.training
    image = torch.zeros(1, channels, resolution, resolution)
    try:
        with torch.no_grad():
            scores = model.eval()(image)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"train: the net does not run on images {list(image.shape)}: {error}") from error
    finally:
        model.train(was_training)
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        what = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"train: the net must give scores [N, classes], got {what} for images {list(image.shape)}")
    return scores.shape[1]
