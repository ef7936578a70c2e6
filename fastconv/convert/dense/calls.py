"""What the nodes of a graph call, and what they depend on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.modules.utils import _pair

from fastconv import nn as fast
from fastconv.convert.dense.edits import Pair, Window

POOLED = (fast.ConvReLUMaxPool2d, fast.BatchNormReLUMaxPool2d)
# Element by element, whatever the shape: modules by their class, functions and methods by their name.
POINTWISE_MODULES = (
    *(nn.Identity, nn.Dropout, nn.AlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.LogSigmoid, nn.Threshold),
)
POINTWISE = {
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh"),
    *("sigmoid", "logsigmoid", "tanh", "softplus", "threshold", "dropout", "alpha_dropout", "clamp", "exp", "log", "abs"),
    *("add", "sub", "mul", "div", "truediv", "neg", "float", "double", "half", "bfloat16", "to", "clone", "contiguous"),
}


class Calls:
    """A graph with shapes in meta["shape"], and the modules that it calls."""

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph, self.modules = graph, dict(model.named_modules(remove_duplicate=False))

    def name(self, node: fx.Node) -> str:
        """The name of what a node calls: a class for a module."""
        if node.op == "call_module":
            return type(self.modules[str(node.target)]).__name__
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

    def say(self, node: fx.Node) -> str:
        """A node for an error's text."""
        if node.op == "call_module":
            return f"{self.name(node)} {node.target!r}"
        return f"{self.name(node)} in the forward of {node.meta.get('owner') or 'the model'!r}"

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def averages(self, node: fx.Node) -> bool:
        """The mean of a (N, C, H, W) map over H and W."""
        read, dim = source(node), argument(node, 1, "dim")
        if not self.calls(node, {"mean"}) or read is None or len(read.meta["shape"]) != 4:
            return False
        return isinstance(dim, (tuple, list)) and {d % 4 for d in dim} == {2, 3}

    def calls(self, node: fx.Node, names: set[str]) -> bool:
        """Whether a node calls a method, or a function of torch or Python's operators, of one of these names."""
        if node.op == "call_method":
            return str(node.target).rstrip("_") in names
        if node.op != "call_function":
            return False
        home = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
        return home in ("torch", "_operator") and self.name(node).strip("_") in names

    def max_pool_stride(self, node: fx.Node) -> Pair | None:
        """The stride of a max-pool; None for all else."""
        module = self.module(node)
        if isinstance(module, POOLED):
            return _pair(module.pool_stride)
        return self.window(node).stride if self.is_pool(node) and "max" in self.name(node).lower() else None

    def is_pool(self, node: fx.Node) -> bool:
        kinds = (nn.MaxPool2d, fast.MaxPool2d, nn.AvgPool2d, fast.AvgPool2d)
        return type(self.module(node)) in kinds or self.calls(node, {"max_pool2d", "avg_pool2d"})

    def window(self, node: fx.Node) -> Window:
        """The arguments of a pool, module or function."""
        kind = "max" if "max" in self.name(node).lower() else "avg"
        names = ["kernel_size", "stride", "padding", *(["dilation"] if kind == "max" else []), "ceil_mode"]
        module = self.module(node)
        if module is None:
            found = {name: argument(node, at, name) for at, name in enumerate(names, 1)}
            found = {name: value for name, value in found.items() if value is not None}
        else:
            found = {name: getattr(module, name) for name in names}
        kernel = found["kernel_size"]
        return Window(
            kind,
            _pair(kernel),
            _pair(found.get("stride") or kernel),
            _pair(found.get("padding", 0)),
            _pair(found.get("dilation", 1)),
            found.get("ceil_mode", False),
        )


def argument(node: fx.Node, at: int, name: str) -> Any:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name)


def source(node: fx.Node) -> fx.Node | None:
    """The tensor that a call reads first, weights aside."""
    return next((n for n in node.all_input_nodes if "shape" in n.meta and n.op != "get_attr"), None)


def before(node: fx.Node, without: fx.Node | None = None) -> Iterator[fx.Node]:
    """What a node depends on, `without` and what is behind that left out."""
    seen: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        n = waiting.pop()
        if n not in seen and n is not without:
            seen.add(n)
            waiting += n.all_input_nodes
            yield n


def after(node: fx.Node) -> list[fx.Node]:
    """What depends on a node, in the graph's order."""
    reached = {node}
    for n in node.graph.nodes:
        if reached & set(n.all_input_nodes):
            reached.add(n)
    return [n for n in node.graph.nodes if n in reached and n is not node]
