"""Launches: arguments that were seen before go to the kernel compiled for them, and only those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastconv.backends import triton_launch
from fastconv.backends.triton_tma import _map

pytest.importorskip("triton")


class Kernel:
    """As triton.jit makes one: binds arguments by name, compiles, launches, and returns what it compiled."""

    arg_names = ("x_ptr", "y_ptr", "size", "BLOCK")

    def __init__(self) -> None:
        self.bound: list[dict[str, Any]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def bind(**arguments: Any) -> Any:
            self.bound.append(arguments)
            return Compiled(self)

        return bind


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self._kernel.launched.append((grid, *arguments))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_launch.kernels(), "interpreted", False)
    monkeypatch.setattr(triton_launch, "_compiled", {})
    return Kernel()


def test_what_was_seen_before_is_not_bound_again(kernel: Kernel) -> None:
    x, y, other = torch.randn(8), torch.empty(8), torch.randn(8)
    arguments = {"y_ptr": y, "x_ptr": x, "BLOCK": 16, "size": 8, "num_warps": 4}
    for operand in (x, other):
        triton_launch.launch(kernel, (3,), **{**arguments, "x_ptr": operand})
    assert len(kernel.bound) == 1
    assert kernel.launched == [((3, 1, 1), other, y, 8, 16)], "in the order of the kernel's parameters, warps not among them"


@pytest.mark.parametrize(
    "change",
    [
        {"BLOCK": 32},
        {"size": 9},
        {"num_warps": 8},
        {"x_ptr": torch.randn(8).bfloat16()},
        {"x_ptr": torch.randn(9)[1:]},
        {"x_ptr": None},
    ],
    ids=["constant", "size", "warps", "dtype", "alignment", "absent"],
)
def test_what_the_machine_code_may_depend_on_is_bound_anew(kernel: Kernel, change: dict[str, Tensor | int | None]) -> None:
    arguments = {"x_ptr": torch.randn(8), "y_ptr": torch.empty(8), "size": 8, "BLOCK": 16, "num_warps": 4}
    triton_launch.launch(kernel, (3,), **arguments)
    triton_launch.launch(kernel, (3,), **{**arguments, **change})
    triton_launch.launch(kernel, (4,), **arguments)
    assert len(kernel.bound) == 3 and not kernel.launched


def test_floats_are_no_part_of_the_machine_code(kernel: Kernel) -> None:
    for value in (0.5, 0.25):
        triton_launch.launch(kernel, (3,), x_ptr=torch.randn(8), y_ptr=torch.empty(8), size=value, BLOCK=16)
    assert len(kernel.bound) == 1 and kernel.launched[0][3] == 0.25


def test_a_box_is_part_of_a_descriptor_and_its_tensor_is_not(kernel: Kernel) -> None:
    x, other = torch.randn(2, 32, 4, 4), torch.randn(4, 32, 8, 8)
    arguments = {"y_ptr": x, "size": 8, "BLOCK": 16}
    for tensor, box in ((x, (1, 4, 4)), (other, (1, 4, 4)), (x, (2, 2, 4))):
        tensor = tensor.to(memory_format=torch.channels_last)
        triton_launch.launch(kernel, (3,), x_ptr=_map(tensor, box, 32), **arguments)
    assert [tuple(bound["x_ptr"].block_shape) for bound in kernel.bound] == [(1, 4, 4, 32), (2, 2, 4, 32)]
    assert kernel.launched[0][1].shape == [4, 8, 8, 32]


def test_caches_stay_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_MOST_COMPILED", 4)
    for size in range(10):
        triton_launch.launch(kernel, (1,), x_ptr=torch.randn(8), y_ptr=torch.empty(8), size=size, BLOCK=16)
        assert len(triton_launch._compiled) <= 4
