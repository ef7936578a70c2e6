"""set_precision: what it makes of a policy, who reads it when, and what it means for tables and for torch's own switch."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from tuned import BF16, CHIP, FP32, call, conv, entry, put

import fastconv
import fastconv.functional as FC
from fastconv import tuning
from fastconv.backends import aten, cudnn, native
from fastconv.bench import tune
from fastconv.precision import Policy, policy, torchs_convolution
from fastconv.tuning import pick, tables
from fastconv.tuning.candidates import ATEN, Candidate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WINOGRAD = Candidate("native", "transform that is not allowed")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_policy(device_type: str) -> None:
    for allowed in (True, False):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            for dtype in DTYPES:
                is_rounded = allowed and device_type == "cuda" and dtype == torch.float32
                assert policy(dtype, device_type) == Policy(dtype, tf32=is_rounded, direct=False)
                with fastconv.set_precision("ieee"):
                    assert policy(dtype, device_type) == Policy(dtype, tf32=False, direct=True)


def test_set_precision_sets_and_restores() -> None:
    assert fastconv.get_precision() == "fast"
    with fastconv.set_precision("ieee"):
        assert fastconv.get_precision() == "ieee"
        with fastconv.set_precision("fast"):
            assert fastconv.get_precision() == "fast"
        assert fastconv.get_precision() == "ieee"
    assert fastconv.get_precision() == "fast"
    fastconv.set_precision("ieee")
    assert fastconv.get_precision() == "ieee"


def test_set_precision_entered_later_and_twice() -> None:
    mode = fastconv.set_precision("ieee")
    fastconv.set_precision("fast")
    with mode:
        assert fastconv.get_precision() == "ieee"
        with mode:
            assert fastconv.get_precision() == "ieee"
        assert fastconv.get_precision() == "ieee"
    assert fastconv.get_precision() == "fast"


def test_set_precision_restores_after_an_error() -> None:
    with pytest.raises(KeyError), fastconv.set_precision("ieee"):
        raise KeyError
    assert fastconv.get_precision() == "fast"


@pytest.mark.parametrize("mode", ["tf32", "IEEE", "", None])
def test_what_is_no_precision_is_refused(mode: Any) -> None:
    with (
        fastconv.set_precision("ieee"),
        pytest.raises(ValueError, match=f"^set_precision: mode must be one of 'fast', 'ieee', got {mode!r}$"),
    ):
        fastconv.set_precision(mode)
    assert fastconv.get_precision() == "fast"


def test_it_holds_for_all_threads_and_no_other_process() -> None:
    seen = []
    with fastconv.set_precision("ieee"):
        thread = threading.Thread(target=lambda: seen.append(policy(torch.float32, "cpu")))
        thread.start()
        thread.join()
        code = "import fastconv; print(fastconv.get_precision())"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert seen == [Policy(torch.float32, direct=True)]
    assert run.stdout.strip() == "fast", run.stderr


def test_it_is_read_when_an_operator_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noting(launcher: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            seen.extend(a.direct for a in args if isinstance(a, Policy))
            return launcher(*args, **kwargs)

        return launch

    for name in ("conv2d", "conv2d_backward"):
        monkeypatch.setattr(aten, name, noting(getattr(aten, name)))
    x, weight = (torch.randn(2, 4, 6, 6, requires_grad=True) for _ in range(2))
    with fastconv.use_backend("aten"):
        y = FC.conv2d(x, weight)
        with fastconv.set_precision("ieee"):
            y.sum().backward()
            FC.conv2d(x, weight)
    assert seen == [False, True, True]


class TestTorchsSwitch:
    """torch's own convolutions under a direct policy: their switch for float32 is off for just as long."""

    @pytest.fixture(autouse=True)
    def _restored(self) -> Iterator[None]:
        switches = torch.backends.cudnn.conv, torch.backends.mkldnn.conv
        before = [switch.fp32_precision for switch in switches]
        yield
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision

    @pytest.mark.parametrize("backend", [aten, native], ids=lambda backend: backend.NAME)
    def test_on_a_cpu(self, backend: Any) -> None:
        if backend is native and native.unavailable() is not None:
            pytest.skip(str(native.unavailable()))
        switch = torch.backends.mkldnn.conv
        switch.fp32_precision = "bf16"
        g = conv(batch=1, channels=32, size=8)
        x, weight, grad = (torch.randn(shape) for shape in (g.input_shape, g.weight_shape, g.output_shape))
        direct, wide = Policy(torch.float32, direct=True), Policy(torch.float64)

        def results(backend: Any, policy: Policy, *operands: Tensor) -> list[Tensor]:
            x, weight, grad = operands
            return [
                backend.conv2d(x, weight, None, None, g, policy, relu=True),
                backend.conv2d_input_grad(grad, weight, g, policy),
                backend.conv2d_weight_grad(grad, x, g, policy),
                *backend.conv2d_backward(grad, x, weight, g, policy),
            ]

        exact = results(aten, wide, x.double(), weight.double(), grad.double())
        for actual, expected in zip(results(backend, direct, x, weight, grad), exact, strict=True):
            assert_close(actual, expected, torch.float32, 9 * 32)
        assert switch.fp32_precision == "bf16"

    @pytest.mark.parametrize("device_type", ["cpu", "cuda"])
    def test_it_is_off_inside_and_as_before_outside(self, device_type: str) -> None:
        switch = (torch.backends.mkldnn if device_type == "cpu" else torch.backends.cudnn).conv
        direct = Policy(torch.float32, direct=True)
        for before in ("tf32", "ieee", "none"):
            switch.fp32_precision = before
            resolved = switch.fp32_precision
            with pytest.raises(KeyError), torchs_convolution(direct, device_type):
                with torchs_convolution(direct, device_type):
                    assert switch.fp32_precision in ("ieee", "none")
                assert switch.fp32_precision in ("ieee", "none")
                raise KeyError
            assert switch.fp32_precision == resolved
            with torchs_convolution(FP32, device_type):
                assert switch.fp32_precision == resolved

    def test_threads_that_overlap_put_it_back(self) -> None:
        switch = torch.backends.cudnn.conv
        switch.fp32_precision = "tf32"
        one, other = (torchs_convolution(Policy(torch.float32, direct=True), "cuda") for _ in range(2))
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert switch.fp32_precision == "ieee", "the other one is not done"
        other.__exit__(None, None, None)
        assert switch.fp32_precision == "tf32"

    def test_cudnns_fused_kernel_is_run_without_tf32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        switch = torch.backends.cudnn.conv
        switch.fp32_precision = "tf32"
        seen = []
        monkeypatch.setattr(torch.backends.cudnn, "conv", switch, raising=False)
        monkeypatch.setattr(cudnn, "fuses", lambda *args: True)
        monkeypatch.setattr(cudnn, "conv2d_relu", lambda *args: seen.append(switch.fp32_precision))
        monkeypatch.setattr(aten, "torchs_convolution", lambda policy, kind: torchs_convolution(policy, "cuda"))
        g = conv(batch=1, channels=8, size=4)
        x, weight = (torch.randn(s).to(memory_format=torch.channels_last) for s in (g.input_shape, g.weight_shape))
        for arithmetic in (FP32, Policy(torch.float32, direct=True)):
            aten.conv2d(x, weight, None, None, g, arithmetic, relu=True)
        assert seen == ["tf32", "ieee"]


