"""Bytes of a training step: counted as by hand, and few against eager's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from tuned import CHIP

from fastconv import convert, tuning
from fastconv.bench import traffic
from fastconv.cli import explain, main
from fastconv.tuning import tables

HALF = 2  # bytes
BATCH, SIZE = 32, 56
# of eager's, at 224 in bfloat16 on sm_90
MOST_MOVED, MOST_SAVED = 0.60, 0.50


@pytest.mark.parametrize("model", ["vgg16", "recipe"])
def test_a_step_moves_and_saves_little(model: str) -> None:
    steps = explain.measure(model, (32, 3, 224, 224), torch.bfloat16, "sm_90")
    shares = explain.shares(steps)
    assert 0.2 < shares["moved"] <= MOST_MOVED
    assert 0.2 < shares["saved"] <= MOST_SAVED
    names = steps["fastconv"].moved
    assert "aten::convolution" not in names and "aten::convolution_backward" not in names
    assert not any(name.startswith("fastconv") for name in names)


def _net(pool: bool = True) -> tuple[nn.Sequential, torch.Tensor]:
    with torch.device("meta"):
        net = nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(inplace=True),
            *([nn.MaxPool2d(2)] if pool else []),
        )
        x = torch.empty(BATCH, 64, SIZE, SIZE, dtype=torch.bfloat16, memory_format=torch.channels_last)
    return net.to(dtype=torch.bfloat16, memory_format=torch.channels_last), x  # type: ignore[call-overload]


X = BATCH * 64 * SIZE * SIZE * HALF  # the input; the second map is twice that
W1, W2 = 64 * 64 * 9 * HALF, 128 * 64 * 9 * HALF
B1, B2 = 64 * HALF, 128 * HALF
CODES = BATCH * 128 * (SIZE // 2) ** 2


def test_eager_is_counted_by_operator() -> None:
    net, x = _net()
    step = traffic.measure(net, x, 90)
    codes = CODES * 8  # int64 indices
    expected = {
        "aten::convolution": (2, X + W1 + B1 + X + X + W2 + B2 + 2 * X),
        "aten::relu_": (2, 2 * X + 4 * X),  # in place: read and written
        "aten::max_pool2d_with_indices": (1, 2 * X + X // 2 + codes),
        "aten::max_pool2d_with_indices_backward": (1, X // 2 + 2 * X + codes + 2 * X),
        "aten::threshold_backward": (2, 3 * 2 * X + 3 * X),
        # The first layer's input needs no gradient.
        "aten::convolution_backward": (2, (2 * X + X + W2 + X + W2 + B2) + (X + X + W1 + W1 + B1)),
    }
    assert {name: step.moved[name][:2] for name in expected} == expected
    assert step.saved == X + X + 2 * X + codes


def test_launches_are_counted_by_tensor() -> None:
    net, x = _net()
    step = traffic.measure(convert(net), x, 90)
    assert step.moved["unpool_kernel"].calls == 1
    forward_and_input_grad = (X + W1 + B1 + X) + (X + W2 + B2 + X // 2 + CODES) + (2 * X + W2 + X + X)
    found = step.moved["conv_tma_kernel"]
    assert found.calls == 3
    partial = found.tensors - forward_and_input_grad  # of the first layer's bias gradient: a row for each box
    assert 0 < partial <= 4 * 64 * (BATCH * SIZE * SIZE) // 64
    assert partial % (4 * 64) == 0
    assert not {"aten::clone", "aten::copy_", "aten::convolution", "aten::threshold_backward"} & set(step.moved)
    assert step.saved == X + X + CODES


def test_tiles_read_again() -> None:
    """3×3 windows read each pixel nine times, and each program its weights."""
    net, x = _net(pool=False)
    tma = traffic.measure(convert(net), x, 90).moved["conv_tma_kernel"]
    pixels = BATCH * SIZE * SIZE
    assert tma.tiles > tma.tensors + 8 * pixels * (64 + 64 + 128) * HALF
    pointer = traffic.measure(convert(net), x, 80).moved["conv_fprop_kernel"]
    assert pointer.tiles > pointer.tensors + 8 * pixels * (64 + 64) * HALF


def test_passes_read_once() -> None:
    """A pass reads each element once: both figures agree."""
    net, x = _net()
    moved = traffic.measure(convert(net), x, 90).moved
    assert moved["unpool_kernel"].tiles == moved["unpool_kernel"].tensors


def test_explain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--input", "3x32x32", "--batch", "2"]
    assert main(["explain", "--traffic", "--model", "recipe", *arguments, "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "conv_tma_kernel" in printed and "aten::threshold_backward" in printed and "fastconv / torch: moved" in printed
    content = json.loads((tmp_path / "a.json").read_text())["recipe"]
    assert set(content) == {"fastconv", "torch"}
    assert content["torch"]["moved"]["aten::convolution"]["calls"] == 8


def test_explain_tells_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "recipe", "--input", "3x32x32", "--chip", "sm_90"]) == 0
    printed = capsys.readouterr().out
    assert "cost model: triton" in printed and "conv2d weight_grad 64x64x32x32 to 64, 3x3/1, bfloat16" in printed


@pytest.mark.parametrize(
    "arguments",
    [["--traffic", "--chip", "cpu"], ["--traffic", "--input", "3x224"], ["--json", "x.json"]],
    ids=["chip", "input", "json"],
)
def test_explain_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments]) == 1
    assert arguments[-2] in capsys.readouterr().err


def test_every_family_is_counted() -> None:
    """First layers, depthwise ones of both strides, groups, strides and batch normalisation, on three chips."""
    with torch.device("meta"):
        net = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            *(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 5, padding=2, groups=32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, groups=8), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU()),
            nn.AvgPool2d(2),
        )
        x = torch.empty(8, 3, 64, 64, dtype=torch.float16, memory_format=torch.channels_last)
    net = net.to(dtype=torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for capability in (80, 90, 100):
        moved = traffic.measure(convert(net), x, capability).moved
        assert all(row.calls and row.tiles >= 0.9 * row.tensors for row in moved.values()), moved
        for kernel in (
            "depthwise_rows",
            "depthwise_kernel",
            "depthwise_dgrad",
            "depthwise_wgrad_3x3",
            "depthwise_wgrad_kernel",
        ):
            assert any(name.startswith(kernel) for name in moved), kernel
        assert any(name.startswith("batch_norm") for name in moved)


def _both(backend: str) -> dict[tuning.Call, int]:
    """The calls of a small net where every convolution's table names `backend` alone."""
    net, x = _net()
    before = traffic.calls(convert(net), x, CHIP)
    chosen = {call: next(c for c in tuning.pick(*call) if c.backend == backend) for call in before}
    tables.write(tables.user_file(CHIP), CHIP, [tables.Entry(call, winner, 1e-5) for call, winner in chosen.items()])
    tuning.forget()
    return traffic.calls(convert(net), x, CHIP)


