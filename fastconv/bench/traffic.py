"""Bytes that a training step moves and saves, counted from shapes: fastconv's kernels against eager's operators.

Tensors lie on the meta device, so that nothing is computed and any batch fits. A launch moves the tensors that it is
passed, an operator of torch its inputs and outputs, each tensor once; whoever writes in place reads as well. Views and
allocations move nothing. What caches keep, and what a library does inside of one operator, is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastconv import backends, tuning
from fastconv.backends.triton_launch import Launch, recording
from fastconv.bench.saved import saved_bytes
from fastconv.ops.define import IMPLEMENTATIONS
from fastconv.tuning.sides import cdiv


class Moved(NamedTuple):
    """Calls of a kernel or operator, the bytes of their tensors, and the bytes with every tile's reading of its operands."""

    calls: int = 0
    tensors: int = 0
    tiles: int = 0

    def __add__(self, other: Moved) -> Moved:  # type: ignore[override]
        return Moved(*(mine + more for mine, more in zip(self, other, strict=True)))


class Step(NamedTuple):
    """What a training step (forward, backward) of a model came to.

    Attributes:
        moved: by kernel and operator, the most bytes first.
        saved: bytes kept for backward, parameters excluded.
    """

    moved: dict[str, Moved]
    saved: int

    @property
    def total(self) -> Moved:
        return sum(self.moved.values(), start=Moved())


def measure(model: nn.Module, input: Tensor, capability: int, chip: str = "") -> Step:
    """Count a training step of `model` on `input`, both on the meta device.

    Every operator of fastconv is served by the triton backend, as on a chip of that compute capability (90 for sm_90) or, if
    its full name is given, as the tables of `chip` have it.
    """
    with backends.use_backend("triton"), recording(capability, chip) as launches:
        saved = saved_bytes(lambda: model(input))
        moved = _count_step(model, input, launches)
    ordered = sorted(moved.items(), key=lambda item: (-item[1].tensors, item[0]))
    return Step(dict(ordered), saved)


def calls(model: nn.Module, input: Tensor, chip: str) -> dict[tuning.Call, int]:
    """The calls of a training step on the meta device as `tuning` would be asked on `chip`, and how often each comes."""
    with (
        backends.use_backend("auto"),
        backends.simulating(chip),
        recording(90) as launches,  # what is launched does not count
        tuning.observing() as observed,
    ):
        _count_step(model, input, launches)
    return dict(observed)


def _count_step(model: nn.Module, input: Tensor, launches: list[Launch]) -> dict[str, Moved]:
    with _Counting(launches) as counting:
        model(input).float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    return counting.moved


class _Counting(TorchDispatchMode):
    """Counts torch's operators, and runs fastconv's launchers on meta tensors, which the dispatcher would give the fakes."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self._launches = launches
        self._launches.clear()
        self.moved: dict[str, Moved] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastconv":
            with self:  # copies that a launcher makes count too
                result = IMPLEMENTATIONS[func._schema.name.partition("::")[2]](*args)
            for launch in self._launches:
                self._add(launch.kernel.__name__, launched(launch))
            self._launches.clear()  # autograd copies a gradient that somebody else still holds
            return result
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).replace("aten.", "aten::")
        size = moved_by(func, args, kwargs or {}, result)
        if size:
            self._add(name, Moved(1, size, size))
        return result

    def _add(self, name: str, moved: Moved) -> None:
        self.moved[name] = self.moved.get(name, Moved()) + moved


def moved_by(func: Any, args: Iterable[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes of the tensors that an operator reads, and of those that it writes."""
    if moves_nothing(func):
        return 0
    read = [*args][1:] if _only_writes(func) else [*args, *kwargs.values()]
    return _bytes(read) + _bytes([result])


def moves_nothing(func: Any) -> bool:
    name = func._schema.name.partition("::")[2]
    return bool(func.is_view) or "empty" in name or name in ("_unsafe_view", "lift_fresh", "detach_")


def _only_writes(func: Any) -> bool:
    name = func._schema.name.partition("::")[2]
    return name.endswith("_like") or name.startswith("new_") or name in ("copy_", "zero_", "fill_", "bernoulli_")


def _bytes(arguments: Iterable[Any]) -> int:
    return sum(map(_size, _distinct(tree_leaves(list(arguments)))))


