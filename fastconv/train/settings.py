"""What a training depends on, besides the data: one frozen record, and the values that suit each data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastconv import models
from fastconv.train.augment import Augmentation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("one-cycle", "cosine")
LABELS = ("fastconv", "torch", "compile")

Option = int | float | str | bool


@dataclass(frozen=True)
class Settings:
    """A training, seed included. All of it goes into the checkpoint. The defaults are those of the digits.

    Attributes:
        data: "digits", "cifar10[:PATH]", "mnist[:PATH]", "folder:PATH", "synthetic[:COUNT]", as `train.load` takes it.
        classes: names of a subset of the data's classes; () for all of them.
        validation: share of the training images that is held out; None for the data set's own.
        skip_corrupt: leave out images that cannot be read, and count them.
        model: a name of `models.list()`, or "path.py:callable" / "package.module:callable".
        resolution: R, height and width of the images.
        options: further arguments of the model's builder.
        embedding: units of a layer in front of the last one, whose space is drawn if they are 2; 0: no such layer.
        epochs, batch_size: passes over the training images; images a step, over all processes.
        optimizer: "adamw", or "sgd" with Nesterov's momentum.
        learning_rate: the highest of the schedule.
        weight_decay: of weights of convolutions and linear layers alone, not of biases and norms.
        momentum: of "sgd".
        schedule: "one-cycle": a linear rise over the first quarter of the steps, then a half cosine down to a thousandth;
            "cosine": the half cosine alone.
        label_smoothing: share of the target that is spread over all classes.
        augmentation: how training images are changed at random; None for what suits the data set, by `Dataset.name`.
        seed: of the initial weights, of the order of images and of their changes, of dropout.
        dtype: "float32", or "bfloat16" / "float16" by autocast, float16 with a scaled loss.
        device: "cpu", "cuda", "cuda:1", ...
        compile: run the net through torch.compile.
        cuda_graph: capture a whole step as a CUDA graph and replay it; None: on a GPU, with one process.
        transfer: a checkpoint whose weights the net starts from; its last layer does not, where it has other classes.
        freeze: names of modules that are not trained, such as ("features",); their norms keep their statistics.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    data: str = "digits"
    classes: tuple[str, ...] = ()
    validation: float | None = None
    skip_corrupt: bool = False
    model: str = "recipe"
    resolution: int = 32
    options: Mapping[str, Option] = field(default_factory=lambda: {"width": 32, "max_width": 256})
    embedding: int = 0
    epochs: int = 24
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    schedule: str = "one-cycle"
    label_smoothing: float = 0.1
    augmentation: Augmentation | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    compile: bool = False
    cuda_graph: bool | None = None
    transfer: str = ""
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("resolution", 1), ("epochs", 1), ("batch_size", 1), ("embedding", 0), ("seed", 0)):
            self._hold(name, getattr(self, name) >= least, f"at least {least}")
        for name in ("learning_rate", "weight_decay"):
            self._hold(name, 0 <= getattr(self, name) < float("inf"), "a number from 0 on")
        for name in ("momentum", "label_smoothing"):
            self._hold(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        choices = (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("dtype", tuple(DTYPES)))
        for name, allowed in choices:
            self._hold(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        on_gpu = torch.device(self.device).type == "cuda"
        self._hold("cuda_graph", on_gpu or not self.cuda_graph, f"off where device={self.device!r}")

    def _hold(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"train: {name} must be {allowed}, got {name}={getattr(self, name)!r}")

    @classmethod
    def of(cls, data: str = "digits", **given: Any) -> Settings:
        """The settings that suit a data set, changed by those given; a None among these counts as not given.

        A model with a size of its own (LeNet-5's 28×28) gets it. `options` of the data set's model hold for that model
        alone.

        Raises:
            ValueError: no such data set, or a value out of its range.
            TypeError: no such setting.
        """
        suited = _suited(data)
        given = {name: value for name, value in given.items() if value is not None}
        own = suited.get("model", cls.model)
        if given.get("embedding"):
            suited["label_smoothing"] = 0.0  # which keeps classes together: in a plane few could be told apart
        if given.get("model", own) != own:
            suited["options"] = {}
            suited["resolution"] = models.resolution_for(given["model"], suited.get("resolution", cls.resolution))
        if "options" in given and given.get("model", own) == own:
            given["options"] = {**suited.get("options", cls().options), **given["options"]}
        return cls(**{**suited, **given, "data": data})

    def with_seed(self, seed: int) -> Settings:
        return dataclasses.replace(self, seed=seed)

    def on(self, device: str) -> Settings:
        is_captured = self.cuda_graph if torch.device(device).type == "cuda" else None
        return dataclasses.replace(self, device=device, cuda_graph=is_captured)

    def as_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, of plain numbers, texts, lists and dicts."""
        content = dataclasses.asdict(self)
        return {**content, "classes": list(self.classes), "freeze": list(self.freeze), "options": dict(self.options)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Settings:
        augmentation = content["augmentation"]
        return cls(
            **{
                **content,
                "classes": tuple(content["classes"]),
                "freeze": tuple(content["freeze"]),
                "augmentation": None if augmentation is None else Augmentation(**augmentation),
            }
        )


# By data set: what suits it, where that is not the default. The recipes of CIFAR-10 and MNIST are told in docs/training.md.
_SUITED: dict[str, dict[str, Any]] = {
    "digits": {},
    "mnist": {"model": "mnist", "resolution": 28, "options": {}, "epochs": 12, "batch_size": 128, "learning_rate": 1e-3},
    "cifar10": {
        "options": {"width": 64, "max_width": 512, "batch_norm": True},
        "epochs": 30,
        "batch_size": 512,
        "optimizer": "sgd",
        "learning_rate": 0.2,
        "weight_decay": 5e-4,
    },
    "folder": {
        "resolution": 224,
        "options": {"width": 64, "max_width": 512},
        "epochs": 30,
        "batch_size": 32,
        "learning_rate": 5e-4,
    },
    "synthetic": {"epochs": 4},
}


def _suited(data: str) -> dict[str, Any]:
    name = data.split(":")[0]
    if name not in _SUITED:
        raise ValueError(f"train: data must be one of {', '.join(_SUITED)}, got data={data!r}")
    return dict(_SUITED[name])