@pytest.mark.usefixtures("cache")
def test_calls_follow_the_choices_of_the_chip() -> None:
    """Around torch's convolution ReLU, its backward and the pool are calls of their own."""
    passes = {("relu", "backward"), ("relu_max_pool2d", "forward")}
    found = {backend: {(call.op, call.direction) for call in _both(backend)} for backend in ("triton", "aten")}
    assert ("conv2d_relu_max_pool2d", "forward") in found["triton"]
    assert not passes & found["triton"]
    assert found["aten"] == found["triton"] | passes


@pytest.mark.parametrize("chip", [CHIP, "sm_80", "NVIDIA A40 sm_86", "cpu"])
@pytest.mark.usefixtures("cache")
def test_calls_are_those_of_the_chip(chip: str) -> None:
    net, x = _net()
    calls = traffic.calls(convert(net), x, chip)
    assert {call.chip for call in calls} == {chip}
    assert ("conv2d_relu", "forward") in {(call.op, call.direction) for call in calls}
    wide, y = net.float(), x.float()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert {call.policy.tf32 for call in traffic.calls(convert(wide), y, chip)} == {chip != "cpu"}


@pytest.mark.usefixtures("cache")
def test_bytes_are_those_of_the_named_chips_tables() -> None:
    net, x = _net()
    modelled = traffic.measure(convert(net), x, 90, CHIP).moved
    assert modelled == traffic.measure(convert(net), x, 90).moved
    entries = []
    for call in traffic.calls(convert(net), x, CHIP):
        pointers = [c for c in tuning.pick(*call) if c.kernel == "pointer"]
        entries += [tables.Entry(call, pointers[0], 1e-5)] if pointers else []
    tables.write(tables.user_file(CHIP), CHIP, entries)
    moved = traffic.measure(convert(net), x, 90, CHIP).moved
    assert "conv_fprop_kernel" in moved and "conv_tma_kernel" not in moved
    assert traffic.measure(convert(net), x, 90).moved == modelled, "sm_90 has no table"


def test_explain_counts_as_on_the_named_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = traffic.Step({"aten::relu": traffic.Moved(1, 2, 2)}, 1)
    monkeypatch.setattr(traffic, "measure", lambda model, input, *chip: seen.append(chip) or step)
    explain.measure("vgg11", (1, 3, 32, 32), torch.bfloat16, CHIP)
    assert seen == [(90, CHIP)] * 2
