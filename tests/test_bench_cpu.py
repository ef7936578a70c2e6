"""The CPU benchmark: what it measures passes its gates, what is wrong gets no record, and records are what they say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import cases, cpu, layer_trials, measure, memory, net_trials
from benchmarks.cases import LayerCase, Net
from benchmarks.measure import Effort
from fastconv import nn as fast
from fastconv.backends import native
from fastconv.bench import gate, records
from fastconv.bench.audit import Audit
from fastconv.bench.layers import Layer
from fastconv.models import recipe_net

EFFORT = Effort(3, 0.01)
MACHINE = records.machine(torch.device("cpu"))
NET = Net("recipe_net", lambda layers: recipe_net(16, width=8, max_width=16, layers=layers), 4, 16)
LAYER = LayerCase(Layer(8, 16, 10, pool=True), 2)
ALL = ("forward", "input_grad", "weight_grad", "both")

needs_library = pytest.mark.skipif(native.unavailable() is not None, reason="needs the compiled library")


def measured(trial: measure.Trial) -> measure.Result:
    return measure.measure(trial, EFFORT, MACHINE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16_autocast"])
@pytest.mark.parametrize("is_step", [False, True], ids=["forward", "step"])
def test_nets(is_step: bool, dtype: str) -> None:
    result = measured(net_trials.trial(NET, dtype, is_step))
    assert not result.refused and set(result.records) == set(net_trials.providers(NET, is_step))
    record = result.records["fastconv"]
    assert (record.suite, record.direction) == (("training", "step") if is_step else ("models", "forward"))
    assert 0 < record.rms_error <= record.max_error
    assert result.records["eager_channels_last"].over_eager == 1.0
    lines = measure.lines(result)
    assert len(lines) == len([name for name in result.records if name.startswith("fastconv")]) >= 1
    assert all("recipe_net R=16 batch 4" in line and dtype in line and "×" in line for line in lines)


@pytest.mark.parametrize("build", [cases.nets.alexnet, cases.nets.resnet18], ids=["alexnet", "resnet18"])
def test_both_sides_of_other_nets_are_one_net(build: Any) -> None:
    ours, theirs = build("fastconv"), build("torch")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 96, 96) if build is cases.nets.resnet18 else torch.randn(1, 3, 224, 224)
    with Audit() as audit:
        result = ours(x)
    assert audit.wrong is None and audit.calls >= 5
    reductions = net_trials._reductions(theirs)
    assert gate.errors(result, theirs.double()(x.double()))[1] <= gate.net_bounds(torch.float32, reductions)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "NCHW"])
def test_layers(channels_last: bool, dtype: str) -> None:
    case = dataclasses.replace(LAYER, channels_last=channels_last)
    results = [measured(trial) for trial in layer_trials.trials("layers", case, dtype, ALL)]
    assert [result.trial.direction for result in results] == list(ALL)
    assert not any(result.refused for result in results)
    assert {"fastconv", "eager_channels_last" if channels_last else "eager_nchw"} == set(results[0].records)


def test_a_first_layer_has_no_input_grad() -> None:
    case = LayerCase(Layer(3, 8, 12, pool=False), 2)
    directions = [trial.direction for trial in layer_trials.trials("layers", case, "float32", ALL)]
    assert directions == ["forward", "weight_grad", "both"]


def _nudged(results: Tensor | tuple[Tensor, ...]) -> Any:
    """Results that are off by a thousandth, as a kernel's that loses terms are."""
    if isinstance(results, Tensor):
        return results * 1.001
    return tuple(t * 1.001 if t is not None and t.is_floating_point() else t for t in results)


# What a wrong kernel spoils: launchers of the backend that serves channels_last operands.
@needs_library
@pytest.mark.parametrize("launcher", ["conv2d_relu_max_pool2d", "conv2d_backward", "conv2d_backward_relu", "relu_backward"])
def test_a_wrong_kernel_gets_no_record(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    right = getattr(native, launcher)
    monkeypatch.setattr(native, launcher, lambda *args, **kwargs: _nudged(right(*args, **kwargs)))
    result = measured(net_trials.trial(NET, "float32", True))
    assert set(result.records) == {"eager_channels_last"}
    assert "maximum error" in result.refused["fastconv"]
    assert any("has no time" in line for line in measure.lines(result))


@needs_library
def test_a_wrong_layer_gets_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in ("conv2d_relu_max_pool2d", "conv2d_input_grad", "conv2d_weight_grad"):
        right = getattr(native, launcher)
        monkeypatch.setattr(native, launcher, lambda *args, right=right: _nudged(right(*args)))
    for trial in layer_trials.trials("layers", LAYER, "float32", ALL):
        assert set(measured(trial).refused) == {"fastconv"}, trial.direction


@needs_library
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_pixels_that_no_window_reaches_are_no_measure_of_the_others(stride: int) -> None:
    conv = fast.Conv2d(64, 256, 1, stride=stride)
    with Audit() as audit:
        conv(torch.randn(4, 64, 56, 56, requires_grad=True)).square().sum().backward()
    assert audit.wrong is None and audit.calls == 3


def test_codes_are_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.max_pool2d

    def wrong(*args: Any, **kwargs: Any) -> Any:
        output, code = right(*args, **kwargs)
        return output, code % 4 + 1

    monkeypatch.setattr(native, "max_pool2d", wrong)
    x = torch.randn(2, 8, 8, 8).to(memory_format=torch.channels_last)
    with Audit() as audit:
        torch.ops.fastconv.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False, True, "native")
    assert audit.wrong is not None and "winners" in audit.wrong


