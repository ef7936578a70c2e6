"""The command line, end to end."""

from __future__ import annotations

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
    assert "missing: scikit-learn, matplotlib, numpy, Pillow, tqdm" in printed


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
