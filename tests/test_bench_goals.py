"""Goals beside what was measured: what counts as met, and on which records it rests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_records import record

from benchmarks import goals
from fastconv.bench import records
from fastconv.bench.records import Record
from fastconv.bench.suites import cases

H100 = {"chip": "NVIDIA H100 80GB HBM3 sm_90", "driver": "580", "cudnn": "91300", "dtype": "bfloat16"}
STEP: dict[str, Any] = {**H100, "suite": "training", "case": "recipe_net R=224 batch 256", "direction": "step"}


def times(
    what: dict[str, Any], milliseconds: dict[str, float], peaks: dict[str, int] | None = None, **changes: Any
) -> list[Record]:
    """A trial's records, by provider."""
    return [
        record(**{**what, "provider": name, "median_ms": ms, "q20_ms": ms, "q80_ms": ms, **changes})
        if peaks is None
        else record(**{**what, "provider": name, "median_ms": ms, "q20_ms": ms, "q80_ms": ms, "peak_bytes": peaks[name]})
        for name, ms in milliseconds.items()
    ]


def layer(case: str, ours: float, eager: float, compiled: float | None = None, q80: float = 2.0) -> list[Record]:
    milliseconds = {"fastconv": ours, "eager_channels_last": eager}
    milliseconds |= {} if compiled is None else {"compile_default": compiled, "compile_max_autotune": 2 * compiled}
    ratio = min(eager, compiled or eager) / ours
    what = {**H100, "case": case, "direction": "both"}
    return times(what, milliseconds, over_stock=ratio, over_stock_q80=q80, over_stock_q20=ratio)


def verdicts(found: list[Record]) -> dict[str, tuple[float | None, str]]:
    return {goal.what: (goal.measured, goal.verdict) for goal in goals.of(found)}


def test_layers_by_batch() -> None:
    found = [*layer("64-64@56 3x3/1 batch 32", 1.0, 2.0, 1.2), *layer("64-64@28 3x3/1 batch 32", 1.0, 1.0, 1.15)]
    found += layer("64-64@56 3x3/1 batch 256", 1.0, 1.25, q80=0.97)
    found += layer("64-64@56 3x3/1 batch 8 NCHW", 1.0, 9.0)
    of = verdicts(found)
    at_32 = "2 layers at batch 32, forward + backward, geometric mean, over "
    assert of[at_32 + "eager, channels_last"] == (pytest.approx(2**0.5), "met")
    assert of[at_32 + "torch.compile"] == (pytest.approx((1.2 * 1.15) ** 0.5), "met"), "of the faster of its modes"
    assert of["1 layers at batch 256, forward + backward, geometric mean, over eager, channels_last"] == (
        pytest.approx(1.25),
        "**missed**",
    )
    assert len([what for what in of if "layers at batch" in what]) == 3, "neither NCHW nor what was not compiled"
    (slower,) = (value for what, value in of.items() if "slower" in what)
    assert slower == (1, "**missed**")


def test_steps() -> None:
    milliseconds = {"fastconv": 1.0, "eager_channels_last": 2.1, "compile_default": 0.98, "compile_max_autotune": 1.5}
    peaks = {"fastconv": 59, "eager_channels_last": 100, "compile_default": 10, "compile_max_autotune": 10}
    small = {**STEP, "case": "recipe_net R=32 batch 128"}
    graphs = {"fastconv": 1.0, "fastconv_cuda_graph": 0.4, "eager_channels_last": 1.9, "compile_max_autotune": 0.5}
    of = verdicts([*times(STEP, milliseconds, peaks), *times(small, graphs)])
    at = "training step, recipe_net R=224 batch 256, over "
    assert of[at + "eager, channels_last"] == (2.1, "aim met")
    assert of[at + "torch.compile"] == (0.98, "**missed**")
    assert of["peak memory of a step, recipe_net R=224 batch 256, of eager's, channels_last"] == (0.59, "met")
    at = "training step, recipe_net R=32 batch 128, over "
    assert of[at + "eager, channels_last"] == (1.9, "**missed**")
    assert of["training step, recipe_net R=32 batch 128, both as CUDA graphs, over torch.compile"] == (1.25, "met")
    assert of["training step, recipe_net R=32 batch 128, as a CUDA graph, over eager, channels_last"] == (
        pytest.approx(4.75),
        "aim met",
    )
    assert of["training step, vgg16 R=224 batch 128, over eager, channels_last"] == (None, "not measured")
    assert of["peak memory of a step, vgg16 R=224 batch 128, of eager's, channels_last"] == (None, "not measured")


def test_goals_are_for_nets_that_are_measured() -> None:
    named = {
        goal.what.split(", ")[1] for goal in goals.of(layer("64-64@56 3x3/1 batch 32", 1.0, 2.0)) if "step" in goal.what
    }
    assert named == {net.case for net in cases.GPU.nets if net.case in named} and len(named) == 3
    (share,) = (
        goal
        for goal in goals.of(times(STEP, {"fastconv": 1.0, "eager_channels_last": 2.0}))
        if "224 batch 256, of" in goal.what
    )
    assert share.row()[1:] == ["at most 60%", "", "100%", "**missed**"]


def test_who_is_slower_is_named() -> None:
    found = [*layer("8-8@8 3x3/1 batch 32", 1.0, 0.5, q80=0.6), *layer("64-64@56 3x3/1 batch 32", 10.0, 9.0, q80=0.95)]
    found += layer("9-9@9 3x3/1 batch 32", 1.0, 0.99, q80=1.01)
    assert [r.case for r in goals.slower_layers(found)] == ["64-64@56 3x3/1 batch 32", "8-8@8 3x3/1 batch 32"]
    text = "\n".join(goals.table(found))
    assert "most time lost first: 64-64@56 3x3/1 batch 32 0.90× (eager_channels_last), 8-8@8 3x3/1 batch 32 0.50×" in text
    assert "9-9@9" not in text
    assert "| at least 1.30× | 1.50× | 0.76× | **missed** |" in text


def test_other_chips_have_no_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert goals.table([record()]) == [] == goals.table([])
    records.write(tmp_path / "layers.json", [record()], whole=True)
    assert goals.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no goals were set for Some CPU cpu-2\n"
    records.write(tmp_path / "layers.json", layer("64-64@56 3x3/1 batch 32", 1.0, 2.0), whole=True)
    assert goals.main([str(tmp_path)]) == 0
    assert (
        "| 1 layers at batch 32, forward + backward, geometric mean, over eager, channels_last |" in capsys.readouterr().out
    )
    assert goals.main([str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
