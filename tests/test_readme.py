"""The README as a newcomer follows it: each Python block in a fresh process, each `fastconv` command as typed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_MINUTES = 60

pytestmark = pytest.mark.slow


def _blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    lines = (line.strip() for block in _blocks("sh") for line in block.splitlines())
    return [line.split("  #")[0] for line in lines if line.startswith("fastconv ")]


def _run(arguments: list[str], folder: Path, placeholders: Sequence[str] = ()) -> str:
    """What it prints. A command that names files of the reader's own must end in an error that names the first of them."""
    # Not under the interpreter that the tests set up: a newcomer's shell has no such variable.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=10 * _MINUTES,
    )
    assert done.returncode == (1 if placeholders else 0), f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    if not placeholders:
        return done.stdout
    *_, told = done.stderr.strip().splitlines()
    assert told.startswith("fastconv ") and placeholders[0] in told, done.stderr
    return told


@pytest.mark.parametrize("number", range(len(_blocks("python")) if (ROOT / "README.md").exists() else 1))
def test_python_block(number: int, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(_blocks("python")[number], encoding="utf-8")
    _run([sys.executable, str(script)], tmp_path)


def test_commands(tmp_path: Path) -> None:
    commands = _commands()
    assert commands, "the README shows `fastconv` commands in its sh blocks"
    for command in commands:
        placeholders = re.findall(r"\b(?:PATH|IMAGE|my_nets)\b", command)
        assert _run([sys.executable, "-m", "fastconv", *shlex.split(command)[1:]], tmp_path, placeholders).strip()
