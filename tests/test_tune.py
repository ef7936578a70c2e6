"""`fastconv tune`: every call of a step is measured, what is wrong is refused, and later processes read the result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tuned import BF16, FP32

import fastconv
from fastconv import backends, tuning
from fastconv.backends import aten, native
from fastconv.bench import tune
from fastconv.cli import arguments, main
from fastconv.geometry import ConvGeometry, PoolGeometry, global_pool, single_elements
from fastconv.precision import Policy
from fastconv.tuning import Call, Candidate, cpu, tables
from fastconv.tuning.calls import CONVOLUTIONS, PASSES
from fastconv.tuning.candidates import ATEN, NATIVE

pytestmark = pytest.mark.usefixtures("cache")

CPU = torch.device("cpu")
SHAPE = (2, 16, 9, 8)
NET = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 2))

def number():
    return 7
"""


def _geometry(op: str, direction: str) -> ConvGeometry | PoolGeometry:
    one, pad = (1, 1), (1, 1)
    if (op, direction) in CONVOLUTIONS:  # of stride 2, for which the native backend has but one algorithm
        return ConvGeometry.of(op, SHAPE, (24, 16, 3, 3), None, (2, 2), pad, one, 1)
    if op in ("conv2d", "relu"):
        return single_elements(op, SHAPE)
    if op == "global_avg_pool2d":
        return global_pool(op, SHAPE)
    return PoolGeometry.of(op, SHAPE, (3, 3), (2, 2), pad, one, False)


def _call(op: str = "conv2d_relu", direction: str = "forward", policy: Policy = FP32, last: bool = True) -> Call:
    return Call(op, direction, _geometry(op, direction), policy, backends.chip("cpu"), last)


@pytest.mark.parametrize(
    ("policy", "channels_last"), [(FP32, True), (FP32, False), (BF16, True), (Policy(torch.float16), True)]
)
@pytest.mark.parametrize(("op", "direction"), [*CONVOLUTIONS, *PASSES])
def test_every_call_is_measured(op: str, direction: str, policy: Policy, channels_last: bool) -> None:
    measurement = tune.measure(_call(op, direction, policy, channels_last), CPU, 1e-3, rounds=1)
    assert measurement.rejected == {}
    assert set(measurement.timings) == {NATIVE, ATEN}
    assert measurement.winner in measurement.timings
    entry = measurement.entry()
    assert entry is not None
    assert set(entry.medians()) == {NATIVE, ATEN}
    gain = measurement.gain()
    assert gain is not None
    if measurement.winner == ATEN:
        assert gain.runs == (1.0,)


