"""Nets by name: those of fastconv.models, and any other by its file or module."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fastconv.models.alexnet import alexnet
from fastconv.models.car_truck import car_truck
from fastconv.models.layers import require_positive
from fastconv.models.lenet5 import lenet5
from fastconv.models.mnist_net import mnist_net
from fastconv.models.network_in_network import network_in_network
from fastconv.models.recipe import recipe_net
from fastconv.models.vgg import vgg


class Native(NamedTuple):
    """What a net was made for: images [channels, resolution, resolution] of so many classes."""

    channels: int
    resolution: int
    classes: int


@dataclass(frozen=True)
class Entry:
    """A net of the registry.

    Attributes:
        builder: returns it; its own number of classes is the only one where it takes no `num_classes`.
        native: what it was made for.
        smallest: the least height and width, from which on all are taken; None: square images of its own resolution alone,
            or of those that a builder which takes `resolution` allows.
    """

    builder: Callable[..., nn.Module]
    native: Native
    smallest: int | None = None

    def arguments(self) -> set[str]:
        """What may be passed to the builder: what is not settled by the name."""
        return set(inspect.signature(self.builder).parameters) - set(getattr(self.builder, "keywords", ()))


_IMAGENET = Native(3, 224, 1000)
_ENTRIES = {
    "recipe": Entry(recipe_net, Native(3, 224, 10)),
    "lenet5": Entry(lenet5, Native(1, 28, 10)),
    "mnist": Entry(mnist_net, Native(1, 28, 10)),
    "nin": Entry(network_in_network, Native(3, 32, 10), smallest=4),
    "car_truck": Entry(car_truck, Native(3, 128, 2), smallest=8),
    "alexnet": Entry(alexnet, _IMAGENET, smallest=63),
    **{
        f"vgg{depth}{'_bn' * norm}": Entry(partial(vgg, depth, batch_norm=bool(norm)), _IMAGENET, smallest=32)
        for norm in (0, 1)
        for depth in (11, 13, 16, 19)
    },
}


def list() -> tuple[str, ...]:
    """The names that `build` knows, small nets first."""
    return tuple(_ENTRIES)


def native(name: str) -> Native:
    """The channels, resolution and classes that a net was made for, which are `build`'s defaults.

    Raises:
        ValueError: no net has this name.
    """
    return entry(name).native


def entry(name: str) -> Entry:
    """What is known of a net.

    Raises:
        ValueError: no net has this name.
    """
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise ValueError(
            f"no net is named {name!r}{hint} known are {', '.join(_ENTRIES)}; others are path/to/file.py:callable or "
            "package.module:callable, for fastconv.models.load"
        )
    return _ENTRIES[name]


def resolution_for(name: str, wanted: int) -> int:
    """`wanted` where the net takes images of that size, or is one of one's own; else the size that it was made for.

    Raises:
        ValueError: no net has this name.
    """
    if ":" in name:
        return wanted
    found = entry(name)
    is_fixed = found.smallest is None and "resolution" not in found.arguments()
    return found.native.resolution if is_fixed or wanted < (found.smallest or 0) else wanted


def build(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    resolution: int | None = None,
    layers: str = "fastconv",
    **options: Any,
) -> nn.Module:
    """A net by its name; initial weights follow torch's global seed.

    Args:
        name: one of `fastconv.models.list()`.
        num_classes, in_channels: of the scores and of the images; None: what it was made for, as `native` says. car_truck
            tells 2 classes apart, by one output.
        resolution: height and width of the images (of others than square ones the smaller); None: what it was made for.
            Where a net takes all sizes from one on it is only checked.
        layers: "fastconv" or "torch"; the state_dict's keys and the seeded initial weights are the same.
        options: the builder's own, such as `dropout=0.0` of alexnet or `width=32` of recipe.

    Raises:
        ValueError: an unknown name or option, or a value that the net does not take.
    """
    found = entry(name)
    taken = found.arguments()
    own = taken - {"num_classes", "in_channels", "resolution", "layers"}
    if unknown := sorted(set(options) - own):
        allowed = f"allowed: {', '.join(sorted(own))}" if own else "it has none"
        raise ValueError(f"{name}: unknown option {', '.join(unknown)}; {allowed}")
    channels, side, classes = (
        default if value is None else value
        for value, default in zip((in_channels, resolution, num_classes), found.native, strict=True)
    )
    require_positive(name, num_classes=classes, in_channels=channels)
    if found.smallest is not None:
        if side < found.smallest:
            raise ValueError(f"{name}: resolution must be at least {found.smallest}, got resolution={side}")
    elif "resolution" not in taken and side != found.native.resolution:
        raise ValueError(f"{name}: resolution must be {found.native.resolution}, got resolution={side}")
    if "num_classes" not in taken and classes != found.native.classes:
        raise ValueError(f"{name}: num_classes must be {found.native.classes}, got num_classes={classes}")
    sizes = {key: value for key, value in (("resolution", side), ("num_classes", classes)) if key in taken}
    return found.builder(in_channels=channels, layers=layers, **sizes, **options)


def load(spec: str, offered: Mapping[str, Any] | None = None, /, **arguments: Any) -> nn.Module:
    """The net that a function of one's own returns. It runs the file's code, as `python` would.

    Args:
        spec: 'path/to/file.py:callable' or 'package.module:callable', the latter from the current folder on as well.
        offered: what the callable is called with where it has parameters of these names.
        arguments: what the callable is called with.

    Raises:
        ValueError: there is no such callable, it fails, or it does not return a torch.nn.Module. The error of the other code
            is the cause.
    """
    place, _, function = spec.rpartition(":")
    if not place or not function.isidentifier():
        raise ValueError(f"{spec}: must be path/to/file.py:callable or package.module:callable")
    path = Path(place)
    is_file = place.endswith(".py") or "/" in place
    if is_file and not (path.suffix == ".py" and path.is_file()):
        raise ValueError(f"{spec}: {place} is not a Python file")
    with _importing_from(path.parent if is_file else Path()):
        try:
            module = _run_file(path) if is_file else importlib.import_module(place)
        except Exception as error:  # whatever that code raises
            raise ValueError(f"{spec}: {place} cannot be imported: {_first_line(error)}") from error
        made = getattr(module, function, None)
        if not callable(made):
            raise ValueError(f"{spec}: {place} has no callable {function!r}")
        try:
            model = made(**{**_wanted(made, offered or {}), **arguments})
        except Exception as error:
            raise ValueError(f"{spec}: {function}() fails: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec}: must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _wanted(function: Callable[..., object], offered: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in parameters}


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """What lies beside the file, or in the current folder, can be imported, as where Python runs a script there."""
    place = str(folder.resolve())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        if place in sys.path:  # or that code has removed it
            sys.path.remove(place)


def _run_file(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path  # of a .py file there are both
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where dataclasses and pickles of its classes look
    spec.loader.exec_module(module)
    return module


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