def test_a_lost_gradient_is_found() -> None:
    trial = net_trials.trial(NET, "float32", True)

    class Lossy(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.conv(x).detach() * 1.0 + self.conv(x) * 0.0
            return result

    exact = NET.build("torch").double()
    model = NET.build("torch").double()
    model.load_state_dict(exact.state_dict())
    features = model.get_submodule("features")
    features[2] = Lossy(features[2])
    x = torch.randn(4, 3, 16, 16).double()
    for net in (exact, model):
        net(x).square().sum().backward()
    verdict = net_trials._gradients(model, exact, gate.net_bounds(torch.float32, net_trials._reductions(exact))[1])
    assert verdict.wrong is not None and "gradient of" in verdict.wrong
    assert trial.calls


def test_a_failing_provider_is_told() -> None:
    def fails() -> None:
        raise RuntimeError("no compiler\nand more")

    (trial, *_) = layer_trials.trials("layers", LAYER, "float32", ("forward",))
    check = trial.check
    trial.calls["compile_default"] = fails
    trial.check = lambda name: check(name) if name != "compile_default" else fails()  # type: ignore[assignment, return-value]
    result = measured(trial)
    assert result.refused == {"compile_default": "RuntimeError: no compiler"}
    assert set(result.records) == {"fastconv", "eager_channels_last"}


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cases, "QUICK_NETS", (NET,))
    monkeypatch.setattr(cases, "QUICK_LAYERS", (LAYER,))
    monkeypatch.setattr(cases, "QUICK_SCALING", (LAYER,))
    monkeypatch.setattr(cpu, "_QUICK", dict.fromkeys(cpu.SUITES, EFFORT))
    assert cpu.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(suite in printed for suite in cpu.SUITES) and "has no time" not in printed
    for suite in cpu.SUITES:
        found = records.read(tmp_path / MACHINE.folder / f"{suite}.json")
        assert found and all(record.suite == suite and record.gate_passed for record in found)
    # What is measured again takes the place of what was; the rest stays.
    assert cpu.main(["--quick", "--out", str(tmp_path), "--suite", "models", "--dtype", "bfloat16"]) == 0
    again = records.read(tmp_path / MACHINE.folder / "models.json")
    assert sorted({record.dtype for record in again}) == ["bfloat16", "float32"] and len(again) == 6


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["fastconv", "eager_channels_last"])
def test_peak_memory(provider: str) -> None:
    (net,) = cases.QUICK_NETS
    parameters = sum(p.numel() * 4 for p in net.build("torch").parameters())
    peak = memory.peak(net, "float32", provider)
    assert 2 * parameters <= peak < 2 * parameters + 500 * 2**20  # gradients, momenta, and maps


@pytest.mark.slow
def test_compiled_providers() -> None:
    net = dataclasses.replace(NET, is_compiled=True)
    for is_step in (False, True):
        trial = net_trials.trial(net, "float32", is_step)
        result = measured(trial)
        trial.close()
        assert not result.refused and "compile_default" in result.records
        assert ("compile_freezing" in result.records) is not is_step


def test_lists() -> None:
    """The recipe nets' layers by hand; every case has a name of its own."""
    names = [case.case for case in cases.LAYERS]
    assert names[:3] == ["3-64@32 3x3/1 batch 64", "64-64@32 3x3/1+pool batch 64", "64-128@16 3x3/1 batch 64"]
    assert "3-64@224 7x7/2+pool batch 8" in names and "512-512@7 3x3/1 batch 8" in names
    assert len(names) == len(set(names)) == 17
    assert len({case.case for case in cases.SCALING}) == len(cases.SCALING) == 16
    assert len({(net.case, dtype) for net in cases.NETS for dtype in net.dtypes}) == sum(len(n.dtypes) for n in cases.NETS)


def _record(**changes: Any) -> records.Record:
    times = {"median_ms": 2.0, "q20_ms": 1.5, "q80_ms": 2.5, "runs": 9}
    gains = {"over_eager": 1.25, "over_eager_q20": 1.0, "over_eager_q80": 1.5}
    what = {"suite": "models", "case": "net", "direction": "forward", "dtype": "float32", "provider": "fastconv"}
    found = {"gate_passed": True, "max_error": 1e-6, "rms_error": 1e-7, "peak_bytes": None}
    return records.Record(**{**what, **times, **gains, **found, **dataclasses.asdict(MACHINE), **changes})


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "chip" / "models.json"
    first, second = _record(), _record(provider="eager_channels_last", peak_bytes=7)
    records.write(path, [first, second], whole=True)
    assert records.read(path) == [first, second]
    (row, _) = json.loads(path.read_text(encoding="utf-8"))
    wanted = "suite case direction dtype provider median_ms q20_ms q80_ms gate_passed max_error rms_error peak_bytes"
    assert {*wanted.split(), "chip", "driver", "torch", "triton", "cudnn", "commit", "date"} <= set(row)
    assert row["chip"] == MACHINE.chip and row["cudnn"] is None and row["torch"] == torch.__version__
    other = _record(case="another")
    records.write(path, [other], whole=False)
    records.write(path, [_record(median_ms=2.1)], whole=False)
    assert [(r.case, r.median_ms) for r in records.read(path)] == [("another", 2.0), ("net", 2.1)]
    records.write(path, [other], whole=True)
    assert records.read(path) == [other]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gate_passed": False}, "did not pass its gate"),
        ({"suite": "speed"}, "suite must be one of"),
        ({"direction": "sideways"}, "direction must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"provider": "somebody"}, "unknown provider"),
        ({"q20_ms": 3.0}, "not in order"),
    ],
)
def test_what_is_no_record(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _record(**changes)


def test_what_is_no_file_of_records(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    for text, message in (("{}", "a list of records is wanted"), ('[{"suite": "models"}]', "missing"), ("[", "Expecting")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            records.read(path)
