"""Who may import whom: read from the source, so that no arrow runs back up the staircase."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv

ROOT = Path(fastconv.__file__).parent
STAIRS = ["tuning", "backends", "ops", "autograd", "functional", "nn", "convert", "models", "bench", "train", "cli"]
GROUND = {"geometry", "precision", "reference"}
NO_OPS = {"nn", "models", "convert", "train"}
HEAVY = {"matplotlib", "sklearn", "PIL", "tqdm", "triton", "numpy"}
MAX_LINES = 400


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p not in (ROOT / "__init__.py", ROOT / "__main__.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of what a file imports, 'fastconv.ops' for `from fastconv import ops`."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    known = {*STAIRS, *GROUND, "kernels"}
    parts = (name.split(".") for name in imports(path))
    return {p[1] for p in parts if p[0] == "fastconv" and len(p) > 1 and p[1] in known} - {room(path)}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    own, others = room(path), rooms_imported(path)
    if own in GROUND:
        assert not others, "the ground floor imports nothing of ours"
    elif own == "kernels":
        outside = {n.split(".")[0] for n in imports(path)} - {"triton", "fastconv", "__future__"}
        assert not others and not outside, "kernels import only triton and kernels.coords"
        assert {n for n in imports(path) if n.startswith("fastconv.kernels")} <= {"fastconv.kernels", *coords()}
    else:
        higher = set(STAIRS[STAIRS.index(own) + 1 :])
        assert not others & higher, f"{own} stands below {others & higher}"
    if own in NO_OPS:
        assert not others & {"ops", "backends", "autograd"}
    if not path.is_relative_to(ROOT / "backends") and own != "kernels":
        assert "kernels" not in others, "only the Triton backend imports kernels"
    if path != ROOT / "backends" / "native_library.py":
        assert not any(n.startswith("fastconv._C") for n in imports(path)), "only backends.native_library loads the library"
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"tests", "benchmarks"}


def coords() -> set[str]:
    """kernels.coords and what it defines."""
    tree = ast.parse((ROOT / "kernels" / "coords.py").read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    names |= {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
    return {"fastconv.kernels.coords", *(f"fastconv.kernels.coords.{name}" for name in names)}


def test_import_stays_light() -> None:
    """Heavy and optional libraries load where they are used; torch itself brings numpy, so that it is not counted."""
    code = f"import sys, torch; before = set(sys.modules); import fastconv; print({HEAVY!r} & (set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_no_file_is_two_rooms() -> None:
    sources = [*ROOT.rglob("*.py"), *(ROOT.parent / "csrc").rglob("*.*"), *(ROOT.parent / "tests").glob("*.py")]
    long = {str(p.name): n for p in sources if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long
