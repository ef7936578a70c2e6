"""Forwards as graphs: tracing a model, or the forward of one of its modules, and giving a module a generated one."""

from __future__ import annotations

import builtins
import copy
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastconv import nn as fast


class WholeTracer(fx.Tracer):
    """The graph of a whole model, down to the layers of torch.nn and fastconv.nn.

    Each node's meta["owner"] is the path of the module whose forward makes the call; `calls` counts those of each module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traced_func_name = "_required_only"
        self.calls: Counter[str] = Counter()
        self._owners = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("fastconv.nn.") or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        self.calls[path] += 1
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self._owners.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._owners.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["owner"] = self._owners[-1]
        return node


class _OwnTracer(fx.Tracer):
    """The graph of one module's own forward: whatever it calls is a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.traced_func_name = "_required_only"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


def traceable_copy(model: nn.Module, device: str | None) -> nn.Module:
    """A copy to trace and run: on the meta device, which holds no data, or where `device` is None a deep copy."""
    memo: dict[int, Any] = {}
    if device is not None:
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                if isinstance(tensor, Tensor):
                    empty = torch.empty_like(tensor, device=device, requires_grad=False)
                    memo[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                    )
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        if type(module) is fast.ConvChain:  # whose forward hands its members' tensors to one operator
            module.__class__ = nn.Sequential  # type: ignore[assignment]
    return made


def whole_graph(model: nn.Module, example: Tensor) -> tuple[fx.Graph, Counter[str]]:
    """The graph of `model` (from `traceable_copy`) in its mode, how often each module is called; shapes in meta["shape"]."""
    tracer = WholeTracer()
    graph = _traced(tracer, model)
    with torch.no_grad():
        _Shapes(model, garbage_collect_values=True, graph=graph).run(example)
    return graph, tracer.calls


def own_graph(module: nn.Module) -> fx.Graph:
    """The graph of the forward of `module` alone, in its mode, with every module that it calls as one node."""
    return _traced(_OwnTracer(), module)


def _traced(tracer: fx.Tracer, module: nn.Module) -> fx.Graph:
    """Arguments with defaults keep these: as proxies they would answer every test with True."""
    kind = type(module)
    names = required(module)
    call = eval(f"lambda self, {', '.join(names)}: type(self).forward(self, {', '.join(names)})")
    module.__class__ = type(kind.__name__, (kind,), {"_required_only": call, "__module__": kind.__module__})
    try:
        return tracer.trace(module)
    finally:
        module.__class__ = kind


def required(module: nn.Module) -> list[str]:
    """The arguments that the forward of `module` cannot do without.

    Raises:
        TypeError: it takes some by keyword only, or any number of them by position.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is inspect.Parameter.empty and p.kind is not p.VAR_KEYWORD]
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed):
        raise TypeError(
            f"{type(module).__name__}.forward takes {inspect.signature(type(module).forward)}, not plain arguments"
        )
    return [p.name for p in needed]


@dataclass(frozen=True)
class _Forward:
    """The source of a forward and what its global names stand for; modules, which cannot be pickled, by their names."""

    source: str
    names: tuple[tuple[str, Any], ...]
    modules: tuple[tuple[str, str], ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return self

    @classmethod
    def of(cls, graph: fx.Graph) -> _Forward:
        for node in graph.nodes:
            node.type = None  # annotations would only add names
        graph.lint()
        code = graph.python_code("self")
        used = set(_names(compile(code.src, "<generated forward>", "exec")))
        found = {name: value for name, value in code.globals.items() if name in used and not hasattr(builtins, name)}
        return cls(
            code.src,
            tuple((name, value) for name, value in found.items() if not isinstance(value, ModuleType)),
            tuple((name, value.__name__) for name, value in found.items() if isinstance(value, ModuleType)),
        )

    def function(self) -> Callable[..., Any]:
        scope = {**dict(self.names), **{name: importlib.import_module(module) for name, module in self.modules}}
        exec(compile(self.source, "<generated forward>", "exec"), scope)
        return scope["forward"]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _Generated:
    """What the classes with generated forwards have in common: instances are copied and pickled by what makes the class."""

    _made_of: tuple[type[nn.Module], _Forward, _Forward]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, self._made_of, *super().__reduce_ex__(protocol)[2:]


@cache
def _generated(base: Any, training: _Forward, evaluation: _Forward) -> type[nn.Module]:
    forward, evaluate = training.function(), evaluation.function()
    members: dict[str, Any] = {
        "_made_of": (base, training, evaluation),
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    if training == evaluation:
        members["forward"] = forward
    else:
        members |= {"_forward_training": forward, "_forward_evaluation": evaluate}
        # Written out, not *args, so that the class can be traced as any other.
        names = ", ".join(list(inspect.signature(forward).parameters)[1:])
        members["forward"] = eval(
            f"lambda self, {names}: self._forward_training({names}) if self.training else self._forward_evaluation({names})"
        )
    return type(f"Dense{base.__name__}", (_Generated, base), members)


def _new(base: Any, training: _Forward, evaluation: _Forward) -> nn.Module:
    kind = _generated(base, training, evaluation)
    return kind.__new__(kind)


def set_forward(module: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> None:
    """Give `module` the forward of a graph for each mode: it takes on a subclass of its class.

    Copies and pickles work; unpickling needs the original class where it was.
    """
    base: Any = type(module)._made_of[0] if isinstance(module, _Generated) else type(module)
    module.__class__ = _generated(base, _Forward.of(training), _Forward.of(evaluation))
