"""Selection: what a named backend may do, what `auto` chooses, and what a refusal says."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastconv
import fastconv.functional as FC
from fastconv import backends, tuning
from fastconv.backends import native, native_cuda, native_library
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy, policy

G = ConvGeometry.of("conv2d", (1, 4, 8, 8), (4, 4, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_named_backend_raises_where_it_cannot_serve(backend: str) -> None:
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    with (
        fastconv.use_backend(backend),
        pytest.raises(RuntimeError, match=f"conv2d \\(forward\\): backend '{backend}' cannot serve.*float64"),
    ):
        FC.conv2d(x, x)


def test_use_backend_sets_and_restores() -> None:
    assert backends.requested() == "auto"
    with fastconv.use_backend("aten"):
        assert backends.requested() == "aten"
        with fastconv.use_backend("native"):
            assert backends.requested() == "native"
        assert backends.requested() == "aten"
    assert backends.requested() == "auto"
    fastconv.use_backend("native")
    assert backends.requested() == "native"


def test_use_backend_entered_later_and_twice() -> None:
    request = fastconv.use_backend("aten")
    fastconv.use_backend("auto")
    with request:
        assert backends.requested() == "aten"
        with request:
            assert backends.requested() == "aten"
        assert backends.requested() == "aten"
    assert backends.requested() == "auto"


def test_use_backend_restores_after_an_error() -> None:
    with pytest.raises(KeyError), fastconv.use_backend("aten"):
        raise KeyError
    assert backends.requested() == "auto"


@pytest.mark.parametrize("channels", [8, 64, 512])
@pytest.mark.parametrize("chip", ["NVIDIA A100-SXM4-80GB sm_80", "NVIDIA H100 80GB HBM3 sm_90"])
def test_native_stands_in_for_triton_on_a_gpu(chip: str, channels: int) -> None:
    """Never in front of a Triton kernel that would be taken; of the fused operators' own in front of aten where it pays."""
    geometry = ConvGeometry.of("conv2d", (64, channels, 28, 28), (channels, channels, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
    for direction in ("forward", "input_grad", "weight_grad"):
        picked = tuning.pick("conv2d_relu", direction, geometry, Policy(torch.bfloat16), chip)
        names = [candidate.backend for candidate in picked]
        place = names.index("aten")
        assert names.count("native") == 1 and names.index("native") in (place - 1, place + 1)
        assert names[0] in ("triton", "aten")
    pool = geometry_of_a_pool((8, channels, 28, 28))
    assert [c.backend for c in tuning.pick("max_pool2d", "forward", pool, Policy(torch.bfloat16), chip)] == [
        "triton",
        "native",
        "aten",
    ]


@pytest.mark.parametrize(
    "built, capability, runs",
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("9.0a+PTX", (10, 0), False),
        ("10.0+PTX", (12, 0), True),
    ],
)
def test_what_was_built_for_a_chip_runs_there(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert native_library.runs_on(built, capability) == runs


def test_libraries_of_different_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(schemas: str) -> SimpleNamespace:
        return SimpleNamespace(build_info=lambda: {"schemas": schemas, "architectures": "8.0"})

    libraries = {"fastconv._C": library("new"), "fastconv._cuda": library("old")}
    monkeypatch.setattr(native_library, "_load", libraries.__getitem__)
    cuda_library = native_library.cuda_library.__wrapped__
    assert "built from different sources" in str(cuda_library())
    libraries["fastconv._cuda"] = library("new")
    assert cuda_library() is libraries["fastconv._cuda"]


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_what_the_native_backend_supports() -> None:
    assert native.supports("conv2d", "forward", G, Policy(torch.float32), "cpu") is None
    assert "xpu" in str(native.supports("conv2d", "forward", G, Policy(torch.float32), "xpu"))
    assert "float64" in str(native.supports("conv2d", "forward", G, Policy(torch.float64), "cpu"))
    info = native.library().build_info()
    assert isinstance(info["amx"], bool)
    assert "-ffp-contract=off" in info["flags"] and info["torch"].startswith("2.") and info["compiler"]


@pytest.mark.parametrize(
    "shape, weight",
    [((2**15, 1, 300, 300), (8, 1, 3, 3)), ((1, 2**15, 8, 8), (2**13, 2**15, 3, 3))],
    ids=["pixels", "weight"],
)
def test_what_cuda_kernels_cannot_number(shape: tuple[int, ...], weight: tuple[int, ...]) -> None:
    g = ConvGeometry.of("conv2d", shape, weight, None, (1, 1), (1, 1), (1, 1), 1)
    assert "in 32 bits, got" in str(native_cuda.too_large(g))
    assert native_cuda.too_large(G) is None


def geometry_of_a_pool(shape: tuple[int, ...]) -> PoolGeometry:
    return PoolGeometry.of("max_pool2d", shape, (2, 2), (2, 2), (0, 0), (1, 1), False)


def test_pick_orders_backends() -> None:
    p = Policy(torch.bfloat16)

    def names(geometry: ConvGeometry, chip: str, channels_last: bool) -> list[str]:
        picked = tuning.pick("conv2d_relu", "forward", geometry, p, chip, channels_last)
        return list(dict.fromkeys(candidate.backend for candidate in picked))

    assert names(G, "NVIDIA H100 sm_90", True) == ["triton", "native", "aten"]
    assert names(G, "Quadro RTX 8000 sm_75", True) == ["triton", "aten"], "its kernels need sm_80"
    assert names(G, "AMD EPYC 9B14 cpu-2", True) == names(G, "cpu", True) == ["native", "aten"]
    assert names(G, "cpu", False) == ["aten", "native"]
    assert names(G, "NVIDIA H100 sm_90", False)[0] == "aten"
    grouped = ConvGeometry.of("conv2d", (1, 4, 8, 8), (4, 1, 3, 3), None, (1, 1), (1, 1), (1, 1), 4)
    assert names(grouped, "NVIDIA H100 sm_90", True)[0] == "triton"


@pytest.mark.usefixtures("cache")
def test_an_automatic_choice_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastconv")
    backends._noted.clear()
    for batch in (1, 1, 2):
        x = torch.randn(batch, 4, 8, 8).to(memory_format=torch.channels_last)
        FC.conv2d(x, torch.randn(4, 4, 3, 3))
    (record,) = caplog.records
    call = "conv2d forward 1x4x8x8 to 4, 3x3/1, float32"
    reason = "rule: native reads channels_last, operands do: native first"
    assert record.getMessage() == f"backend native for {call} on cpu ({reason})"


def test_auto_runs_the_native_kernels_on_channels_last() -> None:
    x = torch.randn(1, 4, 8, 8).to(memory_format=torch.channels_last)
    assert backends.select("auto", "conv2d", "forward", G, Policy(x.dtype), x, True).NAME == "native"
    assert backends.select("auto", "conv2d", "forward", G, Policy(torch.float64), x.double(), True).NAME == "aten"


def test_the_environment_names_a_backend() -> None:
    code = "import fastconv.backends as b; print(b.requested())"
    run = subprocess.run([sys.executable, "-c", code], env={"FASTCONV_BACKEND": "aten"}, capture_output=True, text=True)
    assert run.stdout.strip() == "aten", run.stderr
    run = subprocess.run([sys.executable, "-c", code], env={"FASTCONV_BACKEND": ""}, capture_output=True, text=True)
    assert run.stdout.strip() == "auto", run.stderr
    run = subprocess.run([sys.executable, "-c", code], env={"FASTCONV_BACKEND": "cuda"}, capture_output=True, text=True)
    assert "FASTCONV_BACKEND: unknown backend 'cuda'; allowed: 'auto', 'triton', 'native', 'aten'" in run.stderr


def test_without_triton_or_compiled_library_the_package_works_and_says_why() -> None:
    code = """
import sys
from types import SimpleNamespace
for name in ("triton", "fastconv._C"):
    sys.modules[name] = None
import torch, fastconv, fastconv.backends as b
x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
fastconv.functional.conv2d_relu_max_pool2d(x, torch.randn(4, 3, 3, 3)).sum().backward()
for name in ("triton", "native"):
    with fastconv.use_backend(name):
        try:
            fastconv.functional.max_pool2d(x, 2)
        except RuntimeError as error:
            print(name, "|", error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reasons = dict(line.split(" | ") for line in run.stdout.strip().splitlines())
    assert set(reasons) == {"triton", "native"}
    assert "pip install" in reasons["native"]
    assert all("backend" in reason for reason in reasons.values())


def test_tf32_follows_torchs_switch() -> None:
    for allowed in (True, False):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            assert policy(torch.float32, "cuda") == Policy(torch.float32, tf32=allowed)
            assert policy(torch.bfloat16, "cuda") == Policy(torch.bfloat16)
            assert policy(torch.float32, "cpu") == Policy(torch.float32)


def test_geometries_are_cached_and_describe_themselves() -> None:
    again = ConvGeometry.of("conv2d", (1, 4, 8, 8), (4, 4, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
    assert again is G
    assert (G.output_shape, G.taps, G.is_empty) == ((1, 4, 8, 8), 9, False)
    pool = PoolGeometry.of("max_pool2d", (1, 4, 7, 8), (2, 2), (2, 2), (0, 0), (1, 1), False)
    assert (pool.output_shape, pool.is_2x2, pool.is_overlapping) == ((1, 4, 3, 4), True, False)
    assert pool.bytes_moved(2) == 2 * (4 * 56 + 4 * 12) + 4 * 12
