"""What setup.py decides, and what a source distribution holds. Builds are `slow`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
TORCH = ModuleType("torch")
TORCH.__version__ = "2.11"


@pytest.fixture
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastconv_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_builds_with_torch_and_compiler(setup_py: ModuleType, mode: str) -> None:
    build, reason = setup_py.choose(mode, TORCH, "g++")
    assert build and "2.11" in reason and "g++" in reason


@pytest.mark.parametrize("torch, compiler, missing", [(None, "g++", "torch"), (TORCH, None, "compiler")])
def test_missing_parts(setup_py: ModuleType, torch: ModuleType | None, compiler: str | None, missing: str) -> None:
    build, reason = setup_py.choose("auto", torch, compiler)
    assert not build and missing in reason
    with pytest.raises(SystemExit, match=missing):
        setup_py.choose("cpu", torch, compiler)


def test_none_never_builds(setup_py: ModuleType) -> None:
    assert setup_py.choose("none", TORCH, "g++") == (False, "FASTCONV_BUILD=none")


@pytest.mark.parametrize("mode", ["cuda", "", "AUTO"])
def test_unknown_mode_lists_the_allowed_ones(setup_py: ModuleType, mode: str) -> None:
    with pytest.raises(SystemExit, match="auto, cpu, none"):
        setup_py.choose(mode, TORCH, "g++")


def test_compiler_of_the_environment(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert setup_py.find_compiler() is None
    (tmp_path / "g++").touch(mode=0o755)
    assert setup_py.find_compiler() == "g++"
    monkeypatch.setenv("CXX", "ccache g++")
    assert setup_py.find_compiler() == "ccache g++"
    monkeypatch.setenv("CXX", "absent++")
    assert setup_py.find_compiler() is None


def test_lists_every_source(setup_py: ModuleType) -> None:
    listed = {*setup_py.SOURCES, *setup_py.HEADERS}
    present = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".inc")}
    assert listed == present


def run(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_unknown_mode_fails() -> None:
    result = run("setup.py", "--version", cwd=ROOT, FASTCONV_BUILD="cuda")
    assert result.returncode != 0 and "allowed: auto, cpu, none" in result.stderr


@pytest.mark.slow
def test_source_distribution(tmp_path: Path, setup_py: ModuleType) -> None:
    egg_info = ("egg_info", "--egg-base", tmp_path)
    result = run("setup.py", *egg_info, "sdist", "--dist-dir", tmp_path, cwd=ROOT, FASTCONV_BUILD="none")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"LICENSE", "setup.py", "fastconv/py.typed", *setup_py.SOURCES, *setup_py.HEADERS} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


@pytest.mark.slow
def test_a_failing_compiler_is_an_error(tmp_path: Path) -> None:
    if "bdist_wheel" not in run("setup.py", "--help-commands", cwd=ROOT, FASTCONV_BUILD="none").stdout:
        pytest.skip("setuptools cannot build here")
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'g++ (broken) 12.0' >&2\nexit 3\n")
    compiler.chmod(0o755)
    folders = ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    result = run("setup.py", "build_ext", *folders, cwd=ROOT, CXX=str(compiler), FASTCONV_BUILD="auto")
    assert result.returncode != 0


@pytest.mark.slow
def test_build(tmp_path: Path) -> None:
    folders = ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    result = run("setup.py", "build_ext", *folders, cwd=ROOT, FASTCONV_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    assert "FASTCONV_BUILD=cpu" in result.stderr
    assert (tmp_path / "lib" / "fastconv" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").is_file()


def test_pure_python_names_the_remedy(tmp_path: Path) -> None:
    """Without the compiled library the backend gives a reason, never an ImportError."""
    code = (
        "import sys; sys.modules['fastconv._C'] = None\n"
        "from fastconv.backends import native\n"
        "from fastconv.precision import Policy\n"
        "import torch\n"
        "print(native.supports('conv2d', 'forward', None, Policy(torch.float32), 'cpu'))"
    )
    result = run("-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "not installed" in result.stdout and "pip install --no-build-isolation -e ." in result.stdout
