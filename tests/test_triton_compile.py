"""Triton kernels compiled for sm_80 and sm_90 as the launchers launch them, and their machine code read; no GPU is needed.

The interpreter accepts code that the compiler rejects. What is compiled is listed in fastconv/backends/triton_calls.py:
calls of new launchers belong there, and the assertions here hold for them too. Of sm_80 there are only the products that
tuning takes first; `make docs` compiles all of them, and for sm_100 too.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fastconv.backends import triton_inspect
from fastconv.backends.triton_calls import Call, Recorded
from fastconv.backends.triton_cubin import machine_code
from fastconv.backends.triton_launch import launch, recording
from fastconv.cli import main

ROOT = Path(__file__).parents[1]
# Instructions of the main loop on sm_90, a product of 256 pixels, 128 output channels and 64 summed channels in 16 bits,
# whatever its epilogue: one more would be work done on every step.
MAIN_TILE, MAIN_LOOP = (256, 128, 64), 115


# Registers and instructions are one compiler's: another version spills elsewhere.
this_compiler = pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason="machine code is held for Triton 3.7")


# Of a share of the kernels, how many products in 16 bits there are to hold: on sm_90, on sm_80, by pointers, of those large.
LEAST = {"first": (80, 20, 25, 20), "all": (150, 50, 60, 50)}


@pytest.fixture(scope="module", params=["first", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What tuning takes first, of sm_80 forward alone; or every candidate of sm_90, and all directions of sm_80."""
    if request.param == "first":
        rest = triton_inspect.inspect((90,), kernel="conv_first_wgrad", processes=1)  # nothing takes it first
        forward = triton_inspect.inspect((80,), kernel="conv_fprop", first_only=True)
        return triton_inspect.inspect((90,), first_only=True) + rest + forward
    return triton_inspect.inspect((90,)) + triton_inspect.inspect((80,), kernel="conv_", first_only=True)


