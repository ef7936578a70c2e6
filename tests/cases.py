"""The shared lists: what convolutions and pools are tried, and how a call and its oracle are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class ConvCase:
    name: str
    input: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.out_channels, self.input[1] // self.groups, *self.kernel)

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.stride, self.padding, self.dilation, self.groups)


CONVS = [
    ConvCase("3x3", (2, 16, 8, 8), 32, (3, 3), padding=1),
    ConvCase("recipe_small_map", (2, 32, 4, 4), 32, (3, 3), padding=1),
    ConvCase("first_layer", (2, 3, 12, 12), 32, (3, 3), padding=1),
    ConvCase("first_layer_grey", (2, 1, 8, 8), 16, (3, 3), padding=1),
    ConvCase("stem_7x7_s2", (1, 3, 20, 20), 16, (7, 7), stride=2, padding=3),
    ConvCase("1x1", (2, 24, 6, 6), 16, (1, 1)),
    ConvCase("1x1_s2", (2, 16, 7, 7), 16, (1, 1), stride=2),
    ConvCase("5x5_p2", (1, 8, 9, 9), 12, (5, 5), padding=2),
    ConvCase("3x3_s2_odd", (2, 16, 9, 7), 16, (3, 3), stride=2, padding=1),
    ConvCase("stride_2_1", (1, 8, 9, 8), 8, (3, 3), stride=(2, 1), padding=(1, 0)),
    ConvCase("stride_3", (1, 8, 11, 10), 8, (3, 3), stride=3, padding=1),
    ConvCase("kernel_3x1", (1, 8, 7, 9), 8, (3, 1), padding=(1, 0)),
    ConvCase("dilation_2", (1, 8, 10, 10), 8, (3, 3), padding=2, dilation=2),
    ConvCase("dilation_2_s2", (1, 8, 11, 11), 8, (3, 3), stride=2, padding=1, dilation=(2, 1)),
    ConvCase("odd_channels", (2, 5, 7, 6), 7, (3, 3), padding=1),
    ConvCase("groups_2", (2, 16, 6, 6), 8, (3, 3), padding=1, groups=2),
    ConvCase("depthwise", (1, 12, 8, 7), 12, (3, 3), padding=1, groups=12),
    ConvCase("depthwise_x2_s2", (1, 6, 9, 9), 12, (3, 3), stride=2, padding=1, groups=6),
    ConvCase("wide_padding", (1, 4, 5, 5), 4, (3, 3), padding=4),
    ConvCase("same", (1, 6, 7, 8), 6, (3, 3), padding="same"),
    ConvCase("same_even_kernel", (1, 6, 7, 8), 6, (4, 2), padding="same"),
    ConvCase("valid", (1, 6, 7, 8), 6, (3, 2), padding="valid"),
]

# The share that also runs in Triton's interpreter, at some 5 ms a step of the K loop and program.
TRITON_CONVS = [
    case
    for case in CONVS
    if case.name
    in {"3x3", "first_layer_grey", "3x3_s2_odd", "dilation_2_s2", "odd_channels", "groups_2", "same_even_kernel"}
]


# Real layers, for a GPU.
GPU_CONVS = [
    ConvCase("c64_56", (8, 64, 56, 56), 128, (3, 3), padding=1),
    ConvCase("c256_14", (8, 256, 14, 14), 256, (3, 3), padding=1),
    ConvCase("c512_7", (16, 512, 7, 7), 512, (3, 3), padding=1),
    ConvCase("c512_4", (32, 512, 4, 4), 512, (3, 3), padding=1),
    ConvCase("stem_112", (4, 3, 112, 112), 64, (7, 7), stride=2, padding=3),
    ConvCase("c128_s2", (8, 128, 28, 28), 256, (3, 3), stride=2, padding=1),
    ConvCase("vgg_first", (4, 3, 112, 112), 64, (3, 3), padding=1),
    ConvCase("grouped_32", (8, 128, 28, 28), 128, (3, 3), padding=1, groups=32),
]


@dataclass(frozen=True)
class PoolCase:
    name: str
    input: tuple[int, int, int, int]
    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


POOLS = [
    PoolCase("2x2", (2, 16, 8, 8), 2),
    PoolCase("2x2_odd_map", (2, 7, 9, 7), 2),
    PoolCase("2x2_ceil", (2, 5, 7, 9), 2, ceil_mode=True),
    PoolCase("3x3_s2_p1", (1, 16, 9, 10), 3, 2, 1),
    PoolCase("3x3_s1_p1", (1, 8, 6, 7), 3, 1, 1),
    PoolCase("3x2_s2x1", (1, 8, 9, 9), (3, 2), (2, 1), (1, 0)),
    PoolCase("5x5_s3_p2_ceil", (1, 4, 11, 12), 5, 3, 2, ceil_mode=True),
    PoolCase("last_window_outside_ceil", (1, 4, 9, 6), 2, 3, ceil_mode=True),
    PoolCase("last_window_outside_p1_ceil", (1, 4, 7, 11), 2, 4, 1, ceil_mode=True),
    PoolCase("2x2_dilated", (1, 4, 9, 9), 2, 2, 0, 2),
    PoolCase("3x3_dilated_p1", (1, 4, 9, 9), 3, 2, 1, 2),
    PoolCase("gaps", (1, 4, 10, 10), 2, 3),
    PoolCase("whole_map", (2, 8, 7, 7), 7),
    PoolCase("window_of_256", (1, 2, 18, 18), 16, 1),
]


def backends_for(dtype: torch.dtype) -> tuple[str, ...]:
    """What is tried on a CPU; `auto` only where it must find another backend than the native one."""
    return ("auto",) if dtype == torch.float64 else ("native", "aten")


def ids(case: ConvCase | PoolCase | torch.dtype) -> str:
    return str(case).removeprefix("torch.") if isinstance(case, torch.dtype) else case.name


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: torch.memory_format) -> torch.Tensor:
    """Fresh random data of unit scale; in bf16 and fp16 already rounded, so that the oracle sees the same numbers."""
    return torch.randn(shape, device=device).to(dtype).to(memory_format=layout).requires_grad_()


LAYOUTS = [pytest.param(torch.channels_last, id="channels_last"), pytest.param(torch.contiguous_format, id="contiguous")]
