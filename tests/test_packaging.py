"""What setup.py decides, and what a source distribution holds. Builds are `slow`."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from emu import device_code

ROOT = Path(__file__).parent.parent


def torch_for(cuda: str | None) -> ModuleType:
    torch = ModuleType("torch")
    torch.__version__, torch.version = "2.11", SimpleNamespace(cuda=cuda)
    return torch


TORCH, CUDA_TORCH = torch_for(None), torch_for("13.0")


@pytest.fixture
def setup_py() -> ModuleType:
    return device_code.SETUP


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A compiler that knows chips up to sm_90."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    chips = " ".join(f"compute_{chip}" for chip in (75, 80, 86, 89, 90))
    path.write_text(
        f'#!/bin/sh\ncase $1 in --version) echo "Cuda compilation tools, release 13.0, V13";; *) echo {chips};; esac\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_builds_with_torch_and_compiler(setup_py: ModuleType, mode: str) -> None:
    libraries, reason = setup_py.choose(mode, TORCH, "g++", None)
    assert libraries == ("cpu",) and "2.11" in reason and "g++" in reason


@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_builds_for_cuda_without_a_gpu(setup_py: ModuleType, nvcc: str, mode: str) -> None:
    libraries, reason = setup_py.choose(mode, CUDA_TORCH, "g++", nvcc)
    assert libraries == ("cpu", "cuda") and nvcc in reason and "8.0 8.6 8.9 9.0+PTX" in reason
    assert setup_py.choose("cpu", CUDA_TORCH, "g++", nvcc)[0] == ("cpu",)


@pytest.mark.parametrize("torch, compiler, missing", [(None, "g++", "torch"), (TORCH, None, "compiler")])
def test_missing_parts(setup_py: ModuleType, torch: ModuleType | None, compiler: str | None, missing: str) -> None:
    libraries, reason = setup_py.choose("auto", torch, compiler, None)
    assert not libraries and missing in reason
    for mode in ("cpu", "cuda"):
        with pytest.raises(SystemExit, match=missing):
            setup_py.choose(mode, torch, compiler, None)


@pytest.mark.parametrize(
    "torch, has_nvcc, missing",
    [
        (TORCH, True, "built without CUDA"),
        (CUDA_TORCH, False, "no nvcc"),
        (torch_for("12.8"), True, "is of CUDA 13.0, torch 2.11 of CUDA 12.8"),
    ],
)
def test_missing_parts_for_cuda(setup_py: ModuleType, nvcc: str, torch: ModuleType, has_nvcc: bool, missing: str) -> None:
    found = nvcc if has_nvcc else None
    libraries, reason = setup_py.choose("auto", torch, "g++", found)
    assert libraries == ("cpu",) and missing in reason
    with pytest.raises(SystemExit, match=f"FASTCONV_BUILD=cuda, but .*{missing}"):
        setup_py.choose("cuda", torch, "g++", found)


def test_none_never_builds(setup_py: ModuleType) -> None:
    assert setup_py.choose("none", CUDA_TORCH, "g++", "nvcc") == ((), "FASTCONV_BUILD=none")


@pytest.mark.parametrize("mode", ["opencl", "", "AUTO"])
def test_unknown_mode_lists_the_allowed_ones(setup_py: ModuleType, mode: str) -> None:
    with pytest.raises(SystemExit, match="auto, cpu, cuda, none"):
        setup_py.choose(mode, TORCH, "g++", None)


@pytest.mark.parametrize(
    "asked, built",
    [
        ("", "8.0 8.6 8.9 9.0+PTX"),
        ("native", "8.0 8.6 8.9 9.0+PTX"),  # whether a GPU is visible is never asked
        ("8.6;12.0+PTX", "8.6 12.0+PTX"),
        ("8.6 9.0a", "8.6 9.0a"),
        ("7.5 8.0 8.6+PTX", "8.0 8.6+PTX"),
        ("Turing;Ampere;Hopper", "8.0 8.6+PTX 9.0+PTX"),
    ],
)
def test_architectures_of_the_environment(
    setup_py: ModuleType, nvcc: str, asked: str, built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert setup_py.architectures(nvcc) == built.split()
    reason = setup_py.choose("auto", CUDA_TORCH, "g++", nvcc)[1]
    assert built in reason and asked in reason


def test_too_old_architectures_alone(setup_py: ModuleType, nvcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5")
    libraries, reason = setup_py.choose("auto", CUDA_TORCH, "g++", nvcc)
    assert libraries == ("cpu",) and "7.0;7.5" in reason and "8.0" in reason
    with pytest.raises(SystemExit, match=r"7\.0;7\.5.*8\.0"):
        setup_py.choose("cuda", CUDA_TORCH, "g++", nvcc)


def test_an_nvcc_that_fails(setup_py: ModuleType, nvcc: str) -> None:
    """It is a reason against the CUDA library, and none against the other."""
    Path(nvcc).write_text("#!/bin/sh\nexit 1\n")
    for compiler in (nvcc, str(Path(nvcc).parent)):  # the latter cannot be run
        libraries, reason = setup_py.choose("auto", CUDA_TORCH, "g++", compiler)
        assert libraries == ("cpu",) and "does not work" in reason
        assert setup_py.choose("cpu", CUDA_TORCH, "g++", compiler)[0] == ("cpu",)
        with pytest.raises(SystemExit, match="does not work"):
            setup_py.choose("cuda", CUDA_TORCH, "g++", compiler)


def test_nvcc_of_the_environment(setup_py: ModuleType, nvcc: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert setup_py.find_nvcc() == nvcc
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    assert setup_py.find_nvcc() is None
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(Path(nvcc).parent))
    assert setup_py.find_nvcc() == nvcc


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
    listed = {*setup_py.SOURCES, *setup_py.CUDA_SOURCES, *setup_py.HEADERS}
    present = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h", ".inc")}
    assert listed == present


def run(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_sanitizers_are_compiled_and_linked_in_where_asked_for(setup_py: ModuleType) -> None:
    compiled, linked = setup_py.flags("")
    assert compiled == [*setup_py.FLAGS] and linked == ["-s"]
    compiled, linked = setup_py.flags("address,undefined")
    assert {"-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"} <= {*compiled}
    assert not {"-g0", "-O3"} & {*compiled}
    assert linked == ["-fsanitize=address,undefined"]


def test_unknown_mode_fails() -> None:
    result = run("setup.py", "--version", cwd=ROOT, FASTCONV_BUILD="gpu")
    assert result.returncode != 0 and "allowed: auto, cpu, cuda, none" in result.stderr


@pytest.mark.slow
def test_source_distribution(tmp_path: Path, setup_py: ModuleType) -> None:
    egg_info = ("egg_info", "--egg-base", tmp_path)
    result = run("setup.py", *egg_info, "sdist", "--dist-dir", tmp_path, cwd=ROOT, FASTCONV_BUILD="none")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {
        "LICENSE",
        "setup.py",
        "fastconv/py.typed",
        *setup_py.SOURCES,
        *setup_py.CUDA_SOURCES,
        *setup_py.HEADERS,
    } <= names
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
