"""Every Triton kernel compiled for sm_80 and sm_90 as the launchers launch it, and its machine code read; no GPU is needed.

The interpreter accepts code that the compiler rejects. What is compiled is listed in fastconv/backends/triton_calls.py:
calls of new launchers belong there, and the assertions here hold for them too.
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

ROOT = Path(__file__).parents[1]
# Instructions of the loop of a product of (pixels, output channels, summed channels) in 16 bits on sm_90, by the family of
# kernels and whatever its epilogue: one more would be work done on every step.
LOOPS = {
    ("tma", 256, 128, 64): 115,
    ("tma", 128, 128, 64): 136,
    ("pointer", 256, 128, 64): 188,
    ("pointer", 128, 128, 64): 136,
}


@pytest.fixture(scope="session")
def compiled() -> list[dict[str, Any]]:
    return triton_inspect.inspect((80, 90))


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    folder = ROOT / "fastconv" / "kernels"
    kernels = {name for file in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}
    for arch in ("sm_80", "sm_90"):
        assert {c["kernel"] for c in compiled if c["arch"] == arch} == kernels


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    assert [_label(c) for c in compiled if c["stack_bytes"]] == []


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    limits = {f"sm_{capability}": limit for capability, limit in triton_inspect.SHARED_LIMIT.items()}
    assert [_label(c) for c in compiled if c["shared_bytes"] > limits[c["arch"]]] == []


def test_half_precision_runs_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    """Everywhere, and on sm_90 by its own instructions."""
    products = [c for c in compiled if c["direction"] and c["kernel"].startswith("conv_") and c["dtype"] in _HALF]
    assert len(products) >= 100
    assert [_label(c) for c in products if c["mma"] != ("hgmma" if c["arch"] == "sm_90" else "hmma")] == []


def test_loads_of_whole_vectors_are_wide(compiled: list[dict[str, Any]]) -> None:
    """Operands come by the copy engine, or 16 bytes at a time, 8 where a tile has no more for each thread."""
    products = [c for c in compiled if c["direction"] and c["kernel"].startswith("conv_") and c["dtype"] in _HALF]
    products = [c for c in products if c["channels"] % 8 == 0 and not c["tma_loads"]]
    assert len(products) >= 80
    assert [_label(c) for c in products if not c["wide_copies"] + c["wide_loads"]] == []
    large = [c for c in products if c["channels"] >= 64]
    assert [_label(c) for c in large if c["wide_copies"] != c["copies"]] == []


def test_loops_are_short(compiled: list[dict[str, Any]]) -> None:
    products = [c for c in compiled if c["arch"] == "sm_90" and c["direction"] in ("forward", "input_grad")]
    products = [c for c in products if c["dtype"] in _HALF and c["channels"] >= 64 and (c["family"], *_tile(c)) in LOOPS]
    products = [c for c in products if "/2" not in c["call"]]  # whose pixels are numbered in phases
    assert len(products) >= 10
    assert [_label(c) for c in products if not 0 < c["loop_instructions"] <= LOOPS[(c["family"], *_tile(c))]] == []


def test_a_pool_costs_the_loop_nothing(compiled: list[dict[str, Any]]) -> None:
    forward = [c for c in compiled if c["arch"] == "sm_90" and c["direction"] == "forward" and c["channels"] >= 64]
    pooled = {(c["call"], c["dtype"], c["family"], *_sides(c)): c for c in forward if "pooled" in c["call"]}
    pairs = [
        (c["loop_instructions"], other["loop_instructions"])
        for c in forward
        if (other := pooled.get((c["call"].replace("forward", "pooled forward"), c["dtype"], c["family"], *_sides(c))))
    ]
    assert len(pairs) >= 5
    assert [(plain, pool) for plain, pool in pairs if pool > plain + 2] == []


def test_configurations_are_named_uniquely(compiled: list[dict[str, Any]]) -> None:
    """A cubin's file name is made of them."""
    names = [triton_inspect.file_name(c) for c in compiled]
    assert len(set(names)) == len(names)


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


def _sides(c: dict[str, Any]) -> tuple[int, ...]:
    return tuple(c["tile"].values())


def _tile(c: dict[str, Any]) -> tuple[int, int, int]:
    """(pixels, output channels, summed channels)."""
    sides = {name: size for name, size in c["tile"].items() if name.startswith("BLOCK_")}
    channels, summed = sides.pop("BLOCK_N", 0), sides.pop("BLOCK_K", 0)
    return math.prod(sides.values()), channels, summed


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
    call = Call("descriptors", "bfloat16", "forward", "tma", 1, 64, lambda: None)
    job = triton_inspect.specialise(Recorded(call, launches[0]), 90)
    found = triton_inspect.compile_job(job, folder)
    (code,) = machine_code([folder / triton_inspect.file_name(found)], 90)
    return {**found, **code, "signature": job.signature}


if __name__ == "__main__":
    print(json.dumps(_compile_described(Path(sys.argv[1]))))