@pytest.mark.usefixtures("cache")
class TestTables:
    direct = BF16._replace(direct=True)

    def test_an_entry_serves_both_precisions(self) -> None:
        modelled = pick(*call())
        put(entry(call(), modelled[-1], ATEN))
        for g in (conv(), conv(batch=40)):
            assert pick(*call(g, policy=self.direct)) == pick(*call(g))
            assert tuning.explain(*call(g, policy=self.direct)) == tuning.explain(*call(g))
        assert "measured" in tuning.explain(*call(policy=self.direct))

    def test_of_an_entry_whose_winner_transforms_the_fastest_direct_candidate_serves(self) -> None:
        slower, slowest = [c for c in pick(*call()) if c != ATEN][-2:]
        measured = entry(call(), WINOGRAD, slower, ATEN, slowest)
        (found,) = _lookup(measured, call(policy=self.direct))
        assert found.candidate == slower
        assert found.seconds == 3e-5
        put(measured)
        assert pick(*call(policy=self.direct))[:3] == (slower, ATEN, slowest)
        assert tuning.explain(*call(policy=self.direct)).startswith(f"table: measured {slower} 30 µs")
        assert pick(*call(conv(batch=40), policy=self.direct))[0] == slower
        assert tuning.explain(*call()).startswith("cost model"), "under 'fast' an entry is passed over whose winner is gone"

    def test_an_entry_without_direct_candidates_is_passed_over(self) -> None:
        assert _lookup(entry(call(), WINOGRAD), call(policy=self.direct)) == []

    def test_only_what_was_measured_under_fast_is_written(self) -> None:
        with pytest.raises(ValueError, match=r"measured under set_precision\('fast'\), got one of .* \(direct\)$"):
            put(entry(call(policy=self.direct), ATEN))
        assert not tables.user_file(CHIP).exists()

    def test_tune_measures_under_fast(self) -> None:
        x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
        weight = torch.randn(8, 8, 3, 3)

        def step() -> None:
            FC.conv2d(x, weight)
            with fastconv.set_precision("ieee"):
                FC.conv2d_relu(x, weight)

        with fastconv.set_precision("ieee"):
            calls = tune.observe(step)
            assert fastconv.get_precision() == "ieee"
        assert [(c.op, c.policy) for c in calls] == [("conv2d", FP32)]


def _lookup(measured: tables.Entry, of: tuning.Call) -> list[tables.Entry]:
    found = tables.Table([measured]).lookup(of, pick(*of))
    return [] if found is None else [found]


@pytest.mark.usefixtures("cache")
def test_a_direct_call_says_so_in_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastconv.backends, "_noted", set())
    caplog.set_level(logging.INFO, "fastconv")
    with fastconv.set_precision("ieee"):
        FC.conv2d(torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3))
    assert "float32 (direct) on cpu" in caplog.text
