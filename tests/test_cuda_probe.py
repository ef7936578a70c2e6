"""The emulation's model of fragments and conversions: against matrix products, and against what GPUs have answered.

On a GPU the probe is compiled by nvcc and answers itself; its answers are left as <chip>.json, and those that are kept under
tests/emu/golden are compared with from then on.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from emu import build, device_code
from torch import Tensor

GOLDEN = build.HERE / "golden"
LANES, OPERANDS, MATRIX_WORDS, VALUES = 32, 10, 256, 8
KINDS = ("bfloat16", "float16", "tf32")


class Probe:
    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.inputs, self.outputs = self._library.probe_inputs(), self._library.probe_outputs()

    def __call__(self, words: Sequence[int]) -> list[int]:
        assert len(words) == self.inputs
        given, answer = (ctypes.c_uint32 * self.inputs)(*words), (ctypes.c_uint32 * self.outputs)()
        error = self._library.probe(given, answer)
        assert error == 0, f"CUDA's error {error}"
        return list(answer)


@pytest.fixture(scope="module")
def emulated() -> Probe:
    if (reason := build.unavailable()) is not None:
        pytest.skip(reason)
    objects = build.compile_objects([build.HERE / "probe.cu", build.HERE / "machine.cpp"])
    return Probe(build.link(objects, build.BUILD / "probe.so"))


def bits(values: Tensor) -> list[int]:
    """Of float32 values one word each; of 16-bit ones one for two."""
    return [word & 0xFFFFFFFF for word in values.contiguous().view(torch.int32).flatten().tolist()]


def products() -> list[tuple[Tensor, Tensor, Tensor]]:
    """(a [16, k], b [k, 8], d [16, 8]) of each kind: small integers, exact in every dtype and every order of summation."""
    return [tuple(torch.randint(-8, 9, shape).float() for shape in ((16, k), (k, 8), (16, 8))) for k in (16, 16, 8)]  # type: ignore[misc]


def fragments(kind: int, a: Tensor, b: Tensor, d: Tensor) -> list[int]:
    """The operands of all lanes, as PTX ISA lays out mma.m16n8k16 and mma.m16n8k8."""
    dtype = (torch.bfloat16, torch.float16, torch.float32)[kind]
    each = 2 if kind < 2 else 1  # elements of a word
    half = a.shape[1] // 2
    words: list[int] = []
    for lane in range(LANES):
        group, member = lane // 4, lane % 4
        first = slice(member * each, member * each + each)
        second = slice(half + member * each, half + member * each + each)
        rows = [a[row, k] for k in (first, second) for row in (group, group + 8)]
        columns = [b[k, group] for k in (first, second)]
        sums = [d[row, 2 * member + e] for row in (group, group + 8) for e in (0, 1)]
        words += bits(torch.stack([*rows, *columns]).to(dtype)) + bits(torch.stack(sums))
    return words


def special_values() -> Tensor:
    """Numbers between those of the 16-bit dtypes and TF32, ties, the smallest and largest, infinities and NaN."""
    values = torch.randn(LANES * VALUES) * 10.0 ** torch.randint(-9, 9, (LANES * VALUES,))
    ties = [
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-11,
        1 + 3 * 2**-11,
        65519.0,
        65520.0,
        2**-25,
        3 * 2**-25,
        6e-8,
        1e-40,
        0.0,
        -0.0,
    ]
    extremes = [3.4e38, -3.4e38, float("inf"), -float("inf"), float("nan")]
    values[: len(ties + extremes)] = torch.tensor(ties + extremes)
    return values


def inputs() -> tuple[list[int], list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """What is asked: all words, and what products and matrices they stand for."""
    operands = products()
    matrices = torch.randint(-(2**31), 2**31 - 1, (MATRIX_WORDS,), dtype=torch.int32)
    words = [word for kind, (a, b, d) in enumerate(operands) for word in fragments(kind, a, b, d)]
    return words + bits(matrices) + bits(special_values()), operands, matrices


def test_products(emulated: Probe) -> None:
    words, operands, _ = inputs()
    answer = torch.tensor(emulated(words), dtype=torch.int64).to(torch.uint32).view(torch.float32).view(LANES, -1)
    for kind, (a, b, d) in enumerate(operands):
        expected = d + a @ b
        for lane in range(LANES):
            group, member = lane // 4, lane % 4
            own = torch.stack([expected[row, 2 * member + e] for row in (group, group + 8) for e in (0, 1)])
            assert torch.equal(answer[lane, 4 * kind : 4 * kind + 4], own), f"{KINDS[kind]}, lane {lane}"


def test_matrices(emulated: Probe) -> None:
    """Rows that lanes ask for, of four 8×8 matrices; a lane's pair of row lane / 4, or of column lane / 4."""
    words, _, matrices = inputs()
    rows = matrices.view(torch.int16).view(LANES, 16)[:, 8:]
    asked = rows[[lane * 5 % LANES for lane in range(LANES)]].view(4, 8, 8)
    answer = torch.tensor(emulated(words), dtype=torch.int64).to(torch.uint32).view(torch.int16).view(LANES, -1, 2)
    for lane in range(LANES):
        pair = slice(lane % 4 * 2, lane % 4 * 2 + 2)
        assert torch.equal(answer[lane, 12:16], asked[:, lane // 4, pair])
        assert torch.equal(answer[lane, 16:20], asked[:, pair, lane // 4])


def test_conversions(emulated: Probe) -> None:
    """As torch rounds, NaN being NaN; TF32's ties go away from zero."""
    words, _, _ = inputs()
    values = torch.tensor(words[-LANES * VALUES :], dtype=torch.int64).to(torch.uint32).view(torch.float32)
    answer = torch.tensor(emulated(words), dtype=torch.int64).view(LANES, -1)[:, 20:].reshape(LANES * VALUES, 6)
    for column, dtype in ((1, torch.bfloat16), (2, torch.float16)):
        converted = answer[:, column].to(torch.int16).view(dtype)
        torch.testing.assert_close(converted, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    finite = values.isfinite() & (values.abs() > 1e-30) & (values.abs() < 3e38)
    exact = values[finite].double()
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.ones_like(exact), exponent - 11)
    rounded = torch.sign(exact) * torch.floor(exact.abs() / unit + 0.5) * unit
    tf32 = answer[:, 0].to(torch.uint32).view(torch.float32)[finite]
    assert torch.equal(tf32.double(), rounded)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_as_a_gpu_answered(path: Path, emulated: Probe) -> None:
    kept = json.loads(path.read_text())
    assert same(emulated(kept["in"]), kept["out"])


def same(answer: Sequence[int], other: Sequence[int]) -> bool:
    """Word by word; conversions of a NaN may leave any NaN."""
    return list(map(_canonical, answer, range(len(answer)))) == list(map(_canonical, other, range(len(other))))


def _canonical(word: int, index: int) -> int:
    column = index % 68 - 20
    if column < 0:
        return word
    kind = column % 6
    halves = {1: "bf16", 2: "f16", 3: "bf16", 4: "f16"}.get(kind)
    if halves is None:
        return 0x7FC00000 if word & 0x7FFFFFFF > 0x7F800000 else word
    infinity = 0x7F80 if halves == "bf16" else 0x7C00
    parts = (0x7FFF if part & 0x7FFF > infinity else part for part in (word & 0xFFFF, word >> 16))
    low, high = parts
    return low | high << 16


@pytest.mark.gpu
def test_on_a_gpu(emulated: Probe, tmp_path: Path) -> None:
    compiler = device_code.nvcc()
    if compiler is None:
        pytest.skip("no nvcc")
    library = tmp_path / "probe.so"
    major, minor = torch.cuda.get_device_capability()
    command = [compiler, "-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}"]
    build.run([*command, f"-I{device_code.CUDA}", str(build.HERE / "probe.cu"), "-o", str(library)])
    words, _, _ = inputs()
    answer = Probe(library)(words)
    chip = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    folder = Path(os.environ.get("OUT", "runs/gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"probe-{chip}.json").write_text(json.dumps({"in": words, "out": answer}))
    assert same(answer, emulated(words))