def _distinct(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, a descriptor's for the descriptor, each once."""
    seen = set()
    for argument in arguments:
        tensor = getattr(argument, "base", argument)
        if isinstance(tensor, Tensor) and (key := (tensor.untyped_storage()._cdata, tensor.storage_offset())) not in seen:
            seen.add(key)
            yield tensor


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Arguments of kernels that are read and written.
_IN_PLACE = ("running_mean_ptr", "running_var_ptr")


def launched(launch: Launch) -> Moved:
    """What a launch moves."""
    arguments = launch.arguments
    tensors = sum(map(_size, _distinct(arguments.values())))
    tensors += sum(_size(arguments[name]) for name in _IN_PLACE if name in arguments)
    rule = next((rule for kernel, rule in _TILED.items() if launch.kernel.__name__.startswith(kernel)), None)
    if rule is None:
        return Moved(1, tensors, tensors)
    count, operands = rule
    read = [getattr(arguments[name], "base", arguments[name]) for name in operands]
    tiled = count(launch.grid, arguments) * read[0].element_size()
    return Moved(1, tensors, tensors - sum(map(_size, read)) + tiled)


def _forward(grid: tuple[int, ...], a: dict[str, Any]) -> int:
    """Elements of both operands: programs × steps × (rows + columns) × depth of a step."""
    return math.prod(grid) * a["steps"] * (a["BLOCK_N"] + _pixels(a)) * a["BLOCK_K"]


def _input_grad(grid: tuple[int, ...], a: dict[str, Any]) -> int:
    """As `_forward`; the phases of a stride share the taps between them."""
    phases = a["STRIDE_H"] * a["STRIDE_W"]
    steps = a["KH"] * a["KW"] * a["blocks_k"]
    return math.prod(grid) // phases * steps * (a["BLOCK_N"] + _pixels(a)) * a["BLOCK_K"]


def _weight_grad(grid: tuple[int, ...], a: dict[str, Any]) -> int:
    """Every tile of the weight reads all pixels of both maps, the splits a part each."""
    steps = a.get("boxes") or a.get("tiles") or cdiv(a["pixels"], a["BLOCK_P"])
    return grid[0] * steps * _pixels(a) * (a["BLOCK_N"] + a["BLOCK_C"])


def _depthwise(grid: tuple[int, ...], a: dict[str, Any]) -> int:
    """Nine loads an output for 3×3; 18 for four where a program has four rows."""
    loads = 18 if "tiles_h" in a else a["KH"] * a["KW"]
    phases = a["STRIDE_H"] * a["STRIDE_W"] if "phase_tiles" in a else 1
    return math.prod(grid) // phases * a["BLOCK_M"] * a["BLOCK_C"] * loads


def _depthwise_weight_grad(grid: tuple[int, ...], a: dict[str, Any]) -> int:
    """The gradient and x for each tap, of 3×3 windows the gradient once."""
    loads = 2 * a["KH"] * a["KW"] if "KH" in a else 10
    return a["pixels"] * a["CHANNELS"] * loads


def _pixels(a: dict[str, Any]) -> int:
    sides = (a.get(name, 1) for name in ("BLOCK_B", "BLOCK_H", "BLOCK_W"))
    return a.get("BLOCK_M") or a.get("BLOCK_P") or math.prod(sides)


# Of kernels whose programs read operands by tiles: elements that all of them load, and those operands. What a mask or
# the edge of a map takes away counts too.
_TILED: dict[str, tuple[Callable[[tuple[int, ...], dict[str, Any]], int], tuple[str, ...]]] = {
    "conv_tma_kernel": (_forward, ("x_desc", "weight_desc")),
    "conv_fprop": (_forward, ("x_ptr", "weight_ptr")),
    "conv_first_wgrad": (_weight_grad, ("grad_ptr", "padded_ptr")),
    "conv_first": (_forward, ("padded_ptr", "packed_ptr")),
    "conv_dgrad_strided_tma": (_input_grad, ("grad_desc", "weight_desc")),
    "conv_dgrad": (_input_grad, ("grad_ptr", "weight_ptr")),
    "conv_wgrad_tma": (_weight_grad, ("grad_desc", "x_desc")),
    "conv_wgrad": (_weight_grad, ("grad_ptr", "x_ptr")),
    "depthwise_wgrad": (_depthwise_weight_grad, ("grad_ptr", "x_ptr")),
    "depthwise_dgrad": (_depthwise, ("grad_ptr",)),
    "depthwise": (_depthwise, ("x_ptr",)),
}
