"""What there is to see of a trained net: its first filters, feature maps, 2-unit embedding, confusion and mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastconv.convert import restore
from fastconv.train import canvas, pictures
from fastconv.train.step import probabilities

Batches = Iterable[tuple[Tensor, Tensor]]
Statistic = float | Sequence[float] | Tensor

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)


def draw(
    folder: Path, model: nn.Module, batches: Batches, *, names: Sequence[str], mean: Statistic, std: Statistic
) -> list[Path]:
    """Write all pictures that apply to a classifier, of its answers to `batches`, which are gone through once.

    filters.png where the model has a convolution; features.png, of the first image, where layers make maps; embedding.png
    where the layer `embedding` has two units; confusion.png and mistakes.png always.

    Args:
        model: plain, converted or compiled, on any device; neither its weights nor its modes change.
        batches: standardised images float32 [B, C, H, W] and labels int64 [B]. At most pictures.MOST_MISTAKES images are
            kept.
        names: of the classes.
        mean, std: what pixels in [0, 1] were standardised by, for all channels or each.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message holds the command.
        ValueError: no images, or a model with another number of scores than names.
    """
    canvas.require_matplotlib()
    plane = _embedding_layer(model)
    first: list[Tensor] = []
    points: list[Tensor] = []
    answers: list[tuple[Tensor, Tensor]] = []
    worst: list[tuple[Tensor, ...]] = []
    for images, labels in batches:
        scores, actual = predictions(model, [(images, labels)])
        if scores.shape[1] != len(names):
            raise ValueError(f"gallery.draw: names must hold {scores.shape[1]} classes as the scores do, got {len(names)}")
        first = first or [images[0]]
        if plane is not None and plane.out_features == 2:
            points.append(embedding(model, [(images, labels)])[0])
        highest, predicted = scores.max(1)
        answers.append((predicted, actual))
        wrong = predicted != actual
        mistakes = (images.cpu()[wrong], predicted[wrong], actual[wrong], highest[wrong])
        worst = [_most_confident([*worst, mistakes])]
    if not answers:
        raise ValueError("gallery.draw: batches holds no images")

    written: list[Path] = []

    def file(name: str) -> Path:
        written.append(folder / name)
        return written[-1]

    predicted, actual = map(torch.cat, zip(*answers, strict=True))
    if (filters := first_filters(model)) is not None:
        pictures.draw_filters(file("filters.png"), filters)
    if layers := feature_maps(model, first[0]):
        pictures.draw_features(file("features.png"), _pixels(first[0], mean, std), layers)
    if points:
        pictures.draw_embedding(file("embedding.png"), torch.cat(points), actual, names)
    pictures.draw_confusion(file("confusion.png"), confusion(predicted, actual, len(names)), names)
    images, *told = worst[0]
    pictures.draw_mistakes(
        file("mistakes.png"),
        _pixels(images, mean, std),
        *told,
        names=names,
        total=int((predicted != actual).sum()),
        among=len(actual),
    )
    return written


def first_filters(model: nn.Module) -> Tensor | None:
    """The weight [K, C, R, S] of the first convolution, float32 on the CPU; None where there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.weight.detach().to("cpu", torch.float32, copy=True)
    return None


@torch.no_grad()
def feature_maps(model: nn.Module, image: Tensor) -> list[tuple[str, Tensor]]:
    """What the activations and pools of a model make of one image, in evaluation mode: path and maps, in order of calls.

    Where a model has neither as modules, its convolutions stand for them. Maps of a single pixel are left out.

    Args:
        model: plain, converted or compiled. A converted one is looked at as it was before: fused layers show no ReLU.
        image: [C, H, W].

    Returns:
        Path of the module and its output [C, H, W], float32 on the CPU.
    """
    plain = _plain(model)
    for kinds in ((*_ACTIVATIONS, *_POOLS), (nn.Conv2d,)):
        with _noted({name: module for name, module in plain.named_modules() if isinstance(module, kinds)}) as outputs:
            plain(_like(image[None], plain))
        if maps := [(name, output[0]) for name, output in outputs if output.dim() == 4 and output[0, 0].numel() > 1]:
            return maps
    return []


@torch.no_grad()
def embedding(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Outputs [N, units] of the Linear layer named `embedding`, wherever it sits, and labels [N], in evaluation mode.

    Raises:
        ValueError: the model has no such layer.
    """
    plain = _plain(model)
    if (layer := _embedding_layer(plain)) is None:
        raise ValueError("embedding: model must have a torch.nn.Linear named `embedding`, but has none")
    labels = []
    with _noted({"embedding": layer}) as outputs:
        for images, actual in batches:
            plain(_like(images, plain))
            labels.append(actual.cpu())
    return torch.cat([output for _, output in outputs]), torch.cat(labels)


@torch.no_grad()
def predictions(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Probabilities float32 [N, K] of the classes, in evaluation mode, and labels [N], both on the CPU.

    A single score p before the sigmoid becomes the two columns 1 − sigmoid(p) and sigmoid(p).
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        answers = [(probabilities(model(_like(images, model))).cpu(), labels.cpu()) for images, labels in batches]
    finally:
        for module, training in modes.items():
            module.training = training
    scores, labels = map(torch.cat, zip(*answers, strict=True))
    return scores, labels


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many images int64 [classes, classes] of a class (row) were taken for a class (column)."""
    return (labels * classes + predicted).bincount(minlength=classes * classes).view(classes, classes)


def _most_confident(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Of mistakes, whose scores come last, the images and all else of those that a picture holds."""
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    order = joined[-1].argsort(descending=True, stable=True)[: pictures.MOST_MISTAKES]
    return tuple(part[order] for part in joined)


def _embedding_layer(model: nn.Module) -> nn.Linear | None:
    for name, module in model.named_modules():
        if name.rpartition(".")[-1] == "embedding" and isinstance(module, nn.Linear):
            return module
    return None


def _plain(model: nn.Module) -> nn.Module:
    """A tree of modules of its own around the same tensors, in evaluation mode, on torch's layers and not compiled."""
    return restore(getattr(model, "_orig_mod", model)).eval()  # compiled code would not run a hook that is set now


@contextmanager
def _noted(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """Copies, float32 on the CPU, of the tensors that these modules return from now on.

    What comes behind a module may change its output in place.
    """
    outputs: list[tuple[str, Tensor]] = []
    calls: Counter[str] = Counter()

    def noting(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(module: nn.Module, given: object, output: object) -> None:
            calls[name] += 1
            if isinstance(output, Tensor):
                path = name if calls[name] == 1 else f"{name}, call {calls[name]}"
                outputs.append((path, output.to("cpu", torch.float32, copy=True)))

        return note

    handles = [module.register_forward_hook(noting(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _like(images: Tensor, model: nn.Module) -> Tensor:
    """On the device of the model and in its dtype."""
    weight = next(model.parameters(), images)
    return images.to(weight.device, weight.dtype)


def _pixels(images: Tensor, mean: Statistic, std: Statistic) -> Tensor:
    """Images [..., C, H, W] as they were before they were standardised, in [0, 1] on the CPU."""
    shift, scale = (torch.as_tensor(of, dtype=torch.float32, device="cpu").reshape(-1, 1, 1) for of in (mean, std))
    return (images.to("cpu", torch.float32) * scale + shift).clamp(0, 1)
