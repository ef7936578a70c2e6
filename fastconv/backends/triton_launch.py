"""What the launchers of the Triton backend share: the kernels, the launch and its recording, tensors in NHWC.

Triton and the kernels are imported with the first call, so that a missing Triton is a reason of `supports`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastconv import backends, tuning
from fastconv.backends import triton_tiles as tiles
from fastconv.backends.triton_tiles import cdiv
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning.sides import VECTOR_BYTES, has_tensor_cores


class Launch(NamedTuple):
    """One launch: the jitted function, its grid, and every argument by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def tile(self) -> tuple[tuple[str, int], ...]:
        """The sides of the tile, stages and warps, as a plan's config names them."""
        return tuple((name, value) for name, value in self.arguments.items() if name in _TILE or name.startswith("BLOCK_"))


_TILE = ("PACK", "SWAP", "BATCH_INNER", "NUM_STAGES", "num_warps")

# Of the data-centre product of each generation, for recordings.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}

_recorded: list[Launch] | None = None
_recorded_chip = ""


@contextlib.contextmanager
def recording(capability: int, chip: str = "") -> Iterator[list[Launch]]:
    """Note every launch as for a chip of that compute capability (90 for sm_90), or as for `chip`, and run none.

    Tensors may lie anywhere, the meta device included. For compiling ahead of time and for counting bytes.
    """
    global _recorded, _recorded_chip
    before = _recorded, _recorded_chip
    _recorded, _recorded_chip = [], chip or f"sm_{capability}"
    tuning.forget()
    try:
        yield _recorded
    finally:
        _recorded, _recorded_chip = before
        tuning.forget()


def is_recording() -> bool:
    return _recorded is not None


def chip(device: torch.device) -> str:
    """The key of tuning's tables for kernels that run on `device`; 'interpreter' under Triton's own."""
    if _recorded_chip:
        return _recorded_chip
    return "interpreter" if kernels().interpreted else backends.chip(device.type, device.index)


def processors(device: torch.device) -> int | None:
    """Streaming multiprocessors of `device`; None under the interpreter."""
    if _recorded_chip:
        return PROCESSORS[f"sm_{tuning.capability(_recorded_chip)}"]
    return None if kernels().interpreted else _device_processors(device.index)


@cache
def _device_processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch on the device of the tensors, where Triton by itself would take the current one."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments))
        return
    operands = (getattr(argument, "base", argument) for argument in arguments.values())  # a descriptor's tensor, or itself
    device = next(operand.device for operand in operands if isinstance(operand, Tensor))
    if kernels().interpreted:
        kernel[grid](**arguments)
    elif device.index is None or device.index == torch.cuda.current_device():
        _launch_compiled(kernel, grid, device.index, arguments)
    else:
        with torch.cuda.device(device):
            _launch_compiled(kernel, grid, device.index, arguments)


def _launch_compiled(kernel: Any, grid: tuple[int, ...], device_index: int | None, arguments: dict[str, Any]) -> None:
    """Triton binds and specialises arguments anew for each launch; those that were seen before have their kernel."""
    key = (id(kernel), grid, device_index, *arguments, *map(_specialisation, arguments.values()))
    found = _compiled.get(key)
    if found is not None:
        run, names = found
        run(*[arguments[name] for name in names])
        return
    compiled = kernel[grid](**arguments)
    if len(_compiled) >= _MOST_COMPILED:
        _compiled.pop(next(iter(_compiled)))
    _compiled[key] = (compiled[(*grid, 1, 1)[:3]], kernel.arg_names)


def _specialisation(argument: Any) -> Any:
    """All of an argument that the machine code may depend on."""
    if type(argument) in _VALUES:
        return argument
    if type(argument) is float:
        return float
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % VECTOR_BYTES == 0  # for which Triton compiles kernels of their own
    return argument.base.dtype, *argument.block_shape, getattr(argument, "round_f32_to_tf32", False)


_VALUES = frozenset({int, bool, str, type(None)})
_MOST_COMPILED = 4096
_compiled: dict[tuple[Any, ...], tuple[Callable[..., None], list[str]]] = {}


@cache
def kernels() -> SimpleNamespace:
    from fastconv.kernels import (
        avg_pool,
        batch_norm,
        conv_dgrad,
        conv_first,
        conv_fprop,
        conv_tma,
        conv_wgrad,
        coords,
        depthwise,
        global_pool,
        max_pool,
        prep,
    )

    return SimpleNamespace(
        interpreted=bool(coords.INTERPRET),
        avg_pool=avg_pool,
        batch_norm=batch_norm,
        conv_dgrad=conv_dgrad,
        conv_first=conv_first,
        conv_fprop=conv_fprop,
        conv_tma=conv_tma,
        conv_wgrad=conv_wgrad,
        depthwise=depthwise,
        global_pool=global_pool,
        max_pool=max_pool,
        prep=prep,
    )


def sum_rows(rows: Tensor, out: Tensor) -> Tensor:
    jitted = kernels()
    blocks = tiles.rows(jitted.interpreted)
    num_rows, num_columns = rows.shape
    grid = (cdiv(num_columns, blocks["BLOCK_C"]),)
    sizes = {"num_rows": num_rows, "num_columns": num_columns}
    launch(jitted.prep.sum_rows_kernel, grid, rows_ptr=rows, sum_ptr=out, **sizes, **blocks)
    return out


def nhwc(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def float32(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def precision(policy: Policy) -> str:
    """tl.dot's input_precision."""
    return "tf32" if has_tensor_cores(policy) else "ieee"


def map_sizes(g: ConvGeometry | PoolGeometry) -> dict[str, int]:
    return {"height": g.height, "width": g.width, "out_height": g.out_height, "out_width": g.out_width}


def window(g: ConvGeometry | PoolGeometry) -> dict[str, int]:
    return {
        "KH": g.kernel_height,
        "KW": g.kernel_width,
        "STRIDE_H": g.stride_h,
        "STRIDE_W": g.stride_w,
        "PAD_H": g.pad_h,
        "PAD_W": g.pad_w,
    }


def dilation(g: ConvGeometry | PoolGeometry) -> dict[str, int]:
    return {"DILATION_H": g.dilation_h, "DILATION_W": g.dilation_w}


def residues(g: ConvGeometry | PoolGeometry) -> dict[str, int]:
    """What coords.first_tap needs to find the taps that lead to an input pixel."""
    gcd_h, gcd_w = math.gcd(g.stride_h, g.dilation_h), math.gcd(g.stride_w, g.dilation_w)
    return {
        "GCD_H": gcd_h,
        "GCD_W": gcd_w,
        "INVERSE_H": pow(g.dilation_h // gcd_h, -1, g.stride_h // gcd_h),
        "INVERSE_W": pow(g.dilation_w // gcd_w, -1, g.stride_w // gcd_w),
    }
