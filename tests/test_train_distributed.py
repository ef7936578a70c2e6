"""Several processes train what one trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

import fastconv

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")

ROOT = Path(fastconv.__file__).parent.parent
OWN = ["--data", "synthetic:400", "--resolution", "8", "--option", "width=8", "--option", "max_width=16", "--device", "cpu"]
TRAIN = ["-m", "fastconv", "train", *OWN, "--batch-size", "30"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _run(folder: Path, arguments: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        *([*TORCHRUN, str(processes)] if processes > 1 else []),
        *TRAIN,
        "--runs",
        str(folder),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(), cwd=folder, timeout=300)


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("norm", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path, norm: str) -> None:
    """At the same global batch, within rounding; batch norms see half a batch each: there the curves only resemble."""
    arguments = ["--epochs", "4", "--learning-rate", "1e-2", "--option", f"batch_norm={norm}"]
    for name, processes in (("one", 1), ("two", 2)):
        done = _run(tmp_path, [*arguments, "--name", name], processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test accuracy") == 1, "one of the processes talks"
    one, two = (_records(tmp_path / name) for name in ("one", "two"))
    assert [record["event"] for record in one] == [record["event"] for record in two]
    for ours, theirs in zip(two, one, strict=True):
        if ours["event"] == "epoch":
            for name in ("train_loss", "held_out_loss"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4 if norm == "false" else 0.25), name
            assert ours["train_accuracy"] == pytest.approx(theirs["train_accuracy"], abs=0.01 if norm == "false" else 0.15)
    assert one[-2]["train_loss"] < 0.8 * one[1]["train_loss"], "there is a curve to compare"


@pytest.mark.slow
def test_processes_stop_together_and_go_on(tmp_path: Path) -> None:
    """Of three, whose gradients are summed in an order that DistributedDataParallel changes behind the first backward."""
    whole = _run(tmp_path, ["--epochs", "40", "--name", "whole"], 3)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, *TORCHRUN, "3", *TRAIN, "--runs", str(tmp_path), "--epochs", "40", "--name", "cut"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(), cwd=tmp_path
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("seed 0 epoch"):
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--resume goes on from it" in said, said
    resumed = _run(tmp_path, ["--epochs", "40", "--name", "cut", "--resume"], 3)
    assert resumed.returncode == 0, resumed.stderr

    def curve(name: str) -> list[tuple]:
        epochs = (record for record in _records(tmp_path / name) if record["event"] == "epoch")
        return [(epoch["epoch"], epoch["train_loss"], epoch["held_out_loss"]) for epoch in epochs]

    assert curve("cut") == curve("whole"), "bit for bit"


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_said(tmp_path: Path) -> None:
    done = _run(tmp_path, ["--compare", "--epochs", "1"], 2)
    assert done.returncode != 0
    assert "--compare is of one process, got 2 processes" in done.stderr
    done = _run(tmp_path, ["--batch-size", "33", "--epochs", "1"], 2)
    assert done.returncode != 0
    assert "batch_size" in done.stderr and "33" in done.stderr
