"""What each layer of a model does in a run: operators, choices of kernels, FLOPs, bytes, layout copies.

An operator belongs to the layer whose parameter or running statistic it is given, else to the innermost module whose call
runs it; in backward to the layer whose forward made the node of the graph, or, of a node that stands for several, whose
weight or saved output it reads. Hooks would tell calls too, but nothing is fused where there are some: see `Recorder`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastconv import geometry, tuning
from fastconv.bench.traffic import moved_by, moves_nothing
from fastconv.convert.program import Program
from fastconv.convert.rewrite import Rewritten, Written
from fastconv.geometry import ConvGeometry
from fastconv.nn.fused import conv_norm_relu
from fastconv.ops.define import IMPLEMENTATIONS


class Copy(NamedTuple):
    """An operand that does not lie as the kernels of its layer want it, see fastconv.bench.explain.LayoutCopy."""

    layer: str
    direction: str
    operand: str
    shape: tuple[int, ...]
    size: int
    copied: bool
    source: str


@dataclass
class Work:
    """What a layer, or all that is no layer, does in a run.

    Attributes:
        shape: of what it put out last in forward.
        calls: those for which a backend was chosen.
        forward_flops, flops: of forward, of forward and backward.
        moved, saved: bytes.
    """

    shape: tuple[int, ...] | None = None
    calls: Counter[tuning.Call] = field(default_factory=Counter)
    forward_flops: int = 0
    flops: int = 0
    moved: int = 0
    saved: int = 0


class Recorder(TorchDispatchMode):
    """Attributes what happens while it is entered. The model's modules are changed for it: hand in a copy.

    Their calls are told by `_call_impl` set on the instances, which is no hook, and by `conv_norm_relu` in forwards that
    fastconv.convert wrote, which call no module.

    Args:
        layers: paths of the modules that are told apart.
        functions: of another run, for `function` to find its own calls by.

    Attributes:
        work: by layer; by 'path.max_pool2d()' for functions of ours that no layer calls; by None for the rest.
        copies: operands that had to be copied to another memory format, in their order.
    """

    def __init__(self, model: nn.Module, layers: Collection[str], functions: Collection[str] = ()) -> None:
        super().__init__()
        self.work: dict[str | None, Work] = {}
        self.copies: list[Copy] = []
        self._layers, self._functions = frozenset(layers), functions
        self._stack: list[str] = []
        self.is_backward = False  # for whoever runs the model to say
        self._outer: _Outer | None = None  # the operator of ours that is running
        self._sequence: dict[int, list[tuple[str | None, str]]] = {}  # by autograd node: owners and labels
        self._makers: dict[int, tuple[str | None, str]] = {}  # by storage
        self._labels: dict[tuple[Any, ...], str] = {}  # by a tensor's place in memory
        self._owners: dict[int, list[str]] = {}  # by tensor: layers whose parameter or buffer it is
        self._derived: dict[int, list[str]] = {}  # by tensor: the same of what was computed from a parameter
        self._leaves: set[str] = set()
        self._kept: list[Tensor] = []
        paths = {id(module): path for path, module in model.named_modules()}
        for path, module in model.named_modules():
            self._watch(path, module, paths)

    def _watch(self, path: str, module: nn.Module, paths: Mapping[int, str]) -> None:
        if not module._modules:
            self._leaves.add(path)
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None:
                self._kept.append(tensor)
                self._makers[tensor.untyped_storage()._cdata] = (path if path in self._layers else None, "parameter")
                if path in self._layers:
                    self._owners.setdefault(id(tensor), []).append(path)
        call = type(module)._call_impl

        def called(*args: Any, **kwargs: Any) -> Any:
            with self._inside(path):
                return call(module, *args, **kwargs)

        vars(module)["_call_impl"] = called
        module._compiled_call_impl = None
        if isinstance(module, Rewritten):
            told = _told(conv_norm_relu, paths, self._inside)
            training, evaluation = (w and _replaced(w, conv_norm_relu, told) for w in module.rewriting.modes)
            module.rewriting = module.rewriting._replace(modes=(training, evaluation))

    @contextmanager
    def _inside(self, path: str) -> Iterator[None]:
        self._stack.append(path)
        try:
            yield
        finally:
            self._stack.pop()

    def note_inputs(self, given: Any, label: str = "input") -> None:
        """Name tensors that come from outside: the inputs, the gradients of the outputs."""
        for tensor in _tensors(given):
            self._kept.append(tensor)
            self._makers[tensor.untyped_storage()._cdata] = (None, label)

    def note_saved(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Count saved storages for those who made them."""
        for storage in storages:
            self._of(self._makers.get(storage._cdata, (None, ""))[0]).saved += storage.nbytes()

    def _of(self, owner: str | None) -> Work:
        return self.work.setdefault(owner, Work())

    # Operators

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._outer is not None:  # what an operator of ours does inside is its own affair, but for copies
            self._note_copy(func, args, kwargs)
            return func(*args, **kwargs)
        node = None if self._stack else torch._C._current_autograd_node()
        owner, label = self._attribute(func, args, node)
        if func.namespace == "fastconv":
            result, calls = self._run_ours(func, args, owner)
        else:
            result, calls = func(*args, **kwargs), Counter()
        self._count(func, args, kwargs, result, owner, calls)
        self._note_results(func, args, kwargs, result, owner, label)
        return result

    def _run_ours(self, func: Any, args: tuple[Any, ...], owner: str | None) -> tuple[Any, Counter[tuning.Call]]:
        names = [argument.name for argument in func._schema.arguments]
        operands = [(name, t) for name, t in zip(names, args, strict=False) if isinstance(t, Tensor)]
        self._outer = _Outer(owner or "", operands)
        try:
            with self, torch._C._ExcludeDispatchKeyGuard(_AUTOCAST), tuning.observing() as calls:
                result = IMPLEMENTATIONS[func._schema.name.partition("::")[2]](*args)
            if any(_is_slowed(call) for call in calls):
                self._add_copy(operands[0][1], copied=False)
        finally:
            self._outer = None
        return result, calls

    def _attribute(self, func: Any, args: tuple[Any, ...], node: Any) -> tuple[str | None, str]:
        """The layer that an operator works for, and what its results are called."""
        name = func._schema.name.partition("::")[2]
        if node is not None:
            made_by = self._sequence.get(node._sequence_nr(), [])
            owner, label = made_by[0] if made_by else (None, name)
            owners = [owner for owner, _ in made_by]
            if len({*owners}) > 1:  # a chain: only of its first layer no weight is given, nor then its own output
                gates = (self._makers.get(t.untyped_storage()._cdata, (None, ""))[0] for t in _tensors(args[1:2]))
                found = self._owner_of(args, ()) or next(gates, None)
                owner = found if found in owners else owners[0]
            return owner, f"gradient of {owner or label}"
        owner = self._owner_of(args, self._stack)
        if owner is None:
            owner = next((path for path in reversed(self._stack) if path in self._layers), None)
        at = self._stack[-1] if self._stack else ""
        if owner is not None:
            label = owner
        else:
            label = at if at in self._leaves and at else f"{name} in {at}" if at else name
            function = f"{at}.{_FUNCTIONS.get(name, name)}()".removeprefix(".")
            if func.namespace == "fastconv" or function in self._functions:
                owner = label = function
        made_by = self._sequence.setdefault(torch.autograd._get_sequence_nr() - 1, [])
        if not made_by or func.namespace == "fastconv":  # others may have no node of their own: then it is an earlier one's
            made_by.append((owner, label))
        return owner, label

    def _owner_of(self, args: tuple[Any, ...], stack: Collection[str]) -> str | None:
        for tensor in _tensors(args):
            paths = self._owners.get(id(tensor)) or self._derived.get(id(tensor))
            if paths:
                return next((path for path in paths if path in stack), paths[0])
        return None

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, owner: str | None, calls: Counter[tuning.Call]) -> None:
        name = func._schema.name.partition("::")[2]
        if name == "conv2d_backward":  # it asks for both, and runs what it has operands for
            absent = {"input_grad" if args[2] is None else "", "weight_grad" if args[1] is None else ""}
            calls = Counter({call: count for call, count in calls.items() if call.direction not in absent})
        work = self._of(owner)
        flops = sum(count * c.geometry.flops() for c, count in calls.items() if isinstance(c.geometry, ConvGeometry))
        if name in _PRODUCTS:
            flops += _PRODUCTS[name](args, result)
        work.calls.update(calls)
        work.flops += flops
        work.moved += moved_by(func, args, kwargs, result)
        if not self.is_backward:
            work.forward_flops += flops
            first = next(iter(_tensors(result)), None)
            if first is not None and not moves_nothing(func):
                work.shape = tuple(first.shape)

    def _note_results(self, func: Any, args: Any, kwargs: Any, result: Any, owner: str | None, label: str) -> None:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        sources = [(t, self._owners.get(id(t)) or self._derived.get(id(t))) for t in _tensors((args, kwargs))]
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in given:
                self._makers[tensor.untyped_storage()._cdata] = (owner, label)
            if func._schema.name not in _UNTOUCHED:
                self._labels[_place(tensor)] = label
            paths = next((paths for t, paths in sources if paths and t.dim() == 4 and t.shape == tensor.shape), None)
            self._derived.pop(id(tensor), None)
            if paths and func._schema.name in _OF_WEIGHTS:
                self._derived[id(tensor)] = paths

    def _note_copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Within an operator of ours: copies to another memory format, by us or by torch's convolutions."""
        default = torch.contiguous_format if func._schema.name == "aten::contiguous" else None
        wanted = kwargs.get("memory_format", default)
        if func._schema.name in _RELAYING and wanted in (torch.channels_last, torch.contiguous_format):
            if not args[0].is_contiguous(memory_format=wanted) and kwargs.get("dtype") in (None, args[0].dtype):
                self._add_copy(args[0])
        elif func._schema.name in ("aten::convolution", "aten::convolution_backward"):
            maps = [t for t in args[:3] if isinstance(t, Tensor) and t.dim() == 4]
            if geometry.memory_format(*maps) == torch.channels_last:
                for tensor in maps:
                    if not tensor.is_contiguous(memory_format=torch.channels_last):
                        self._add_copy(tensor)

    def _add_copy(self, tensor: Tensor, copied: bool = True) -> None:
        outer = self._outer
        assert outer is not None
        storage = tensor.untyped_storage()._cdata
        operand = next((name for name, given in outer.operands if given.untyped_storage()._cdata == storage), "result")
        source = outer.layer if operand == "result" else self._source(tensor)
        size = tensor.numel() * tensor.element_size()
        direction = "backward" if self.is_backward else "forward"
        self.copies.append(Copy(outer.layer, direction, operand, tuple(tensor.shape), size, copied, source))
        if copied:
            self._of(outer.layer or None).moved += 2 * size

    def _source(self, tensor: Tensor) -> str:
        known = self._labels.get(_place(tensor))
        return known or self._makers.get(tensor.untyped_storage()._cdata, (None, "unknown"))[1]


