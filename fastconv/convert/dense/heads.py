"""Classifier heads in a graph with shapes: what each call has to become so that the net runs densely on larger images."""

from __future__ import annotations

import math

from torch import fx, nn

from fastconv import nn as fast
from fastconv.convert.dense import pool
from fastconv.convert.dense.calls import POINTWISE, POINTWISE_MODULES, Calls, after, argument, source
from fastconv.convert.dense.edits import Convolve, Drop, Edit, Normalise2d, OverClasses, Window

_ADAPTIVE = (nn.AdaptiveAvgPool2d, fast.GlobalAvgPool2d, nn.AdaptiveMaxPool2d)
_FLATTENS = {"flatten", "view", "reshape", "squeeze"}


class Heads(Calls):
    """The heads of one graph and the edits, by node, that make them dense.

    Attributes:
        edits: what each node becomes.
        scores: the nodes that are handed out as (N, classes) and become (N, classes, H', W').

    Raises:
        ValueError: there is nothing to make dense, or something in the way.
    """

    def __init__(self, graph: fx.Graph, model: nn.Module, dense_max_pool: bool) -> None:
        super().__init__(graph, model)
        self.edits: dict[fx.Node, Edit] = {}
        self.scores: set[fx.Node] = set()
        self.first: list[fx.Node] = []  # what flattens, of each head
        self._flat: set[fx.Node] = set()  # all nodes of heads
        for node in graph.nodes:
            if self._flattens(node) and node not in self.edits:
                self._follow(node)
        self._refuse_other_linears()
        if dense_max_pool and self.first:
            pool.unstride_last_pool(self, self.edits, self.first[-1], self._flat)

    # What flattens, and what follows.

    def _flattens(self, node: fx.Node) -> bool:
        """(N, C, H, W) to (N, C · H · W), by whatever name; the mean over H and W too."""
        read, shape = source(node), node.meta.get("shape")
        if read is None or shape is None or len(shape) != 2 or len(read.meta["shape"]) != 4:
            return False
        if self.averages(node):
            return True
        flat = (read.meta["shape"][0], math.prod(read.meta["shape"][1:]))
        return shape == flat and (isinstance(self.module(node), nn.Flatten) or self.calls(node, _FLATTENS))

    def _follow(self, flatten: fx.Node) -> None:
        """Take the edits of the head behind `flatten`: all of them, or none if it leads back to a map or has no Linear."""
        size: dict[fx.Node, tuple[int, int, int]] = {flatten: self._flat_size(flatten)}
        edits: dict[fx.Node, Edit] = {flatten: Drop()}
        scores: set[fx.Node] = set()
        odd: fx.Node | None = None
        for node in self.graph.nodes:
            into = [n for n in node.all_input_nodes if n in size]
            if not into or node in size:
                continue
            if node.op == "output":
                scores.update(into)
                continue
            shape = node.meta.get("shape")
            if shape is None and self.calls(node, {"size"}) and argument(node, 1, "dim") in (0, 1):
                continue
            if shape is not None and len(shape) > 2:
                return  # a gate, as in squeeze-and-excitation
            made = self._step(node, [n for n in node.all_input_nodes if "shape" in n.meta], size)
            if made is None:
                odd = odd or node
                continue
            size[node] = made[0]
            if made[1] is not None:
                edits[node] = made[1]
        if not any(isinstance(edit, Convolve) for edit in edits.values()) and (odd is None or not self._is_linear(odd)):
            return
        if odd is not None:
            raise ValueError(f"convolutionize: {self.say(odd)} follows the flatten, and has no dense form that is known")
        if early := [node for node in scores if size[node][1:] != (1, 1)]:
            raise ValueError(f"convolutionize: the flattened map itself is an output of the model, by {self.say(early[0])}")
        self.first.append(flatten)
        self._flat.update(size)
        self.edits |= edits
        self.scores |= scores
        self._fix_adaptive(flatten)

    def _flat_size(self, node: fx.Node) -> tuple[int, int, int]:
        _, channels, height, width = source(node).meta["shape"]  # type: ignore[union-attr]
        return (channels, 1, 1) if self.averages(node) else (channels, height, width)

    def _step(
        self, node: fx.Node, tensors: list[fx.Node], size: dict[fx.Node, tuple[int, int, int]]
    ) -> tuple[tuple[int, int, int], Edit | None] | None:
        """The map that a node's result stands for, and what it becomes; None where that is not known."""
        sizes = {size.get(n) for n in tensors}
        if len(sizes) != 1 or None in sizes:
            return None
        before = sizes.pop()
        assert before is not None
        module = self.module(node)
        if type(module) is nn.Linear:
            return (module.out_features, 1, 1), Convolve(before)
        if type(module) in POINTWISE_MODULES or self.calls(node, POINTWISE):
            return before, None
        if node.meta.get("shape") == tensors[0].meta["shape"] and (
            isinstance(module, nn.Flatten) or self.calls(node, _FLATTENS)
        ):
            return before, Drop()
        if before[1:] != (1, 1):
            return None
        if type(module) is nn.BatchNorm1d:
            return before, Normalise2d()
        if type(module) in (nn.Softmax, nn.LogSoftmax) or self.calls(node, {"softmax", "log_softmax"}):
            dim = module.dim if isinstance(module, (nn.Softmax, nn.LogSoftmax)) else argument(node, 1, "dim")
            return (before, OverClasses() if dim == -1 else None) if dim in (1, -1, None) else None
        return None

    def _refuse_other_linears(self) -> None:
        """Those that read (N, features), not maps of several dimensions, and whose result is no gate."""
        for node in self.graph.nodes:
            read = source(node)
            if node in self.edits or not self._is_linear(node) or read is None or len(read.meta["shape"]) > 2:
                continue
            if any(len(n.meta.get("shape", ())) > 2 for n in after(node)):
                continue
            raise ValueError(
                f"convolutionize: {self.say(node)} reads {self.say(read)}, which is no flattened (N, C, H, W) map; known "
                f"are flatten, view and reshape to (N, C · H · W), and the mean over dimensions 2 and 3"
            )

    def _is_linear(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), nn.Linear) or self.calls(node, {"linear", "addmm", "matmul"})

    # Pools before the flatten whose windows depend on the map's size.

    def _fix_adaptive(self, flatten: fx.Node) -> None:
        node: fx.Node | None = flatten
        while node is not None and len([n for n in node.all_input_nodes if "shape" in n.meta and n.op != "get_attr"]) == 1:
            if self._is_adaptive(node):
                self.edits[node] = self._fixed(node)
            node = source(node)

    def _is_adaptive(self, node: fx.Node) -> bool:
        if isinstance(self.module(node), _ADAPTIVE) or self.averages(node):
            return True
        if self.calls(node, {"avg_pool2d"}):  # a window of computed size
            return any(n is not source(node) for n in node.all_input_nodes)
        return self.calls(node, {"adaptive_avg_pool2d", "adaptive_max_pool2d"})

    def _fixed(self, node: fx.Node) -> Window:
        """The windows of an adaptive pool at this size. One window for the whole map moves by 1, others by their size."""
        large = source(node).meta["shape"][2:]  # type: ignore[union-attr]
        shape = node.meta.get("shape")
        small = shape[2:] if shape is not None and len(shape) == 4 else (1, 1)
        if shape is None or any(h % o for h, o in zip(large, small, strict=True)):
            raise ValueError(
                f"convolutionize: {self.say(node)} pools a map of {large[0]}×{large[1]} to {small[0]}×{small[1]} by "
                f"windows of unequal sizes, which have no dense form; choose an input_size that gives a multiple of that"
            )
        kernel = (large[0] // small[0], large[1] // small[1])
        stride = (1 if small[0] == 1 else kernel[0], 1 if small[1] == 1 else kernel[1])
        return Window("max" if "max" in self.name(node).lower() else "avg", kernel, stride)
