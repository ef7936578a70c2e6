"""cuDNN's convolution with ReLU: trusted only where it keeps NaN, and what tuning makes of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from tuned import BF16, CHIP, FP32, conv

from fastconv import backends, tuning
from fastconv.backends import cudnn
from fastconv.geometry import ConvGeometry
from fastconv.precision import Policy
from fastconv.tuning import fused

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
G = conv(32, 64, 224)
WINDOWS = (
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((7, 5), (2, 3), (3, 0), (1, 2)),
    ((2, 3), (4, 1), (9, 1), (1, 1)),
)


def _right(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, g: ConvGeometry) -> Tensor:
    output = nn.functional.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)
    return (output if residual is None else output + residual).relu()


@pytest.mark.parametrize("window", WINDOWS)
def test_it_is_trusted_only_where_it_keeps_nan(window: fused.Window) -> None:
    def drops(*args: object) -> Tensor:
        return _right(*args).nan_to_num(0.0)  # type: ignore[arg-type]

    def spreads(*args: object) -> Tensor:
        output = _right(*args)  # type: ignore[arg-type]
        return output + 0 * output.sum()

    def reads_its_output(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, g: ConvGeometry) -> Tensor:
        """0 · whatever the memory holds, which is NaN in these tests, on top."""
        garbage = torch.empty(g.output_shape, dtype=x.dtype)
        return _right(x, weight, bias, garbage * 0 if residual is None else residual, g)

    def refuses(*args: object) -> Tensor:
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    kernel, *rest = window
    g = ConvGeometry.of("test", (4, 64, 40, 40), (64, 64, *kernel), None, *rest, 1)
    for dtype in (torch.float32, torch.bfloat16):
        assert cudnn.keeps_nan(_right, CPU, dtype, g)
        for wrong in (drops, spreads, reads_its_output, refuses):
            assert not cudnn.keeps_nan(wrong, CPU, dtype, g), wrong.__name__


def test_a_window_too_wide_to_be_tried_is_not_trusted() -> None:
    wide = ConvGeometry.of("test", (1, 16, 2000, 8), (16, 16, 3, 3), None, (1, 1), (1, 1), (900, 1), 1)
    assert not cudnn.keeps_nan(_right, CPU, torch.float32, wide)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ConvGeometry]]:
    """A CUDA device whose cuDNN keeps NaN; what was tried on it."""
    tried: list[ConvGeometry] = []

    def keeps_nan(run: object, device: torch.device, dtype: torch.dtype, like: ConvGeometry) -> bool:
        assert device == CUDA
        tried.append(like)
        return True

    monkeypatch.setattr(cudnn, "keeps_nan", keeps_nan)
    monkeypatch.setattr(cudnn, "_answers", {})
    monkeypatch.setattr(cudnn, "_noted", set())
    monkeypatch.setattr(fused, "_fused", {})
    monkeypatch.setattr(backends, "_chip", lambda *_: CHIP)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.use_deterministic_algorithms(False)
    tuning.forget()
    yield tried
    tuning.forget()


def _first(g: ConvGeometry = G) -> str:
    return tuning.pick("conv2d_relu", "forward", g, BF16, CHIP)[0].backend


def _select(g: ConvGeometry = G, op: str = "conv2d_relu", channels_last: bool = True) -> None:
    backends.select("auto", op, "forward", g, BF16, SimpleNamespace(device=CUDA), channels_last)  # type: ignore[arg-type]


@pytest.mark.usefixtures("cache")
def test_select_tries_once_before_it_orders(probed: list[ConvGeometry]) -> None:
    assert _first() == "triton"
    _select(op="conv2d")
    _select(channels_last=False)
    assert not probed and _first() == "triton", "torch's passes are counted until cuDNN was tried"
    _select()
    assert _first() == "aten"
    for batch in (32, 16):
        _select(conv(batch, 64, 224))
    assert probed == [G], "a window is tried once"
    _select(conv(32, 64, 56, kernel=1))
    assert len(probed) == 2


@pytest.mark.usefixtures("cache")
def test_answers_are_kept_by_what_changes_the_engine(probed: list[ConvGeometry]) -> None:
    for policy in (BF16, FP32, Policy(torch.float32, True)):
        assert cudnn.fuses(CUDA, G, policy) and cudnn.fuses(CUDA, G, policy)
    assert len(probed) == 3
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        assert cudnn.fuses(CUDA, G, BF16)
    assert len(probed) == 4
    assert _first() == "aten"
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        assert not cudnn.fuses(CUDA, G, BF16)
        assert _first() == "triton", "the model follows the switch"
    assert cudnn.fuses(CUDA, G, BF16) and _first() == "aten"
    assert len(probed) == 4


@pytest.mark.usefixtures("cache")
def test_nothing_is_tried_in_a_capture(
    probed: list[ConvGeometry], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastconv")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not cudnn.fuses(CUDA, G, BF16) and not cudnn.fuses(CUDA, G, FP32)
    assert not probed
    (record,) = caplog.records
    assert "capture" in record.getMessage()
    assert cudnn.fuses(CUDA, G, BF16), "afterwards it is"


@pytest.mark.parametrize(
    ("g", "policy"),
    [
        (conv(1, 12), BF16),
        (ConvGeometry.of("test", (1, 32, 8, 8), (32, 16, 3, 3), None, (1, 1), (1, 1), (1, 1), 2), BF16),
        (ConvGeometry.of("test", (0, 32, 8, 8), (32, 32, 3, 3), None, (1, 1), (1, 1), (1, 1), 1), BF16),
        (conv(2**10, 64, 2**8, kernel=1), Policy(torch.float64)),
        (conv(2**9, 64, 2**8, kernel=1), BF16),
        (ConvGeometry.of("test", (2**9, 8, 2**8, 2**8), (64, 8, 1, 1), None, (1, 1), (0, 0), (1, 1), 1), BF16),
    ],
    ids=["channels", "groups", "empty", "dtype", "input", "output"],
)
def test_calls_that_it_cannot_serve(g: ConvGeometry, policy: Policy, probed: list[ConvGeometry]) -> None:
    assert not cudnn.fuses(CUDA, g, policy)
    assert not probed


def test_a_cpus_call_is_not_for_it() -> None:
    assert not cudnn.fuses(CPU, G, BF16)


@pytest.mark.usefixtures("cache")
def test_the_model_counts_passes_that_are_run(probed: list[ConvGeometry]) -> None:
    def seconds(op: str) -> float:
        return tuning.cost.seconds(op, "forward", G, BF16, CHIP, tuning.Candidate("aten"))

    with_bias, unfused = seconds("conv2d"), seconds("conv2d_relu")
    cudnn.fuses(CUDA, G, BF16)
    alone = seconds("conv2d_relu")
    sweep = with_bias - alone
    assert sweep > 2 * 2 * 32 * 64 * 224 * 224 / 3.35e12, "a bias alone is a pass that reads and writes the output"
    assert unfused == pytest.approx(alone + 2 * sweep)
    assert seconds("conv2d") == with_bias
    other = tuning.cost.seconds("conv2d_relu", "forward", G, BF16, "NVIDIA H200 sm_90", tuning.Candidate("aten"))
    assert other > 1.2 * alone, "another chip has not been tried"
