"""Every Triton kernel compiled for sm_80 and sm_90 as the launchers launch it, and its machine code read; no GPU is needed.

The interpreter accepts code that the compiler rejects, so a process without TRITON_INTERPRET runs this file as a script:
it calls the launchers on tensors without data, and compiles what they would have launched.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

ARCHITECTURES = {80: 166_912, 90: 232_448}  # bytes of shared memory that one program may have
CAST = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32"}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"TRITON_CACHE_DIR": folder, "PYTHONPATH": str(root)}
        run = subprocess.run(
            [sys.executable, __file__], capture_output=True, text=True, env=environment, cwd=root, timeout=600
        )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    folder = Path(__file__).parents[1] / "fastconv" / "kernels"
    kernels = {name for file in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}
    by_descriptors = {name for name in kernels if "_tma_" in name}
    assert {c["kernel"] for c in compiled if c["architecture"] == 90} == kernels
    assert {c["kernel"] for c in compiled if c["architecture"] == 80} == kernels - by_descriptors


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    assert [_label(c) for c in compiled if c["stack"]] == []


def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    assert [_label(c) for c in compiled if c["shared"] > ARCHITECTURES[c["architecture"]]] == []


def test_half_precision_runs_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    """Everywhere; and by sm_90's own instructions where a tile has the 64 rows that they take."""
    products = [c for c in compiled if c["kernel"].startswith("conv_") and c["call"].endswith("bfloat16")]
    assert len(products) >= 16
    assert [_label(c) for c in products if not c["HMMA"] + c["HGMMA"]] == []
    large = [c for c in products if c["call"].startswith("3x3") and c["architecture"] == 90]
    assert [_label(c) for c in large if not c["HGMMA"]] == []


def test_loads_of_whole_vectors_are_wide(compiled: list[dict[str, Any]]) -> None:
    """Operands come by asynchronous copies of 16 bytes."""
    products = [c for c in compiled if c["kernel"].startswith("conv_") and c["call"].startswith("3x3")]
    products = [c for c in products if c["call"].endswith("bfloat16") and c["architecture"] == 80]
    assert len(products) >= 6
    assert [_label(c) for c in products if not c["copies"] or c["copies"] != c["wide_copies"]] == []


def _label(c: dict[str, Any]) -> str:
    return f"{c['kernel']} for {c['call']} on sm_{c['architecture']}: {c}"


def _launch_everything(note: Any) -> None:
    """Calls as training makes them: 3×3 with and without a pool, stride 2, a stem, odd channels; every pooling."""
    for dtype in (torch.bfloat16, torch.float32):
        _launch_convolution(note, "3x3", (8, 128, 28, 28), (128, 3, 3), 1, 1, dtype, full=True)
        _launch_pools(note, (8, 64, 29, 29), dtype)
    _launch_convolution(note, "3x3 tf32", (8, 128, 28, 28), (128, 3, 3), 1, 1, torch.float32, tf32=True)
    _launch_convolution(note, "3x3 stride 2", (8, 64, 56, 56), (64, 3, 3), 2, 1, torch.bfloat16)
    _launch_convolution(note, "stem", (8, 3, 64, 64), (64, 7, 7), 2, 3, torch.bfloat16)
    _launch_convolution(note, "odd channels", (2, 21, 9, 9), (35, 3, 3), 1, 1, torch.bfloat16)


