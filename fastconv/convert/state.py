"""What code can change without a trace in a graph: attributes, globals, and what lies in them."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn


class Globals:
    """Global values that code reads, as they were when it first did."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], tuple[dict[str, Any], list[object]]] = {}

    def add(self, space: dict[str, Any], names: Collection[str]) -> None:
        if is_library(str(space.get("__name__"))):
            return
        for name in names:
            if name in space and (id(space), name) not in self._found:
                self._found[id(space), name] = (space, _within([space[name]]))

    def names(self) -> frozenset[tuple[str, str]]:
        """Of modules, and in them."""
        return frozenset((str(space.get("__name__")), name) for (_, name), (space, _) in self._found.items())

    def changed(self) -> bool:
        return any(not same(then, _within([space.get(name)])) for (_, name), (space, then) in self._found.items())


class _State(str):
    """What an object that changes in place was, to be compared by its value."""


def same(before: list[object], after: list[object]) -> bool:
    return len(before) == len(after) and all(
        a is b or (type(a) is type(b) and type(a) in (_State, int) and a == b) for a, b in zip(before, after, strict=True)
    )


def attributes(module: nn.Module) -> list[object]:
    """Every attribute of every module and its class, and what lies in containers and objects among them."""
    modules = list(module.modules())
    kinds = {kind: None for child in modules for kind in type(child).__mro__ if not is_library(kind.__module__)}
    own = [value for kind in kinds for name, value in list(vars(kind).items()) if not name.startswith("__")]
    return _within([*own, *(part for child in modules for attribute in vars(child).items() for part in attribute)])


def is_library(module: str) -> bool:
    root = module.partition(".")[0]
    return root in ("torch", "fastconv", "numpy") or (root in sys.stdlib_module_names and root != "__main__")


def _within(values: list[object]) -> list[object]:
    """The values, and what lies in them, which may change in place."""
    found: list[object] = []
    seen: set[int] = set()

    def add(value: object) -> None:
        found.append(value)
        if id(value) in seen or isinstance(value, (type, ModuleType, FunctionType, nn.Module, torch.Tensor)):
            return
        seen.add(id(value))
        if hasattr(value, "bit_generator"):  # numpy's, whose draws no profile shows
            found.append(_State(value.bit_generator.state))
        if isinstance(value, dict):
            inside: list[object] = [*value, *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            inside = [*value]
        else:
            inside = list(getattr(value, "__dict__", {}).values())
        found.append(len(inside))
        for part in inside:
            add(part)

    for value in values:
        add(value)
    return found
