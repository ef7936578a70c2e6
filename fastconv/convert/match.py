"""Groups of calls in a graph that one call can stand for: convolution, norm, residual, ReLU and max-pool."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastconv import functional
from fastconv import nn as fast
from fastconv.nn.fused import Pooling
from fastconv.nn.pool import spatial_mean

# Whether a module is exactly of its class, with nothing attached to it.
Plain = Callable[[nn.Module], bool]

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_}
_ADDS = {operator.add, operator.iadd, torch.add}
_ADDS_IN_PLACE = {operator.iadd, "add_"}
_CONVS = (nn.Conv2d, fast.Conv2d)
_POOLS = (nn.MaxPool2d, fast.MaxPool2d)
# Results of these lie in memory of their own.
_FRESH_MODULES = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.MaxPool2d, nn.AvgPool2d)
_FRESH_FUNCTIONS = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.matmul,
    torch.cat,
    torch.add,
    torch.mul,
}


@dataclass
class Group:
    """Calls that become one; `nodes` lie in the order in which they feed each other.

    Attributes:
        conv, norm: paths of the modules, or None.
        residual: the node that is added before the ReLU, and whether it is added in place.
        relu: path of the module, True for a function, False for none.
        pool: path of the module, or its settings.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    conv: str | None = None
    norm: str | None = None
    residual: fx.Node | None = None
    in_place: bool = False
    relu: str | bool = False
    pool: str | Pooling | None = None

    @property
    def is_fused(self) -> bool:
        """Whether there is a kernel for more than one of them."""
        if self.conv is not None:
            return self.norm is not None or self.relu is not False
        return self.relu is not False and (self.norm is not None or self.pool is not None)

    @property
    def is_folded_only(self) -> bool:
        return self.norm is not None and self.relu is False

    def calls(self) -> str:
        """What runs together, for a person."""
        parts = ["Conv2d" if self.conv is not None else "", "BatchNorm2d" if self.norm is not None else ""]
        parts += ["add" if self.residual is not None else "", "ReLU" if self.relu is not False else ""]
        return " + ".join(part for part in [*parts, "MaxPool2d" if self.pool is not None else ""] if part)


