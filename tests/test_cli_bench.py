"""`fastconv bench` and `fastconv bench compare`, end to end on the shortest lists."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from small_bench import LAYER, LISTS, MACHINE, small  # noqa: F401

from fastconv.backends import native
from fastconv.bench import records
from fastconv.bench.suites import cases
from fastconv.cli import main

pytestmark = pytest.mark.usefixtures("small")


def test_bench_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--quick", "--device", "cpu", "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{suite}: " in printed for suite in records.SUITES) and LAYER.case in printed
    folder = tmp_path / "a" / MACHINE.folder
    found = records.read(folder)
    assert {record.suite for record in found} == set(records.SUITES)
    assert f"{len(found)} records made; they lie in {folder}" in printed
    drawn = {path.name for path in folder.glob("*.png")}
    assert {"layers.png", "nets.png", "pools.png", "roofline.png"} <= drawn
    assert all(f"drawn: {folder / name}" in printed for name in drawn)

    # A run against itself, and against one in which we are half as fast.
    assert main(["bench", "compare", str(folder), str(folder)]) == 0
    slower = [
        dataclasses.replace(
            r, over_stock=r.over_stock / 2, over_stock_q20=r.over_stock_q20 / 2, over_stock_q80=r.over_stock_q20 / 1.9
        )  # type: ignore[operator]
        if r.is_ours and r.over_stock is not None
        else r
        for r in found
        if r.suite == "layers"
    ]
    records.write(tmp_path / "b.json", slower, whole=True)
    capsys.readouterr()
    assert main(["bench", "compare", str(folder / "layers.json"), str(tmp_path / "b.json")]) == 1
    assert LAYER.case in capsys.readouterr().out


def test_a_wrong_result_shows_in_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if native.unavailable() is not None:
        pytest.skip("needs the compiled library")
    right = native.max_pool2d

    def wrong(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        output, code = right(*args, **kwargs)
        return output * 1.001, code

    monkeypatch.setattr(native, "max_pool2d", wrong)
    assert main(["bench", "--quick", "--device", "cpu", "--suite", "pools", "--no-plots", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "has no time: " in printed and "refused" in printed
    assert not list(tmp_path.rglob("*.png"))


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["bench", "--quick", "--out", str(tmp_path)]
    for arguments, said in (
        ([*quick, "--device", "meta"], "--device meta: allowed: auto, cpu, cuda"),
        ([*quick, "--device", "cpu", "--only", "resnet1000"], "nothing was measured"),
        ([*quick, "--device", "cpu", "--suite", "layers", "--dtype", "tf32"], "nothing was measured"),
        (["bench", "compare", str(tmp_path / "none"), str(tmp_path)], "none"),
        (["bench", "compare", str(tmp_path), str(tmp_path)], "no file of records in this folder"),
    ):
        assert main(arguments) == 1
        assert said in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*quick, "--device", "cuda"]) == 1
        assert "torch sees no CUDA device" in capsys.readouterr().err
    for wrong in (["--suite", "speed"], ["--dtype", "int8"], ["--seconds", "0"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            main([*quick, *wrong])


def test_pictures_that_cannot_be_drawn_are_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command = ["bench", "--quick", "--device", "cpu", "--suite", "layers", "--dtype", "float32", "--out", str(tmp_path)]
    assert main(command) == 1
    assert "pip install 'fastconv[bench]'" in capsys.readouterr().err and not list(tmp_path.rglob("*.json"))
    assert main([*command, "--no-plots"]) == 0


def test_no_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {"float32": tuple(dataclasses.replace(LAYER, batch=batch) for batch in range(1, 500))}
    monkeypatch.setattr(cases, "CPU_QUICK", LISTS._replace(layers=layers))
    command = [
        "bench",
        "--quick",
        "--device",
        "cpu",
        "--suite",
        "layers",
        "--no-plots",
        "--seconds",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert main(command) == 3
    assert "cases left" in capsys.readouterr().out
    made = len(records.read(tmp_path / MACHINE.folder / "layers.json"))
    assert main([*command, "--resume"]) == 3
    assert len(records.read(tmp_path / MACHINE.folder / "layers.json")) > made