@pytest.fixture
def least(compiled: list[dict[str, Any]], request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    return LEAST[request.node.callspec.params["compiled"]]


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    files = (ROOT / "fastconv" / "kernels").glob("*.py")
    kernels = {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}
    assert {c["kernel"] for c in compiled if c["arch"] == "sm_90"} == kernels


def test_families_and_arithmetic(compiled: list[dict[str, Any]]) -> None:
    """That there is something to hold: every family in every direction, and what the layers were chosen for."""
    on_90 = [c for c in compiled if c["arch"] == "sm_90"]
    products = {(c["family"], c["direction"]) for c in on_90 if c["direction"]}
    directions = ("forward", "input_grad", "weight_grad")
    expected = {(family, direction) for family in ("first", "depthwise", "tma", "pointer") for direction in directions}
    assert products == expected - {("first", "input_grad")}
    assert {c["dtype"] for c in on_90} >= {"bfloat16", "float16", "float32", "tf32"}
    for what in ("pooled", "masked", "dilation", "residual", "3x3/2", "groups 32", "groups 96"):
        assert any(what in c["call"] for c in on_90), what
    assert any(c["tile"].get("BATCH_INNER") for c in on_90), "a pool over boxes whose images lie inside of rows"
    assert any(c["tile"].get("PACK", 1) > 1 for c in on_90), "groups packed into one tile"


@this_compiler
def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    assert [_label(c) for c in compiled if c["stack_bytes"]] == []


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    limits = {f"sm_{capability}": limit for capability, limit in triton_inspect.SHARED_LIMIT.items()}
    assert [_label(c) for c in compiled if c["shared_bytes"] > limits[c["arch"]]] == []


def test_half_precision_runs_on_tensor_cores(compiled: list[dict[str, Any]], least: tuple[int, ...]) -> None:
    """sm_90's own are HGMMA, whose 64 rows narrow outputs do not have: their pixels are the rows."""
    products = [c for c in compiled if c["dtype"] in _HALF and _multiplies(c)]
    for arch, mma, count in (("sm_90", "hgmma", least[0]), ("sm_80", "hmma", least[1])):
        found = [c for c in products if c["arch"] == arch]
        assert len(found) >= count
        assert [_label(c) for c in found if c["mma"] != mma] == []


@this_compiler
def test_loads_of_whole_vectors_are_wide(compiled: list[dict[str, Any]], least: tuple[int, ...]) -> None:
    """All 16 bytes at a time, where a tile has so much for each thread; else some of them."""
    products = [c for c in compiled if c["dtype"] in _HALF and _multiplies(c) and c["family"] == "pointer"]
    products = [c for c in products if c["channels"] % 8 == 0]
    assert len(products) >= least[2]
    assert [_label(c) for c in products if not c["wide_copies"] + c["wide_loads"]] == []
    large = [c for c in products if _least_operand(c) >= 8 * 32 * c["tile"]["num_warps"]]
    assert len(large) >= least[3]
    assert [_label(c) for c in large if c["wide_copies"] != c["copies"]] == []


@this_compiler
def test_the_main_loop_is_short(compiled: list[dict[str, Any]]) -> None:
    """And neither a chain's mask and sums nor the NaN-exact pool in its epilogue costs it anything."""
    main = [c for c in compiled if c["kernel"] == "conv_tma_kernel" and c["dtype"] in _HALF and _tile(c) == MAIN_TILE]
    main = [c for c in main if "/2" not in c["call"]]  # whose columns are found by dividing
    by_epilogue = {
        name: [c["loop_instructions"] for c in main if re.fullmatch(rf".* {pattern}", c["call"])]
        for name, pattern in (("none", r"\S+ forward"), ("pool", "pooled forward"), ("mask", "masked input_grad"))
    }
    assert all(len(loops) >= 3 for loops in by_epilogue.values())
    assert [_label(c) for c in main if not 60 < c["loop_instructions"] <= MAIN_LOOP] == []
    plain = max(by_epilogue["none"])
    assert max(by_epilogue["pool"]) <= plain + 2
    assert max(by_epilogue["mask"]) <= plain + 2


def test_configurations_are_named_uniquely(compiled: list[dict[str, Any]]) -> None:
    """A cubin's file name is made of them."""
    names = [triton_inspect.file_name(c) for c in compiled]
    assert len(set(names)) == len(names)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrowed = ["inspect", "--arch", "sm_80", "--kernel", "global_avg_pool_kernel", "--processes", "1"]
    files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md"), "--dump", str(tmp_path / "cubins")]
    assert main([*narrowed, *files]) == 0
    records = json.loads((tmp_path / "a.json").read_text())
    assert len(records) == 3, "bfloat16 twice, float32"
    assert {c["kernel"] for c in records} == {"global_avg_pool_kernel"} and {c["arch"] for c in records} == {"sm_80"}
    counts = ("registers", "stack_bytes", "shared_bytes", "mma_count", "tma_loads", "loop_instructions")
    assert all(isinstance(c[name], int) for c in records for name in counts)
    cubins = {file.name for file in (tmp_path / "cubins").iterdir()}
    assert cubins == {f"global_avg_pool_kernel.{c['config']}.sm_80.cubin" for c in records}
    for text in (capsys.readouterr().out, (tmp_path / "a.md").read_text()):
        assert f"Triton {triton.__version__}" in text and all(c["config"] in text for c in records)


@pytest.mark.parametrize("option", [["--arch", "sm_70"], ["--kernel", "no_such_kernel"]], ids=" ".join)
def test_command_refuses(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if option[0] == "--arch":
        with pytest.raises(SystemExit):
            main(["inspect", *option])
    else:
        assert main(["inspect", "--processes", "1", *option]) == 1
    assert option[1] in capsys.readouterr().err


def test_descriptors_compile() -> None:
    """Tensor descriptors as arguments: loads by the copy engine, and a loop counted from its label to its branch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"TRITON_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [sys.executable, __file__, folder], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
        )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    assert found["dtype"] == "bfloat16"
    assert found["mma"] == "hgmma"
    assert found["tma_loads"] >= 2, "one for each operand at least"
    assert found["stack_bytes"] == 0
    assert 10 < found["loop_instructions"] < 100
    assert found["signature"]["x_desc"] == "tensordesc<bf16[1, 8, 8, 64]>"
    assert found["signature"]["blocks"] == "i32", "a size that is not to be specialised"
    assert found["signature"]["one"] == "constexpr"
    assert found["signature"]["bias_ptr"] == "constexpr", "None"


_HALF = ("bfloat16", "float16")


def _multiplies(c: dict[str, Any]) -> bool:
    return c["kernel"].startswith("conv_")


def _least_operand(c: dict[str, Any]) -> int:
    """Elements of the smaller operand of a pointer kernel's step."""
    sides = c["tile"]
    rows, columns = sides["BLOCK_N"], sides.get("BLOCK_M") or sides["BLOCK_C"]
    return min(rows, columns) * (sides.get("BLOCK_K") or sides["BLOCK_P"])


def _tile(c: dict[str, Any]) -> tuple[int, int, int]:
    """(pixels, output channels, summed channels)."""
    sides = c["tile"]
    return math.prod(sides[f"BLOCK_{name}"] for name in "BHW"), sides["BLOCK_N"], sides["BLOCK_K"]


def _label(c: dict[str, Any]) -> str:
    return f"{c['kernel']} {c['config']} for {c['call']} on {c['arch']}: {c}"


@triton.jit(do_not_specialize=["blocks"])
def described_kernel(x_desc, weight_desc, y_ptr, bias_ptr, blocks, one, BLOCK: tl.constexpr):
    acc = tl.zeros((64, 64), dtype=tl.float32)
    for block in tl.range(0, blocks, num_stages=3):
        x = tl.reshape(x_desc.load([0, one, 0, block * BLOCK]), (64, BLOCK))
        weight = tl.reshape(weight_desc.load([0, 0, block * BLOCK]), (64, BLOCK))
        acc = tl.dot(weight, tl.trans(x), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr)
    lane = tl.arange(0, 64)
    tl.store(y_ptr + lane[:, None] * 64 + lane[None, :], acc)


def _compile_described(folder: Path) -> dict[str, Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((2, 8, 8, 128), (9, 64, 128)))
    with recording(90) as launches:
        launch(
            described_kernel,
            (1,),
            x_desc=TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 8, 8, 64]),
            weight_desc=TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [1, 64, 64]),
            y_ptr=torch.empty(64, 64, device="meta"),
            bias_ptr=None,
            blocks=2,
            one=1,
            BLOCK=64,
            num_warps=4,
        )
    call = Call("descriptors", "bfloat16", "forward", "tma", 1, 64, True, lambda: None)
    job = triton_inspect.specialise(Recorded(call, launches[0]), 90)
    found = triton_inspect.compile_job(job, folder)
    (code,) = machine_code([folder / triton_inspect.file_name(found)], 90)
    return {**found, **code, "signature": job.signature}


if __name__ == "__main__":
    print(json.dumps(_compile_described(Path(sys.argv[1]))))
