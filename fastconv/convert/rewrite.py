"""Forwards written anew, with fused calls in the place of groups of single ones, for one module at a time.

The module keeps its class, of which its new one is a subclass, its parts and all that its other methods do. What was
written holds for calls as they were traced: Tensors for the required arguments, attributes as they were then. All other
calls go to the forward of the class, which stays right, as no part of the module does anything else than before.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from fastconv.convert.layers import runs_in_order
from fastconv.convert.match import Group, changes_in_place, swaps
from fastconv.convert.program import Program
from fastconv.convert.state import is_library
from fastconv.nn.fused import Pooling, conv_norm_relu


class Fusion(NamedTuple):
    """What one call of a rewritten forward stands for.

    Attributes:
        layer: path of the convolution, norm or ReLU that begins it.
        parts: what runs together, as "Conv2d + BatchNorm2d + add + ReLU".
        absorbed: paths of the modules that are not called any more.
    """

    layer: str
    parts: str
    absorbed: tuple[str, ...]


class Written(NamedTuple):
    """A forward, and what runs together in it."""

    program: Program
    fusions: tuple[Fusion, ...]


Modes = tuple[Written | None, Written | None]


def write(graph: fx.Graph, groups: Iterable[Group], fold: bool) -> Written:
    """The graph's code with one call for each group, and fastconv's functions for torch's."""
    fusions = tuple(_fuse(graph, group, fold) for group in groups)
    for node, function, arguments in list(swaps(graph)):
        with graph.inserting_after(node):
            called = graph.call_function(function, (node.args[0], *arguments))
        node.replace_all_uses_with(called)
        graph.erase_node(node)
    for node in graph.nodes:
        if is_view(node) and not _written_to(node):
            node.target = "reshape"  # maps may lie in another order now
        elif node.op == "call_method" and node.target == "view_as" and not _written_to(node):
            node.target = "reshape_as"
    return Written(Program.of(graph), fusions)


def _fuse(graph: fx.Graph, group: Group, fold: bool) -> Fusion:
    last = group.nodes[-1]
    value = group.nodes[0].all_input_nodes[0]
    with graph.inserting_after(last):
        called = graph.call_function(conv_norm_relu, (value,))
    with graph.inserting_before(called):
        parts = (group.conv, group.norm, group.relu, group.pool)
        arguments = [graph.get_attr(part) if isinstance(part, str) else part for part in parts]
    called.args = (value, *(tuple(a) if isinstance(a, Pooling) else a for a in arguments))
    options = {"residual": group.residual, "keep_dtype": group.in_place or None, "fold": None if fold else False}
    called.kwargs = {name: value for name, value in options.items() if value is not None}
    last.replace_all_uses_with(called)
    for node in reversed(group.nodes):
        graph.erase_node(node)
    paths = [part for part in parts if isinstance(part, str)]
    return Fusion(paths[0] if paths else str(group.nodes[0]), group.calls(), tuple(paths[1:]))


_MISSING = object()
_PLAIN = (bool, int, float, str, torch.dtype, FunctionType, BuiltinFunctionType)


class Rewriting(NamedTuple):
    """The forwards of a module for training and evaluation, and what has to be the case for them to hold.

    Attributes:
        modes: the forwards for training, for evaluation; None where the class's own runs.
        arguments: names of the required arguments.
        attributes: the values among the module's attributes that its forward reads, and what lies in them.
        absent: names that its forward reads, and that are no attributes of the module itself.
        constants, globals: the plain values that it reads of its class, and of modules by their names.
        children: names of the modules in each of its children that its forward reads; None for a child that is None.
        inlined: paths of the Sequentials whose members it calls in their place, and how many there are.
        reshapes: whether the class's own code calls Tensor.view, which needs maps to lie as they did.
    """

    modes: Modes
    arguments: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]
    absent: frozenset[str] = frozenset()
    constants: tuple[tuple[str, Any], ...] = ()
    globals: tuple[tuple[str, str, Any], ...] = ()
    children: tuple[tuple[str, Any], ...] = ()
    inlined: tuple[tuple[str, int], ...] = ()
    reshapes: bool = False

    @classmethod
    def of(cls, module: nn.Module, modes: Modes, arguments: tuple[str, ...], reads: Reads) -> Rewriting:
        state = vars(module)
        names = reads.names - {"training"}
        held = {**module._modules, **module._parameters, **module._buffers}
        constants = [(name, getattr(type(module), name, _MISSING)) for name in sorted(names - set(state))]
        globals_ = [
            (space, name, vars(sys.modules[space]).get(name, _MISSING))
            for space, name in sorted(reads.globals)
            if space in sys.modules
        ]
        return cls(
            modes,
            arguments,
            tuple((name, content(state[name])) for name in sorted(names & set(state))),
            frozenset(names.difference(state, held)),
            tuple((name, value) for name, value in constants if _is_constant(value)),
            tuple((space, name, value) for space, name, value in globals_ if _is_constant(value)),
            tuple((name, _names(child)) for name, child in module._modules.items() if name in names),
            tuple((path, len(module.get_submodule(path)._modules)) for path in sorted(reads.inlined)),
            calls_view(type(module)),
        )

    def holds(self, module: nn.Module) -> bool:
        state, modules = vars(module), module._modules
        if torch.compiler.is_compiling():  # torch 2.11 traces no set methods on a module's attributes
            if any(name in state or name in modules for name in self.absent):
                return False
        elif not (self.absent.isdisjoint(state) and self.absent.isdisjoint(modules)):
            return False
        for name, value in self.attributes:
            if name not in state or content(state[name]) != value:
                return False
        kind = type(module)
        for name, value in self.constants:
            if getattr(kind, name, _MISSING) != value:
                return False
        for space, name, value in self.globals:
            if vars(sys.modules[space]).get(name, _MISSING) != value:
                return False
        for name, inner in self.children:
            if _names(modules.get(name)) != inner:
                return False
        return all(_runs(module, path, count) for path, count in self.inlined)


