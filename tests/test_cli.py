"""The command line, end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv import backends
from fastconv.backends import native_library
from fastconv.cli import main
from fastconv.tuning import tables

SMALL = ["--resolution", "8", "--width", "4", "--max-width", "8", "--epochs", "2", "--batch-size", "256", "--device", "cpu"]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        fastconv.__version__,
        torch.__version__,
        "CPU",
        "compiled library",
        "precision              fast",
        "aten on cpu",
        backends.chip("cpu"),
    ):
        assert expected in printed
    assert any(line.startswith("aten on cpu") and line.endswith("ready") for line in printed.splitlines())


def test_info_shows_the_tables_in_force(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "none: `fastconv tune` measures one" in capsys.readouterr().out
    chip = backends.chip("cpu")
    tables.write(tables.user_file(chip), chip, [])
    assert main(["info"]) == 0
    assert f"{tables.user_file(chip)}: 0 entries" in capsys.readouterr().out
    tables.user_file(chip).write_text("{")
    assert main(["info"]) == 0
    assert f"{tables.user_file(chip)}: ignored: it is not JSON" in capsys.readouterr().out


def test_info_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastconv.cli import info

    monkeypatch.setattr(native_library, "_load", lambda name: "the compiled library is not installed: install g++")
    monkeypatch.setattr(info, "_version", lambda name: None)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "install g++" in printed
    assert "compiled library       none: the compiled library is not installed" in printed
    assert "native on cpu          no: the compiled library is not installed" in printed
    assert "CUDA library           none: the compiled library is not installed" in printed
    assert "Triton                 not installed" in printed
    assert "missing: scikit-learn, matplotlib, tqdm" in printed


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    assert main(["train", *SMALL, "--runs", str(tmp_path), "--name", "tiny", "--seeds", "2", "--backend", "aten"]) == 0
    printed = capsys.readouterr().out
    assert "torch / fastconv:" in printed
    assert "over 4 paired epochs" in printed
    assert "(2 seeds)" in printed
    assert "backend aten" in printed

    folder = tmp_path / "tiny"
    checkpoints = [f"{layers}-seed{seed}.pt" for layers in ("fastconv", "torch") for seed in (0, 1)]
    assert sorted(file.name for file in folder.iterdir()) == sorted([*checkpoints, "curves.png", "metrics.jsonl"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["event"] for record in records] == ["start", *(["epoch"] * 4 + ["result"] * 2) * 2]
    assert records[0]["resolution"] == 8
    assert set(records[1]) == {
        *("event", "layers", "seed", "epoch", "seconds"),
        *("train_loss", "train_accuracy", "validation_loss", "validation_accuracy"),
    }
    assert backends.requested() == "auto", "the backend asked for is that of the run only"


def test_train_one_net(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for library in ("sklearn", "tqdm", "matplotlib"):
        pytest.importorskip(library)
    assert main(["train", *SMALL, "--epochs", "1", "--runs", str(tmp_path), "--layers", "fastconv"]) == 0
    printed = capsys.readouterr().out
    assert "torch / fastconv" not in printed
    assert "backend auto (" in printed, "what the automatic choice fell on"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--device", "cuda"],
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--resolution", "36"], "nearest resolutions that work"),
        (["--width", "64", "--max-width", "32"], "max_width must be at least width=64"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    for library in ("sklearn", "tqdm", "matplotlib"):
        pytest.importorskip(library)
    assert main(["train", "--runs", str(tmp_path), "--device", "cpu", *arguments]) == 1
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("fastconv train: ")
    assert message in printed
    assert not list(tmp_path.iterdir()), "a former run of that name would be untouched"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    assert "--seeds" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--epochs", "0"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--processes", "0"])
    assert stopped.value.code == 2
    assert "--processes: must be at least 1, got 0" in capsys.readouterr().err


def test_import_is_light() -> None:
    """Libraries that only some commands need are not imported with the package."""
    heavy = ("matplotlib", "sklearn", "fastconv.train", "fastconv.cli")
    code = f"import sys, fastconv; print([name for name in {heavy} if name in sys.modules])"
    root = Path(fastconv.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("library", ["sklearn", "matplotlib", "tqdm"])
def test_a_missing_library_is_named(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["train", *SMALL, "--epochs", "1", "--layers", "torch", "--runs", str(tmp_path)]) == 1
    assert "pip install 'fastconv[train]'" in capsys.readouterr().err
