"""Forwards written anew, with fused calls in the place of groups of single ones, for one module at a time.

The module keeps its class, of which its new one is a subclass, its parts and all that its other methods do. What was
written holds for calls as they were traced: Tensors for the required arguments, attributes as they were then. All other
calls go to the forward of the class, which stays right, as no part of the module does anything else than before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from fastconv.convert.match import Group, changes_in_place, swaps
from fastconv.convert.program import Program
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
        if is_view(node) and not any(changes_in_place(user) for user in node.users):
            node.target = "reshape"  # maps may lie in another order now
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


class Rewriting(NamedTuple):
    """The forwards of a module for training and evaluation, and what has to be the case for them to hold.

    Attributes:
        modes: the forwards for training, for evaluation; None where the class's own runs.
        arguments: names of the required arguments.
        attributes: the plain values among the module's attributes that its forward reads.
        children: how many modules each of its children that its forward reads holds; None for a child that is None.
        reshapes: whether the class's own code calls Tensor.view, which needs maps to lie as they did.
    """

    modes: Modes
    arguments: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]
    children: tuple[tuple[str, int | None], ...]
    reshapes: bool = False

    @classmethod
    def of(cls, module: nn.Module, modes: Modes, arguments: tuple[str, ...], read: set[str]) -> Rewriting:
        values = vars(module).items()
        plain = [(name, value) for name, value in values if name in read and name != "training" and _is_simple(value)]
        attributes = [(name, [*value] if isinstance(value, list) else value) for name, value in plain]
        children = [(name, _size(child)) for name, child in module._modules.items() if name in read]
        return cls(modes, arguments, tuple(attributes), tuple(children), calls_view(type(module)))

    def holds(self, module: nn.Module) -> bool:
        state = vars(module)
        for name, value in self.attributes:
            if state.get(name, _MISSING) != value:
                return False
        return all(_size(module._modules.get(name)) == size for name, size in self.children)


def _size(child: nn.Module | None) -> int | None:
    return None if child is None else len(child._modules)


def _is_simple(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_simple, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, FunctionType, BuiltinFunctionType))


class _Reshaping(TorchFunctionMode):
    """Runs Tensor.view as Tensor.reshape, which is the same where a view is possible."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.view and not kwargs and not isinstance(args[1], torch.dtype):
            func = Tensor.reshape
        return func(*args, **(kwargs or {}))


def is_view(node: fx.Node) -> bool:
    """Whether it is Tensor.view to another shape."""
    sizes = node.args[1:]
    return node.op == "call_method" and node.target == "view" and not node.kwargs and not isinstance(sizes[0], torch.dtype)


def calls_view(kind: type[nn.Module]) -> bool:
    """Whether the code of a class of modules mentions a method of that name."""
    codes = [f.__code__ for base in kind.__mro__ for f in vars(base).values() if isinstance(f, FunctionType)]
    codes = [code for code in codes if code.co_filename != nn.modules.module.__file__]
    return any("view" in code.co_names for code in codes)


class Rewritten(nn.Module):
    """Base of the classes of modules whose forward was written anew by fastconv.convert."""

    prefix = "Fused"
    rewriting: Rewriting
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
