"""Forwards as source code, and classes that run them.

A module keeps its class, of which its new one is a subclass made here, so that isinstance holds, copies and pickles work and
all other methods are there. The class has to be where it was when a pickle is loaded, as for any module.
"""

from __future__ import annotations

import functools
import importlib
import linecache
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, cast

from torch import fx, nn


class Program:
    """A forward as source code. Immutable: copies are the same object.

    Attributes:
        source: of a function called forward.
        names: its globals.
        forward: the function.
    """

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self.source, self.names = source, names
        place = f"<fastconv.convert {id(self):x}>"
        linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)  # for tracebacks
        weakref.finalize(self, linecache.cache.pop, place, None)
        space = dict(names)
        exec(compile(source, place, "exec"), space)
        self.forward: Callable[..., Any] = space["forward"]

    @classmethod
    def of(cls, graph: fx.Graph) -> Program:
        for node in graph.nodes:
            node.type = None  # annotations would only add names
        code = graph.python_code("self")
        return cls(code.src, dict(code.globals))

    def __deepcopy__(self, memo: object) -> Program:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        names = {name: _Imported(v.__name__) if isinstance(v, ModuleType) else v for name, v in self.names.items()}
        return _program, (self.source, names)


class _Imported(NamedTuple):
    """A module, which cannot be pickled, by its name."""

    name: str


def _program(source: str, names: dict[str, Any]) -> Program:
    loaded = {name: importlib.import_module(v.name) if isinstance(v, _Imported) else v for name, v in names.items()}
    return Program(source, loaded)


def subclass(base: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """The class of modules of class `plain` that run `base.forward`: a subclass of both, which pickles by their names.

    `base.forward_like` makes its forward, with the signature that fits; Sequentials have one already.

    Raises:
        TypeError: `plain` says itself how it is pickled.
    """
    if "plain_class" not in vars(plain) and not _is_pickled_as_usual(plain):
        raise TypeError(f"{plain.__name__} says itself how it is pickled")
    return _subclass(base, plain)  # type: ignore[arg-type]


def _is_pickled_as_usual(kind: type[nn.Module]) -> bool:
    return kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__


@functools.cache
def _subclass(base: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    names: dict[str, Any] = {"__module__": plain.__module__, "__doc__": plain.__doc__, "__reduce_ex__": _reduce}
    names |= {"plain_class": plain, "plain_base": base}
    if not issubclass(base, nn.Sequential):
        names["forward"] = base.forward_like(plain.forward)  # type: ignore[attr-defined]
    return type(f"{getattr(base, 'prefix', '')}{plain.__name__}", (base, plain), names)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """As object's, with the class made anew on loading: from one that has a name, and what its subclasses add."""
    state = cast(tuple[Any, ...], object.__reduce_ex__(self, max(2, int(protocol))))[2:]
    kind: Any = type(self)
    bases: list[type[nn.Module]] = []
    while "plain_class" in vars(kind):
        bases.insert(0, kind.plain_base)
        kind = kind.plain_class
    return _instance, (kind, *bases), *state


def _instance(kind: type[nn.Module], *bases: type[nn.Module]) -> nn.Module:
    for base in bases:
        kind = subclass(base, kind)
    return kind.__new__(kind)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before it was converted."""
    return vars(type(module)).get("plain_class", type(module))
