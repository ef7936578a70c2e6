"""Calls, entries and tables for tests of tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastconv import tuning
from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning import Call, Candidate, tables

CHIP = "NVIDIA H100 80GB HBM3 sm_90"
BF16, FP32 = Policy(torch.bfloat16), Policy(torch.float32)


def conv(batch: int = 32, channels: int = 128, size: int = 28, kernel: int = 3, stride: int = 1) -> ConvGeometry:
    weight, pad = (channels, channels, kernel, kernel), (kernel // 2, kernel // 2)
    return ConvGeometry.of("test", (batch, channels, size, size), weight, None, (stride, stride), pad, (1, 1), 1)


def call(g: ConvGeometry | None = None, op: str = "conv2d_relu", direction: str = "forward", **changes: Any) -> Call:
    return Call(op, direction, g or conv(), BF16, CHIP, True)._replace(**changes)


def entry(of: Call, winner: Candidate, *others: Candidate) -> tables.Entry:
    return tables.Entry(of, winner, 2e-5, tuple((other, 3e-5 + i * 1e-6) for i, other in enumerate(others)))


def put(*entries: tables.Entry) -> Path:
    chip = entries[0].call.chip
    tables.write(tables.user_file(chip), chip, entries)
    tuning.forget()
    return tables.user_file(chip)