@pytest.mark.parametrize("policy", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("op", "direction"), CONVOLUTIONS)
@pytest.mark.parametrize("channels", [3, 24])
def test_every_algorithm_of_the_native_backend_is_measured(channels: int, op: str, direction: str, policy: Policy) -> None:
    g = ConvGeometry.of(op, (2, channels, 12, 9), (24, channels, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
    call = Call(op, direction, g, policy, backends.chip("cpu"), True)
    measurement = tune.measure(call, CPU, 1e-3, rounds=1)
    assert measurement.rejected == {}
    kernels = [candidate.kernel for candidate in measurement.timings if candidate.backend == "native"]
    assert sorted(kernels) == sorted(cpu.algorithms(direction, g, policy)) and len(kernels) == 2


@pytest.mark.parametrize("op_direction", CONVOLUTIONS, ids=" ".join)
@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (3, 1), (16, 4), (16, 16)])
def test_the_gate_passes_every_family_of_kernels(channels: int, groups: int, op_direction: tuple[str, str]) -> None:
    """In Triton's interpreter, whose candidates a CPU's search does not list."""
    op, direction = op_direction
    weight = (16, channels // groups, 3, 3)
    g = ConvGeometry.of(op, (2, channels, 8, 6), weight, None, (1, 1), (1, 1), (1, 1), groups)
    call = Call(op, direction, g, FP32, "interpreter", True)
    right, rejected = tune._gated(call, tune.PROBLEMS[op_direction](call, CPU))
    assert rejected == {}
    found = {candidate.kernel for candidate in right}
    special = {(16, 1): "tma", (3, 1): "first", (16, 4): "pointer", (16, 16): "depthwise"}[channels, groups]
    assert found >= {"pointer", ""}
    assert special in found or (special, direction) == ("first", "input_grad")


def _off(launcher: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: launcher(*args, **kwargs) * 1.01


def _first_off(launcher: Callable[..., tuple[Tensor, object]]) -> Callable[..., tuple[Tensor, object]]:
    def launch(*args: object) -> tuple[Tensor, object]:
        first, second = launcher(*args)
        return first * 1.01, second

    return launch


def _shifted(launcher: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right maxima, and codes of other windows."""

    def launch(*args: object) -> tuple[Tensor, Tensor]:
        output, code = launcher(*args)
        return output, code.roll(1, 3)

    return launch


def _raising(launcher: object) -> Callable[..., Tensor]:
    def launch(*args: object, **kwargs: object) -> Tensor:
        raise MemoryError("out of resource: shared memory")

    return launch


def _stale(launcher: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An element that nobody wrote."""

    def launch(*args: object, **kwargs: object) -> Tensor:
        output = launcher(*args, **kwargs)
        output[0, 0, 0, 0] = float("nan")
        return output

    return launch


@pytest.mark.parametrize(
    ("op", "direction", "name", "fault", "reason"),
    [
        ("conv2d_relu", "forward", "conv2d", _off, "error"),
        ("conv2d_relu", "forward", "conv2d", _stale, "not finite"),
        ("conv2d_relu", "forward", "conv2d", _raising, "MemoryError: out of resource: shared memory"),
        ("conv2d", "input_grad", "conv2d_input_grad", _off, "error"),
        ("conv2d_relu", "input_grad", "conv2d_input_grad_relu", _first_off, "error"),
        ("conv2d", "weight_grad", "conv2d_weight_grad", _off, "error"),
        ("relu_max_pool2d", "forward", "max_pool2d", _shifted, "winners: "),
        ("conv2d_relu_max_pool2d", "forward", "conv2d_relu_max_pool2d", _shifted, "winners: "),
    ],
)
def test_a_wrong_kernel_is_refused(
    op: str, direction: str, name: str, fault: Callable[..., object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is left to be timed")

    monkeypatch.setattr(native, name, fault(getattr(native, name)))
    monkeypatch.setattr(tune, "compare", never)
    measurement = tune.measure(_call(op, direction), CPU, 1e-3)
    assert list(measurement.rejected) == [NATIVE]
    assert reason in measurement.rejected[NATIVE]
    assert measurement.winner is None
    assert measurement.entry() is None


def test_a_lead_too_small_to_last_is_not_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(native_seconds: float) -> Candidate | None:
        seconds = {"native": native_seconds, "aten": 1e-3}
        timings = {name: tune.Timing((value,) * 3) for name, value in seconds.items()}
        monkeypatch.setattr(tune, "compare", lambda calls, **_: {name: timings[name] for name in calls})
        return tune.measure(_call(), CPU, 1e-3).winner

    assert tuning.pick(*_call())[0] == NATIVE
    assert [measured(s) for s in (0.5e-3, 1.01e-3, 1.03e-3)] == [NATIVE, NATIVE, ATEN]


def _net_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_net.py"
    path.write_text(NET)
    return path


def test_tune_end_to_end(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--input", "2x4x8x8", "--dtype", "bfloat16", "--budget", "0.01"]
    assert main(["tune", "--model", f"{_net_file(tmp_path)}:net", *arguments]) == 0
    printed = capsys.readouterr().out
    path = tables.user_file(backends.chip("cpu"))
    assert path.parent == cache
    content = json.loads(path.read_text())
    entries = tables.read(path, backends.chip("cpu"))
    assert f"{len(entries)} entries written: {path}" in printed
    assert {entry["dtype"] for entry in content["entries"]} == {"bfloat16"}
    assert content["written_by"]["torch"] == torch.__version__
    kinds = {(e.call.op, e.call.direction) for e in entries}
    assert kinds >= {("conv2d_relu_max_pool2d", "forward"), ("conv2d_relu", "forward"), ("conv2d", "weight_grad")}
    for entry in entries:
        assert f"{entry.call}: 1×, {entry.candidate}, " in printed

    # Another process of the same user picks what was measured, and says so.
    code = """
import torch
from fastconv import backends, tuning
from fastconv.tuning import tables
chip = backends.chip("cpu")
for entry in tables.read(tables.user_file(chip), chip):
    assert tuning.pick(*entry.call)[0] == entry.candidate
    assert tuning.explain(*entry.call).startswith(f"table: measured {entry.candidate} ")
print(len(tables.load(chip)))
"""
    root = Path(fastconv.__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.stdout.strip() == str(len(entries)), run.stderr

    assert main(["info"]) == 0
    assert f"{path}: {len(entries)} entries" in capsys.readouterr().out


def test_tune_measures_built_in_models_into_a_named_table(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "shipped.json"
    arguments = ["--device", "cpu", "--input", "1x3x4x4", "--budget", "0.01", "--out", str(out)]
    assert main(["tune", *arguments]) == 0
    found = {e.call: e for e in tables.read(out, backends.chip("cpu"))}
    assert found
    assert {call.policy.dtype for call in found} == {torch.float32}
    assert not cache.exists(), "only the named file"
    assert main(["tune", *arguments]) == 0
    assert {e.call for e in tables.read(out, backends.chip("cpu"))} == set(found), "entries are replaced"


def test_results_are_kept_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after minutes of measuring must not lose them."""
    path = tmp_path / "table.json"
    calls = tune.Counter([_call(), _call("conv2d", "weight_grad")])
    measurements = tune.tune(calls, CPU, path, budget=0.01, rounds=1)
    next(measurements)
    assert [e.call for e in tables.read(path, backends.chip("cpu"))] == [_call()]
    next(measurements)
    assert len(tables.read(path, backends.chip("cpu"))) == 2


def test_a_search_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> tuple[int, int]:
        """Status, and how many calls were measured."""
        status = main(["tune", "--model", f"{_net_file(tmp_path)}:net", *arguments, *options])
        return status, capsys.readouterr().out.count("×, ")

    arguments = ["--device", "cpu", "--input", "2x4x8x8", "--budget", "0.01", "--resume"]
    path, chip = tables.user_file(backends.chip("cpu")), backends.chip("cpu")
    assert run("--seconds", "1e-9") == (3, 1)
    first = tables.read(path, chip)
    status, measured = run()
    entries = tables.read(path, chip)
    assert status == 0 and len(first) == 1 and set(first) <= set(entries), "what was there stays as it was"
    assert measured == len(entries) - 1 > 1
    assert run() == (0, 0)
    monkeypatch.setattr(tune.sources, "digest", lambda: "other")
    assert run() == (0, len(entries)), "other sources' measurements are none of these"


def test_a_search_that_is_stopped_is_effective(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"native": 2e-3, "aten": 1e-3}
    monkeypatch.setattr(tune, "compare", lambda calls, **_: {name: tune.Timing((seconds[name],) * 3) for name in calls})
    calls = tune.Counter([_call(), _call("conv2d", "weight_grad")])
    assert tuning.pick(*_call())[0] == NATIVE
    measurements = tune.tune(calls, CPU, tables.user_file(backends.chip("cpu")), budget=0.01)
    next(measurements)
    measurements.close()
    assert tuning.pick(*_call())[0] == ATEN


def test_a_call_without_an_exact_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float64 operands, which need the most memory of all."""
    conv2d = aten.conv2d

    def full(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if x.dtype == torch.float64:
            raise torch.OutOfMemoryError("out of memory")
        return conv2d(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(aten, "conv2d", full)
    measurement = tune.measure(_call(), CPU, 1e-3)
    assert measurement.rejected.keys() == {NATIVE, ATEN}
    assert all("float64" in reason and "out of memory" in reason for reason in measurement.rejected.values())
    assert measurement.entry() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "3x32x32"], "--input: must be NxCxHxW, four integers from 1 on, such as 8x3x32x32; got '3x32x32'"),
        (["--input", "0x3x32x32"], "--input: must be NxCxHxW"),
        (["--model", "resnet18"], "--model: no net is named 'resnet18'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--budget", "0"], "--budget: must be a positive number of seconds, got '0'"),
        (["--budget", "soon"], "--budget: must be a positive number of seconds, got 'soon'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_arguments_that_are_none(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tune", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("missing.py:net", [], "missing.py is not a Python file"),
        ("my_net.py:absent", [], "my_net.py has no callable 'absent'"),
        ("my_net.py:number", [], "must return a torch.nn.Module, got int"),
        ("my_net.py:plain", [], "a training step of it calls none of fastconv's operators"),
        ("recipe", ["--input", "2x3x32x16"], "--model recipe, --input 2x3x32x16: takes square images"),
        ("vgg16", ["--input", "2x3x16x16"], "--model vgg16, --input 2x3x16x16: vgg16: resolution must be at least 32"),
        ("recipe", ["--device", "meta"], "--device meta: allowed: auto, cpu, cuda"),
    ],
)
def test_models_that_cannot_be_tuned(
    model: str, options: list[str], message: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _net_file(tmp_path)
    model = f"{tmp_path / model}" if ".py" in model else model
    assert main(["tune", "--model", model, "--device", "cpu", "--input", "2x4x8x8", *options]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fastconv tune: ")
    assert message in line
    assert not cache.exists()


@pytest.mark.parametrize(
    ("model", "shape"),
    [("recipe", (8, 3, 32, 32)), ("lenet5", (8, 1, 28, 28)), ("vgg16", (8, 3, 32, 32)), ("alexnet", (8, 3, 224, 224))],
)
def test_the_usual_batch_suits_the_net(model: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("fastconv.cli.tune._observe", lambda *arguments: seen.append(arguments[:2]) or {})
    assert main(["tune", "--model", model, "--device", "cpu", "--resume"]) == 0
    assert seen == [(model, shape)]
    arguments.model(model, shape)


def test_a_foreign_table_is_found_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    tables.write(out, "NVIDIA A100 sm_80", [])
    before = out.read_text()
    assert main(["tune", "--device", "cpu", "--input", "1x3x4x4", "--out", str(out)]) == 1
    assert "it was measured on 'NVIDIA A100 sm_80'" in capsys.readouterr().err
    assert out.read_text() == before
