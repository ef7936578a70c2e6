"""The net of a training: built, given its embedding, its borrowed weights and its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import models
from fastconv.convert import convert, restore
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
    options = ", ".join(f"{name}={value!r}" for name, value in settings.options.items())
    taken = settings.options.keys() & {"name", "layers", "num_classes", "in_channels", "resolution"}
    if taken:
        raise ValueError(f"train: options must not hold {', '.join(sorted(taken))}, which the data decide; got {options}")
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(settings.seed)
        wanted: dict[str, Any] = {"num_classes": classes, "in_channels": channels, "resolution": settings.resolution}
        if ":" in settings.model:
            model = restore(models.load(settings.model, wanted, **settings.options))
        else:
            try:
                model = models.build(settings.model, layers="torch", **{**wanted, **settings.options})
            except TypeError as error:  # of an option's value
                raise ValueError(f"train: model={settings.model} cannot be built with {options}: {error}") from error
        if settings.embedding:
            models.with_embedding(model, settings.embedding)
    outputs = _outputs(model, channels, settings.resolution)
    if outputs != classes and not (outputs == 1 and classes == 2):
        raise ValueError(f"train: the data have {classes} classes, but model={settings.model} has {outputs} outputs")
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return convert(model, inplace=True) if layers == "fastconv" else model


def borrow(model: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """Load the weights of a trained net of the same kind, but for a last layer that has other classes, or an embedding.

    Raises:
        ValueError: other weights differ in name or shape.
    """
    own = model.state_dict()
    *_, last = (name.rpartition(".")[0] for name, _ in model.named_parameters())
    head = last.removesuffix(".scores") if last.removesuffix(".scores") + ".embedding.weight" in own else last
    fresh = [name for name in own if name not in state or state[name].shape != own[name].shape]
    differing = [name for name in (*fresh, *state) if name in fresh or name not in own]
    wrong = [name for name in differing if not name.startswith(f"{head}.")]
    if wrong or len(fresh) == len(own):
        name = (wrong or fresh)[0]
        theirs, ours = (f"{list(held[name].shape)}" if name in held else "none" for held in (state, own))
        raise ValueError(
            f"train: transfer={source} is of another net: its {name} has shape {theirs}, this one's {ours}; only {head!r}, "
            f"the last layer, may differ"
        )
    model.load_state_dict({name: own[name] if name in fresh else state[name] for name in own})


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
    except Exception as error:  # a net of one's own raises whatever it likes
        raise ValueError(f"train: the net does not run on images {list(image.shape)}: {error}") from error
    finally:
        model.train(was_training)
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        what = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"train: the net must give scores [N, classes], got {what} for images {list(image.shape)}")
    return scores.shape[1]