def _launch_convolution(
    note: Any,
    name: str,
    input_shape: tuple[int, int, int, int],
    kernel: tuple[int, int, int],
    stride: int,
    padding: int,
    dtype: torch.dtype,
    tf32: bool = False,
    full: bool = False,
) -> None:
    from fastconv.backends import triton
    from fastconv.geometry import ConvGeometry, PoolGeometry
    from fastconv.precision import Policy

    note(f"{name} {str(dtype).removeprefix('torch.')}")
    weight_shape = (kernel[0], input_shape[1], *kernel[1:])
    g = ConvGeometry.of("conv", input_shape, weight_shape, None, (stride, stride), (padding, padding), (1, 1), 1)
    policy = Policy(dtype, tf32)
    x, weight, grad = _shape_only(input_shape, dtype), _shape_only(weight_shape, dtype), _shape_only(g.output_shape, dtype)
    bias = torch.empty(kernel[0], dtype=dtype, device="meta")
    triton.conv2d(x, weight, bias, grad if full else None, g, policy, relu=True)
    if input_shape[1] > 3:  # a first layer's input needs no gradient
        triton.conv2d_input_grad(grad, weight, g, policy)
    triton.conv2d_weight_grad(grad, x, g, policy)
    if full:
        pool = PoolGeometry.of("pool", g.output_shape, (2, 2), (2, 2), (0, 0), (1, 1), False)
        triton.conv2d_relu_max_pool2d(x, weight, bias, g, pool, policy)
        triton.conv2d_input_grad_relu(grad, weight, x, g, policy, with_bias=True)


def _launch_pools(note: Any, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from fastconv.backends import triton
    from fastconv.geometry import PoolGeometry

    note(f"pools {str(dtype).removeprefix('torch.')}")
    x = _shape_only(shape, dtype)
    for kernel, padding in (((3, 3), (1, 1)), ((2, 2), (0, 0))):
        pool = PoolGeometry.of("pool", shape, kernel, (2, 2), padding, (1, 1), False)
        grad, code = _shape_only(pool.output_shape, dtype), _shape_only(pool.output_shape, pool.code_dtype)
        triton.max_pool2d_backward(grad, code, pool, with_bias=True)
    triton.max_pool2d(x, pool, relu=True)
    triton.relu_backward(x, x, with_bias=True)
    triton.avg_pool2d(x, pool, True, None)
    triton.avg_pool2d_backward(grad, pool, False, None)
    triton.global_avg_pool2d(x)
    triton.global_avg_pool2d_backward(_shape_only((*shape[:2], 1, 1), dtype), *shape[2:])


def _shape_only(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


class _Compiler:
    """Compiles recorded launches with their own arguments, each once for an architecture."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture
        self._seen: set[Any] = set()

    def compile(self, call: str, launch: Any) -> None:
        from triton import compile as compile_for
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kernel, arguments = launch.kernel, dict(launch.arguments)
        options = {name: arguments.pop(name) for name in ("num_warps",) if name in arguments}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = arguments[parameter.name]
            is_specialized = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (is_specialized and type(value) is int and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
                continue
            if hasattr(value, "base"):
                signature[parameter.name] = f"tensordesc<{CAST[value.base.dtype][1:]}{list(value.block_shape)}>"
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = CAST[value.dtype] if is_tensor else "i32"
            if is_tensor or (is_specialized and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        key = (kernel.__name__, *signature.items(), *constants.items(), *attributes)
        if key in self._seen:
            return
        self._seen.add(key)
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        result = compile_for(source, target=GPUTarget("cuda", self._architecture, 32), options=options)
        found = {"kernel": kernel.__name__, "call": call, "architecture": self._architecture}
        print(json.dumps(found | _machine_code(result, kernel.__name__.startswith("conv_"))), flush=True)


def _machine_code(result: Any, is_product: bool) -> dict[str, int]:
    import triton

    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([dump, "-res-usage", file.name], text=True)
        code = subprocess.check_output([dump, "-sass", file.name], text=True) if is_product else ""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    patterns = {"HMMA": r"\bHMMA", "HGMMA": r"\bHGMMA", "copies": r"\bLDGSTS", "wide_copies": r"\bLDGSTS\S*\.128"}
    counts = {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()}
    return {"registers": int(registers), "stack": int(stack), "shared": result.metadata.shared, **counts}


def _main() -> None:
    from fastconv.backends.triton_launch import recording

    for architecture in ARCHITECTURES:
        compiler = _Compiler(architecture)
        with recording(architecture) as launches:
            calls: list[tuple[int, str]] = []
            _launch_everything(lambda call, calls=calls, launches=launches: calls.append((len(launches), call)))
        for index, launch in enumerate(launches):
            compiler.compile(next(call for start, call in reversed(calls) if start <= index), launch)


if __name__ == "__main__":
    _main()
