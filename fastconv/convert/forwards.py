"""Forwards as graphs: tracing a model, or the forward of one of its modules, and giving a module a generated one."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastconv.convert.program import Program, subclass
from fastconv.convert.restore import unchain
from fastconv.convert.trace import Tracer, required, trace


class WholeTracer(Tracer):
    """The graph of a whole model, down to the layers of torch.nn and fastconv.nn.

    Each node's meta["owner"] is the path of the module whose forward makes the call; `calls` counts those of each module.
    """

    proxy_buffer_attributes = False

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__((), names)
        self.calls: Counter[str] = Counter()
        self._owners = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("fastconv.nn.") or fx.Tracer.is_leaf_module(self, m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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
    unchain(made)  # chains hand their members' tensors to one operator
    return made


def whole_graph(model: nn.Module, example: Tensor) -> tuple[fx.Graph, Counter[str]]:
    """The graph of `model` (from `traceable_copy`) in its mode, how often each module is called; shapes in meta["shape"]."""
    tracer = WholeTracer(required(type(model).forward))
    graph = tracer.trace(model)
    with torch.no_grad():
        _Shapes(model, garbage_collect_values=True, graph=graph).run(example)
    return graph, tracer.calls


def own_graph(module: nn.Module) -> fx.Graph:
    """The graph of the forward of `module` alone, in its mode, with every module that it calls as one node.

    Raises:
        fastconv.convert.trace.Untraceable: there is none that says all that the forward does.
    """
    return trace(module, module.training).graph


class Dense(nn.Module):
    """Base of the classes of modules whose forward convolutionize changed; arguments with defaults keep these."""

    prefix = "Dense"
    programs: tuple[Program, Program]  # for training, for evaluation

    @staticmethod
    def forward_like(plain: Callable[..., Any]) -> Callable[..., Any]:
        """With the required arguments by name, not as *args, so that the class can be traced as any other."""
        names = ", ".join(required(plain))
        forward: Callable[..., Any] = eval(f"lambda self, {names}: Dense.forward(self, {names})", {"Dense": Dense})
        return forward

    def forward(self, *args: Any) -> Any:
        return self.programs[0 if self.training else 1].forward(self, *args)


def set_forward(module: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> None:
    """Give `module` the forward of a graph for each mode: it takes on a subclass of its class."""
    for graph in (training, evaluation):
        graph.lint()
    if not isinstance(module, Dense):
        module.__class__ = subclass(Dense, type(module))
    vars(module)["programs"] = (Program.of(training), Program.of(evaluation))