class Reads(NamedTuple):
    """What forwards read: names, globals by their modules, and the Sequentials whose members they call."""

    names: set[str]
    globals: set[tuple[str, str]]
    inlined: set[str]


def content(value: object) -> object:
    """A value to compare with later ones: itself where it is plain, what lies in containers and objects, else nothing."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [content(part) for part in value]
    if isinstance(value, dict):
        return {key: content(part) for key, part in value.items() if isinstance(key, _PLAIN)}
    if isinstance(value, (set, frozenset)):
        return {part for part in value if isinstance(part, _PLAIN)}
    if isinstance(value, (nn.Module, Tensor, type, MethodType)) or not hasattr(value, "__dict__"):
        return None
    return {name: part if part is None or isinstance(part, _PLAIN) else None for name, part in vars(value).items()}


def _is_constant(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _names(child: nn.Module | None) -> Any:
    if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
        return [(name, _names(inner)) for name, inner in child._modules.items()]
    return None if child is None else len(child._modules)


def _runs(module: nn.Module, path: str, count: int) -> bool:
    """Whether a call of the Sequential at `path` calls as many members, and does nothing else."""
    child: Any = module
    for name in path.split("."):
        child = child._modules.get(name)
        if child is None:
            return False
    attached = child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
    return not attached and len(child._modules) == count and runs_in_order(child)


class _Reshaping(TorchFunctionMode):
    """Runs Tensor.view as Tensor.reshape, which is the same where a view is possible; a copy that is written to is one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.view and not kwargs and not isinstance(args[1], torch.dtype):
            func = Tensor.reshape
        elif func is Tensor.view_as:
            func = Tensor.reshape_as
        return func(*args, **(kwargs or {}))


def is_view(node: fx.Node) -> bool:
    """Whether it is Tensor.view to another shape."""
    sizes = node.args[1:]
    return node.op == "call_method" and node.target == "view" and not node.kwargs and not isinstance(sizes[0], torch.dtype)


def _written_to(view: fx.Node) -> bool:
    """Whether its elements, or those of what is made of it, are changed in place: of a copy, nobody would see it."""
    waiting, seen = [view], {view}
    while waiting:
        users = set(waiting.pop().users) - seen
        if any(changes_in_place(user) for user in users):
            return True
        # What a module or a function of the user's own gives is taken for new.
        waiting.extend(user for user in users if user.op == "call_method" or user.target in (operator.getitem, getattr))
        seen |= users
    return False


def calls_view(kind: type[nn.Module]) -> bool:
    """Whether the code of a class of modules, or of a function that it names, mentions a method of that name."""
    bases = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    waiting: list[Any] = [part for base in bases for part in vars(base).values()]
    seen: set[CodeType] = set()
    while waiting:
        part = waiting.pop()
        part = part.__func__ if isinstance(part, (staticmethod, classmethod)) else part
        part = part.fget if isinstance(part, property) else part
        if not isinstance(part, FunctionType) or part.__code__ in seen:
            continue
        function = cast(FunctionType, inspect.unwrap(part))
        inner: list[CodeType] = [function.__code__]
        while inner:
            code = inner.pop()
            seen.add(code)
            if not {"view", "view_as"}.isdisjoint(code.co_names):
                return True
            inner.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
            named = [function.__globals__.get(name) for name in code.co_names]
            waiting.extend(f for f in named if isinstance(f, FunctionType) and not is_library(f.__module__ or ""))
    return False


class Rewritten(nn.Module):
    """Base of the classes of modules whose forward was written anew by fastconv.convert."""

    prefix = "Fused"
    rewriting = Rewriting((None, None), (), ())  # of an instance made of the class itself
    plain_class: type[nn.Module]

    @staticmethod
    def forward_like(plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def forward(self: Rewritten, *args: Any, **kwargs: Any) -> Any:
            return Rewritten.forward(self, *args, **kwargs)

        return forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rewriting = self.rewriting
        written = rewriting.modes[0 if self.training else 1]
        if written is not None and (torch.compiler.is_compiling() or not _has_any_global_hook()):
            given = (
                (*args, *(kwargs[name] for name in rewriting.arguments[len(args) :] if name in kwargs)) if kwargs else args
            )
            as_traced = len(given) == len(rewriting.arguments) == len(args) + len(kwargs)
            if as_traced and all(isinstance(value, Tensor) for value in given) and rewriting.holds(self):
                return written.program.forward(self, *given)
        if rewriting.reshapes and not torch.compiler.is_compiling():
            with _Reshaping():
                return self.plain_class.forward(self, *args, **kwargs)
        return self.plain_class.forward(self, *args, **kwargs)
