"""What `fastconv bench` measures passes its gates, what is wrong gets no record, and a run goes on where it was stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_bench import CPU, EAGER, EFFORT, LAYER, LISTS, MACHINE, NET, POOL, small  # noqa: F401
from torch import Tensor, nn

import fastconv
from fastconv import functional, reference
from fastconv import nn as fast
from fastconv.backends import aten, native
from fastconv.bench import gate, records, roofline, trial
from fastconv.bench.audit import Audit
from fastconv.bench.suites import cases, layer_trials, layers, memory, net_trials, nets, overhead, pool_trials, run
from fastconv.bench.suites.cases import LayerCase, PoolCase
from fastconv.bench.suites.layers import Layer
from fastconv.bench.suites.run import Selection

ALL = ("forward", "backward", "both", "input_grad", "weight_grad")

needs_library = pytest.mark.skipif(native.unavailable() is not None, reason="needs the compiled library")


def measured(ready: trial.Trial) -> trial.Result:
    with trial.arithmetic(ready.dtype, "cpu"):
        return trial.measure(ready, EFFORT, MACHINE, roofline.Rates(1e10, 1e11))


def layer_trials_of(
    case: LayerCase, dtype: str = "float32", directions: tuple[str, ...] = ALL, suite: str = "layers"
) -> Any:
    return layer_trials.trials(suite, case, dtype, CPU, directions, EAGER)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16_autocast"])
@pytest.mark.parametrize("is_step", [False, True], ids=["forward", "step"])
def test_nets(is_step: bool, dtype: str) -> None:
    result = measured(net_trials.trial(NET, dtype, is_step, CPU))
    assert not result.refused and set(result.records) == set(net_trials.providers(NET, is_step, "cpu"))
    record = result.records["fastconv"]
    assert (record.suite, record.direction) == (("training", "step") if is_step else ("models", "forward"))
    assert 0 < record.rms_error <= record.max_error
    fastest = record.fastest_stock
    assert fastest in ("eager_channels_last", "eager_nchw") and result.records[fastest].over_stock == 1.0
    assert (record.flops or 0) > 0 and record.bytes is None and (record.roofline_percent or 0) > 0
    assert (record.saved_bytes is not None) is is_step
    lines = trial.lines(result)
    assert len(lines) == len([name for name in result.records if name.startswith("fastconv")]) >= 1
    assert all("recipe_net R=16 batch 4" in line and dtype in line and "×" in line for line in lines)


@pytest.mark.parametrize("build", [nets.alexnet, nets.resnet18], ids=["alexnet", "resnet18"])
def test_both_sides_of_other_nets_are_one_net(build: Any) -> None:
    ours, theirs = build("fastconv"), build("torch")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 96, 96) if build is nets.resnet18 else torch.randn(1, 3, 224, 224)
    with Audit() as audit:
        result = ours(x)
    assert audit.wrong is None and audit.calls >= 5
    reductions = net_trials._reductions(theirs)
    assert gate.errors(result, theirs.double()(x.double()))[1] <= gate.net_bounds(torch.float32, reductions)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "NCHW"])
def test_layers(channels_last: bool, dtype: str) -> None:
    case = dataclasses.replace(LAYER, channels_last=channels_last)
    results = [measured(ready) for ready in layer_trials_of(case, dtype)]
    assert [result.trial.direction for result in results] == list(ALL)
    assert not any(result.refused for result in results)
    stock = {"eager_channels_last", "eager_nchw"} if channels_last else {"eager_nchw"}
    assert set(results[0].records) == {"fastconv", *stock}
    by_direction = {result.trial.direction: result.records["fastconv"] for result in results}
    assert by_direction["both"].saved_bytes and by_direction["forward"].saved_bytes is None
    assert by_direction["both"].flops == 3 * by_direction["forward"].flops  # type: ignore[operator]


@pytest.mark.parametrize(
    "layer", [Layer(3, 8, 12, pool=2, kernel=7, stride=2), Layer(16, 8, 10), cases.RESNET50[0]], ids=str
)
def test_layers_pass_their_gate(device: str, layer: Layer) -> None:
    """Both sides, and both ways of computing float64: in one piece and image by image."""
    for dtype in (torch.float32, torch.bfloat16):
        held = layers.untied(layer, *layers.operands(layer, 2, dtype, torch.device(device)))
        exact = layers.both_exact(layer, *held)
        for module in (functional, reference):
            wrong, largest, rms = layers.check(layers.run_by(module, layer), layer, held, exact)
            assert wrong is None and 0 < rms <= largest < 1


def test_float64_in_parts_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(4, 6, 9, pool=3, pool_padding=1)
    held = layers.untied(layer, *layers.operands(layer, 5, torch.float32, CPU))
    whole = layers.both_exact(layer, *held)
    monkeypatch.setattr(layers, "_CHUNK", 2 * 6 * 81)
    assert len(list(layers._chunks(layer, 5))) == 3
    torch.testing.assert_close(layers.both_exact(layer, *held), whole)
    torch.testing.assert_close(layers.untied(layer, *held), held)


def test_work_of_a_layer() -> None:
    """By hand: 2 images of 8×10×10 to 16×5×5, in four bytes; what is pooled has a byte for its winner."""
    work = {direction: LAYER.layer.work(2, direction, 4) for direction in ("forward", "backward", "both")}
    x, weight, bias, output, products = 1600, 1152, 16, 800, 2 * 2 * 16 * 100 * 72
    assert work["forward"] == (products, 4 * (x + weight + bias + output))
    assert work["backward"] == (2 * products, 4 * (output + x + weight + bias + x + weight) + output)
    assert work["both"] == (3 * products, work["forward"].bytes + work["backward"].bytes + output)
    first = Layer(3, 8, 12).work(1, "both", 4)
    assert first.flops == 2 * 2 * 8 * 144 * 27
    assert roofline.Rates(copy=100.0, matmul=10.0).seconds(50, 200) == 5.0
    assert roofline.Rates(copy=10.0, matmul=10.0).seconds(None, 200) == 20.0


def test_roofline_is_measured() -> None:
    assert 1e8 < roofline.copy_rate(CPU) < 1e13
    assert 1e8 < roofline.matmul_rate(torch.float32, CPU) < 1e15


def test_a_first_layer_has_no_input_grad() -> None:
    case = LayerCase(Layer(3, 8, 12), 2)
    assert [ready.direction for ready in layer_trials_of(case)] == ["forward", "backward", "both", "weight_grad"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        POOL,
        PoolCase("max_pool2d", 8, 13, 2, (3, 2, 1)),
        PoolCase("avg_pool2d", 8, 10, 2, (2, 2, 0)),
        PoolCase("global_avg_pool2d", 16, 7, 2),
    ],
    ids=lambda case: case.op,
)
def test_pools(case: PoolCase, dtype: str) -> None:
    results = [measured(ready) for ready in pool_trials.trials(case, dtype, CPU, run._DIRECTIONS, EAGER)]
    assert [result.trial.direction for result in results] == ["forward", "backward", "both"]
    for result in results:
        assert not result.refused and set(result.records) == set(EAGER)
        assert all((record.bytes or 0) > 0 and record.flops is None for record in result.records.values())


def test_overhead_is_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    launched: list[str] = []
    for backend in (native, aten):
        for name in overhead._LAUNCHERS:
            launcher = getattr(backend, name)
            monkeypatch.setattr(backend, name, lambda *a, f=launcher, **k: (launched.append("one"), f(*a, **k))[1])
    for case in overhead.CALLS:
        launched.clear()
        (ready,) = overhead.trials(case, "float32", CPU)
        result = measured(ready)
        assert 1 <= len(launched) <= 4, "for the gate and once for its sizes, however many calls are timed"
        assert not result.refused and set(result.records) == {"fastconv", "eager_channels_last"}
        assert all(record.over_stock is None and record.fastest_stock for record in result.records.values())
        x = torch.full((1, 8, 4, 4), 2.0).contiguous(memory_format=torch.channels_last)
        assert torch.get_num_threads() == 1
        ready.close()
        assert functional.conv2d(x, torch.ones(8, 8, 3, 3), None, 1, 1)[0, 0, 1, 1] == 2.0 * 72
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("dtype", ["float32", "float32_ieee", "bfloat16"])
def test_arithmetic_is_what_a_dtype_says(dtype: str) -> None:
    before = fastconv.get_precision()
    with trial.arithmetic(dtype, "cpu"):
        assert fastconv.get_precision() == ("ieee" if dtype == "float32_ieee" else "fast")
    assert fastconv.get_precision() == before


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
    result = measured(net_trials.trial(NET, "float32", True, CPU))
    assert set(result.records) == {"eager_channels_last", "eager_nchw"}
    assert "maximum error" in result.refused["fastconv"]
    assert any("has no time" in line for line in trial.lines(result))


@needs_library
def test_a_wrong_layer_gets_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in ("conv2d_relu_max_pool2d", "conv2d_input_grad", "conv2d_weight_grad"):
        right = getattr(native, launcher)
        monkeypatch.setattr(native, launcher, lambda *args, right=right: _nudged(right(*args)))
    for ready in layer_trials_of(LAYER):
        assert set(measured(ready).refused) == {"fastconv"}, ready.direction


@needs_library
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_pixels_that_no_window_reaches_are_no_measure_of_the_others(stride: int) -> None:
    conv = fast.Conv2d(64, 256, 1, stride=stride)
    with Audit() as audit:
        conv(torch.randn(4, 64, 56, 56, requires_grad=True)).square().sum().backward()
    assert audit.wrong is None and audit.calls == 3


def test_a_ratio_wants_all_eager_providers() -> None:
    """Of those left, the fastest may not be the fastest that stock torch has."""
    (ready,) = layer_trials_of(LAYER, directions=("forward",))
    check = ready.check
    wrong = trial.Verdict("rounded twice", 1.0, 1.0)
    ready.check = lambda name: wrong if name == "eager_nchw" else check(name)
    result = measured(ready)
    assert result.refused == {"eager_nchw": "rounded twice"}
    record = result.records["fastconv"]
    assert record.fastest_stock == "eager_channels_last" and record.over_stock is None


def test_a_provider_that_fails_behind_its_gate_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    (ready,) = layer_trials_of(LAYER, directions=("both",))
    memory_of = trial._memory

    def fails(of: trial.Trial, provider: str) -> dict[str, Any]:
        if provider == "eager_nchw":
            raise torch.OutOfMemoryError("no memory\nat all")
        return memory_of(of, provider)

    monkeypatch.setattr(trial, "_memory", fails)
    result = measured(ready)
    assert result.refused == {"eager_nchw": "OutOfMemoryError: no memory"} and "fastconv" in result.records


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


def test_a_failing_provider_is_told() -> None:
    def fails() -> None:
        raise RuntimeError("no compiler\nand more")

    (ready,) = layer_trials_of(LAYER, directions=("forward",))
    check = ready.check
    ready.calls["compile_default"] = fails
    ready.check = lambda name: check(name) if name != "compile_default" else fails()
    result = measured(ready)
    assert result.refused == {"compile_default": "RuntimeError: no compiler"}
    assert set(result.records) == set(EAGER)


@pytest.mark.usefixtures("small")
def test_suites(tmp_path: Path) -> None:
    said: list[str] = []
    outcome = run.run(Selection(quick=True), CPU, tmp_path, said.append)
    assert outcome.all_right and not outcome.left and "has no time" not in "\n".join(said)
    for suite in run.SUITES:
        found = records.read(tmp_path / MACHINE.folder / f"{suite}.json")
        assert found and all(record.suite == suite and record.gate_passed for record in found)
    assert len(records.read(tmp_path / MACHINE.folder)) == len(outcome.records)
    # What is measured again takes the place of what was; the rest stays.
    again = run.run(Selection(("models",), ("bfloat16",), quick=True), CPU, tmp_path, said.append)
    models = records.read(tmp_path / MACHINE.folder / "models.json")
    assert len(again.records) == 4 and sorted({record.dtype for record in models}) == ["bfloat16", "float32"]
    assert len(models) == 8


@pytest.mark.usefixtures("small")
def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    said: list[str] = []
    stopped = run.run(Selection(("layers", "models"), quick=True, seconds=0.0), CPU, tmp_path, said.append)
    assert not stopped.records and stopped.left == 4
    first = run.run(Selection(("layers",), ("float32",), quick=True), CPU, tmp_path, said.append)
    rest = run.run(Selection(("layers",), quick=True, resume=True), CPU, tmp_path, said.append)
    assert {record.dtype for record in first.records} == {"float32"} and {r.dtype for r in rest.records} == {"bfloat16"}
    assert len(records.read(tmp_path / MACHINE.folder / "layers.json")) == len(first.records) + len(rest.records)
    assert not run.run(Selection(("layers",), quick=True, resume=True), CPU, tmp_path, said.append).records
    assert "layers: 0 cases, 2 known" in "\n".join(said)


@pytest.mark.usefixtures("small")
def test_a_case_that_cannot_be_set_up_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pool_trials.trials

    def fails(case: PoolCase, *args: Any) -> Any:
        if case is POOL:
            raise RuntimeError("no memory\nat all")
        yield from build(case, *args)

    other = dataclasses.replace(POOL, size=12)
    monkeypatch.setattr(cases, "CPU_QUICK", LISTS._replace(pools={"float32": (POOL, other)}))
    monkeypatch.setattr(pool_trials, "trials", fails)
    said: list[str] = []
    outcome = run.run(Selection(("pools",), quick=True), CPU, tmp_path, said.append)
    assert not outcome.all_right and {record.case for record in outcome.records} == {other.case}
    assert any("could not be set up: no memory" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["fastconv", "eager_channels_last"])
def test_peak_memory(provider: str) -> None:
    net = cases.CPU_QUICK.nets[0]
    parameters = sum(p.numel() * 4 for p in net.build("torch").parameters())
    peak = memory.peak(net, "float32", provider)
    assert 2 * parameters <= peak < 2 * parameters + 500 * 2**20  # gradients, momenta, and maps


@pytest.mark.slow
def test_compiled_providers() -> None:
    net = dataclasses.replace(NET, is_compiled=True)
    for is_step in (False, True):
        ready = net_trials.trial(net, "float32", is_step, CPU)
        result = measured(ready)
        ready.close()
        assert not result.refused and "compile_default" in result.records
        assert ("compile_freezing" in result.records) is not is_step
    compiled = ("fastconv", "eager_nchw", "compile_default")
    for ready in layer_trials.trials("layers", LAYER, "float32", CPU, ("forward", "backward", "both"), compiled):
        result = measured(ready)
        assert not result.refused
        assert ("compile_default" in result.records) is (ready.direction != "backward")
    ready.close()


def test_lists() -> None:
    """Nets' layers by hand; every case has a name of its own; a sweep has enough points for a curve."""
    assert [layer.name for layer in cases.RECIPE_32[:3]] == ["3-64@32 3x3/1", "64-64@32 3x3/1+pool", "64-128@16 3x3/1"]
    assert cases.RECIPE_224[0].name == "3-64@224 7x7/2+pool" and cases.RECIPE_224[-1].name == "512-512@7 3x3/1"
    assert len(cases.RECIPE_32) == len(cases.RECIPE_224) - 1 == 8
    assert len(cases.VGG16) == 12 and cases.VGG16[-1].name == "512-512@14 3x3/1+pool"
    assert [layer.name for layer in cases.ALEXNET[:2]] == ["3-64@224 11x11/4+pool3", "64-192@27 5x5/1+pool3"]
    for device in ("cpu", "cuda"):
        for quick in (False, True):
            plans = [plan for suite in run.SUITES for plan in run.plans(suite, torch.device(device), quick)]
            names = [(plan.suite, plan.case, plan.dtype, plan.provider) for plan in plans]
            assert len(names) == len(set(names)) and {plan.suite for plan in plans} == set(run.SUITES)
            assert {plan.dtype for plan in plans} <= set(trial.dtypes_of(device)) | {"bfloat16_autocast"}
            kinds = [(plan.dtype, plan.case) for plan in plans if plan.suite == "layers"]
            batches = [case.rpartition(" batch ")[2].split()[0] for _, case in kinds]
            assert [b for i, b in enumerate(batches) if i == 0 or batches[i - 1] != b] == list(dict.fromkeys(batches))
            staged = [plan.provider for plan in plans if plan.suite == "training"]
            assert staged == sorted(staged, reverse=True), "what is compiled comes last"
            (sweep, *_) = cases.of(device, quick).scaling.values()
            axes = [{case.batch for case in sweep}, *({getattr(c.layer, n) for c in sweep} for n in ("size", "in_channels"))]
            assert all(len(axis) >= 3 for axis in axes)