class _Outer(NamedTuple):
    layer: str
    operands: list[tuple[str, Tensor]]


def _told(function: Callable[..., Tensor], paths: Mapping[int, str], inside: Callable[[str], Any]) -> Callable[..., Tensor]:
    """`conv_norm_relu` in the name of the first of the modules that it runs together."""

    def told(input: Tensor, *parts: Any, **options: Any) -> Tensor:
        path = next((paths[id(part)] for part in parts if id(part) in paths), None)
        if path is None:
            return function(input, *parts, **options)
        with inside(path):
            return function(input, *parts, **options)

    return told


def _replaced(written: Written, function: object, other: object) -> Written:
    names = {name: other if value is function else value for name, value in written.program.names.items()}
    return written._replace(program=Program(written.program.source, names))


def _is_slowed(call: tuning.Call) -> bool:
    """Whether torch's kernels serve it, and would not had its operands lain in channels_last."""
    if call.channels_last or tuning.pick(*call)[0].backend != "aten":
        return False
    return tuning.pick(*call._replace(channels_last=True))[0].backend != "aten"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)  # as where the dispatcher runs these implementations
_RELAYING = ("aten::contiguous", "aten::clone", "aten::_to_copy")
_UNTOUCHED = ("aten::detach", "aten::alias")
_OF_WEIGHTS = ("aten::_to_copy", "aten::clone", "aten::detach", "aten::mul")  # such as one that a norm is folded into

# torch's operators, by the functions of ours that stand for them in a rewritten forward.
_FUNCTIONS = {
    "max_pool2d_with_indices": "max_pool2d",
    "mean": "global_avg_pool2d",
    "_adaptive_avg_pool2d": "global_avg_pool2d",
}


def _convolution(args: Any, result: Any) -> int:
    input, weight, transposed = args[0], args[1], args[6]
    return 2 * (input if transposed else result).numel() * math.prod(weight.shape[1:])


def _convolution_backward(args: Any, result: Any) -> int:
    grad, input, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    return 2 * sum(wanted[:2]) * (input if transposed else grad).numel() * math.prod(weight.shape[1:])


def _matrix(args: Any, result: Any) -> int:
    return 2 * result.numel() * args[0].shape[-1]


# Multiply-adds of torch's operators, counted as two.
_PRODUCTS: dict[str, Callable[[Any, Any], int]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "mm": _matrix,
    "bmm": _matrix,
    "addmm": lambda args, result: _matrix(args[1:], result),
    "baddbmm": lambda args, result: _matrix(args[1:], result),
}