class Matcher:
    """Finds the groups of a graph.

    Args:
        graph: as `trace` makes it.
        modules: what the graph's paths name.
        plain: whether a module may be run by its class's formula in place of being called.
        fold: whether a norm without a ReLU behind it is worth a group.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], plain: Plain, fold: bool) -> None:
        self._fold = fold
        self._graph, self._modules, self._plain = graph, modules, plain
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._sites = Counter(id(self._called(node)) for node in graph.nodes if node.op == "call_module")
        self._read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        self.reasons: dict[str, str] = {}  # of convolutions that stay by themselves, by path

    def groups(self) -> Iterator[Group]:
        taken: set[fx.Node] = set()
        for node in self._graph.nodes:
            if node in taken or not (self._conv(node) or self._norm(node) or self._relu(node)):
                continue
            if self._relu(node) and self._changes_what_is_read(node):
                continue
            group = self._grow(node, taken)
            if group.residual is not None and not self._movable(group):
                group = self._grow(node, taken, with_residual=False)
            if not self._movable(group):
                self._note(group, "what it reads may be changed in place before the ReLU")
            elif group.is_fused and (self._fold or not group.is_folded_only):
                taken.update(group.nodes)
                yield group

    def _grow(self, node: fx.Node, taken: set[fx.Node], with_residual: bool = True) -> Group:
        group = Group()
        if self._conv(node):
            group.conv = str(node.target)
            group.nodes.append(node)
            node = self._next(group, taken) or node
        if self._norm(node) and node not in group.nodes:
            group.norm = str(node.target)
            group.nodes.append(node)
            node = self._next(group, taken) or node
        if with_residual and node not in group.nodes and (residual := self._residual(node, group)) is not None:
            after = self._only_user(node)
            if after is not None and self._relu(after) and after not in taken:  # without a ReLU there is no kernel
                group.residual, group.in_place = residual, node.target in _ADDS_IN_PLACE
                group.nodes.append(node)
                node = after
        for _ in range(2):  # a max-pool and a ReLU may come in either order: they commute
            if node in group.nodes:
                break
            pool = self._pool(node)
            if group.relu is False and (relu := self._relu(node)):
                group.relu = relu
            elif group.pool is None and pool is not None and (group.relu or self._relu_follows(node, taken)):
                group.pool = pool
            else:
                break
            group.nodes.append(node)
            node = self._next(group, taken) or node
        if group.conv is not None and not group.is_fused:
            self._note(group, self._what_follows(group.nodes[-1]))
        return group

    def _relu_follows(self, node: fx.Node, taken: set[fx.Node]) -> bool:
        after = self._only_user(node)
        return after is not None and after not in taken and bool(self._relu(after))

    def _next(self, group: Group, taken: set[fx.Node]) -> fx.Node | None:
        """The one user of the group's last value, if it reads it where a call takes its input."""
        user = self._only_user(group.nodes[-1])
        return None if user is None or user in taken else user

    @staticmethod
    def _only_user(node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        if len(users) != 1 or users[0].op == "output" or users[0].all_input_nodes.count(node) != 1:
            return None
        return users[0] if _arguments(users[0]).count(node) == 1 else None

    def _what_follows(self, node: fx.Node) -> str:
        user = self._only_user(node)
        if user is None:
            return "its output is used in several places, or is the result"
        if user.op == "call_module":
            return f"{type(self._called(user)).__name__} follows"
        return f"{getattr(user.target, '__name__', user.target)} follows"

    def _note(self, group: Group, reason: str) -> None:
        if group.conv is not None:
            self.reasons.setdefault(group.conv, reason)

    # Kinds of nodes

    def _called(self, node: fx.Node) -> nn.Module:
        return self._modules[str(node.target)]

    def _module(self, node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> nn.Module | None:
        """The plain module of one of these kinds that the node calls on one value."""
        if node.op != "call_module" or len(_arguments(node)) != 1 or len(node.all_input_nodes) != 1:
            return None
        module = self._called(node)
        return module if type(module) in kinds and self._plain(module) else None

    def _conv(self, node: fx.Node) -> bool:
        return self._once(node, self._module(node, _CONVS))

    def _norm(self, node: fx.Node) -> bool:
        norm = self._module(node, (nn.BatchNorm2d,))
        if norm is not None and any(path.startswith(f"{node.target}.running_") for path in self._read):
            return False  # torch's own kernels write statistics without a trace, which those who save them rely on
        return self._once(node, norm)

    def _once(self, node: fx.Node, module: nn.Module | None) -> bool:
        if module is None:
            return False
        if self._sites[id(module)] > 1:
            self.reasons.setdefault(str(node.target), "it is called in several places")
            return False
        return True

    def _relu(self, node: fx.Node) -> str | bool:
        if self._module(node, (nn.ReLU,)) is not None:
            return str(node.target)
        inputs = _arguments(node)[:1]
        if not inputs or not isinstance(inputs[0], fx.Node):
            return False
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in _RELUS

    def _pool(self, node: fx.Node) -> str | Pooling | None:
        module = self._module(node, _POOLS)
        if module is not None:
            return None if module.return_indices else str(node.target)
        return pooling(node)

    def _residual(self, node: fx.Node, group: Group) -> fx.Node | None:
        """What the node adds to the group's value; None if it does something else."""
        if not group.nodes:
            return None
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not (method or (node.op == "call_function" and node.target in _ADDS)) or len(node.args) != 2 or node.kwargs:
            return None
        first, second = node.args
        value = group.nodes[-1]
        in_place = node.target in _ADDS_IN_PLACE
        if first is value and isinstance(second, fx.Node):
            return second
        return first if second is value and isinstance(first, fx.Node) and not in_place else None

    # Order

    def _movable(self, group: Group) -> bool:
        """Whether all may run where the last one does: nothing in between changes what the first ones read."""
        first, last = self._order[group.nodes[0]], self._order[group.nodes[-1]]
        between = [n for n in self._graph.nodes if first < self._order[n] < last and n not in group.nodes]
        changing = [node for node in between if self._may_change(node)]
        source = self._origins(group.nodes[0].all_input_nodes[0])
        if any(source & self._origins(read) for node in changing for read in node.all_input_nodes):
            return False
        if group.residual is None:
            return True
        added = min(self._order[node] for node in group.nodes if group.residual in node.all_input_nodes)
        later = [node for node in changing if self._order[node] > added]
        source = self._origins(group.residual)
        return not any(source & self._origins(read) for node in later for read in node.all_input_nodes)

    def _changes_what_is_read(self, relu: fx.Node) -> bool:
        """Whether a ReLU works in place on a value that others may read."""
        module = self._module(relu, (nn.ReLU,))
        in_place = changes_in_place(relu) if module is None else getattr(module, "inplace", False)
        in_place = in_place or (relu.op == "call_function" and any(value is True for value in relu.args[1:]))
        value = relu.all_input_nodes[0]
        made_here = value.op not in ("placeholder", "get_attr") and self._origins(value) == {value}
        return bool(in_place) and not (made_here and self._only_user(value) is not None)

    def _may_change(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._called(node)
            kinds = {type(child) for child in module.modules()}
            foreign = any(not kind.__module__.startswith(("torch.nn.modules", "fastconv.nn")) for kind in kinds)
            return foreign or any(getattr(child, "inplace", False) for child in module.modules())
        return changes_in_place(node)

    def _origins(self, node: fx.Node) -> set[fx.Node]:
        """Nodes whose memory the node's value may lie in."""
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            fresh = node.op == "call_module" and isinstance(self._called(node), _FRESH_MODULES)
            fresh = fresh or (node.op == "call_function" and node.target in _FRESH_FUNCTIONS)
            if not fresh:
                waiting.extend(node.all_input_nodes)
        return found


def changes_in_place(node: fx.Node) -> bool:
    """Whether a function or method changes what it is given."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    name = str(getattr(node.target, "__name__", node.target))
    operators = node.target in vars(operator).values() and (name.startswith("i") or name == "setitem")
    return operators or name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def swaps(graph: fx.Graph) -> Iterator[tuple[fx.Node, Callable[..., Any], tuple[Any, ...]]]:
    """Single calls of functions that fastconv has: the node, the function to call, and its arguments behind the input."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if (pool := pooling(node)) is not None:
            yield node, functional.max_pool2d, tuple(pool)
        elif node.op == "call_function" and node.target is F.avg_pool2d:
            settings = _settings(
                node, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
            )
            if settings is not None and "kernel_size" in settings:
                defaults = {
                    "stride": None,
                    "padding": 0,
                    "ceil_mode": False,
                    "count_include_pad": True,
                    "divisor_override": None,
                }
                yield node, functional.avg_pool2d, tuple({"kernel_size": 0, **defaults, **settings}.values())
        elif node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
            settings = _settings(node, "output_size")
            if settings is not None and settings.get("output_size") in (1, (1, 1), [1, 1]):
                yield node, functional.global_avg_pool2d, ()
        elif node.target in ("mean", torch.mean):
            settings = _settings(node, "dim", "keepdim")
            if settings is not None and _is_spatial(settings.get("dim")):
                yield node, spatial_mean, (tuple(settings["dim"]), bool(settings.get("keepdim", False)))


def pooling(node: fx.Node) -> Pooling | None:
    """The settings of a max-pool by function, without indices."""
    if node.op != "call_function" or node.target not in (F.max_pool2d, torch.max_pool2d):
        return None
    settings = _settings(node, *Pooling._fields, "return_indices")
    if settings is None or "kernel_size" not in settings or settings.pop("return_indices", False):
        return None
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    return Pooling(**values)


def _settings(node: fx.Node, *names: str) -> dict[str, Any] | None:
    """The arguments behind the input by name; None if some are computed, or are no arguments of these names."""
    values = node.args[1:]
    known = dict(zip(names, values, strict=False)) | node.kwargs
    if len(values) > len(names) or set(known) - set(names) or len(node.all_input_nodes) != 1 or not node.args:
        return None
    return known if isinstance(node.args[0], fx.Node) else None


def _is_spatial(dim: object) -> bool:
    return isinstance(dim, (tuple, list)) and list(dim) in ([2, 3], [3, 2], [-2, -1], [-1, -2])


def _arguments(node: fx.Node) -> list[Any]:
    return [*node.args, *node.kwargs.values()]
