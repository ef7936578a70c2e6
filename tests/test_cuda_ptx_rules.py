"""The translator of PTX: instructions one by one, against values that the PTX ISA says, and what it refuses."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from emu import build, ptx
from torch import Tensor

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

NAN, INF, ONE, TWO, THREE, ZERO, MINUS_ZERO = (
    f"0f{bits}" for bits in ("7FFFFFFF", "7F800000", "3F800000", "40000000", "40400000", "00000000", "80000000")
)
# instruction, the type its result is stored as, operands, the result's bits
CASES = [
    ("add.s32", "u32", ("2147483647", "1"), 0x80000000),
    ("sub.s64", "u64", ("0", "1"), 2**64 - 1),
    ("mul.lo.s32", "u32", ("-65536", "65537"), 0xFFFF0000),
    ("mul.hi.u32", "u32", ("4294967295", "4294967295"), 0xFFFFFFFE),
    ("mul.hi.s32", "u32", ("-1", "1"), 0xFFFFFFFF),
    ("mul.wide.s32", "u64", ("-2", "3"), 2**64 - 6),
    ("mul.wide.u16", "u32", ("65535", "65535"), 65535**2),
    ("mad.lo.s32", "u32", ("-3", "5", "7"), 2**32 - 8),
    ("mad.wide.u32", "u64", ("4294967295", "2", "3"), 2**33 + 1),
    ("div.s32", "u32", ("-7", "2"), 2**32 - 3),
    ("div.s32", "u32", ("-2147483648", "-1"), 0x80000000),
    ("div.u32", "u32", ("4294967295", "4294967295"), 1),
    ("rem.s32", "u32", ("-7", "2"), 2**32 - 1),
    ("rem.u32", "u32", ("7", "4294967295"), 7),
    ("min.s32", "u32", ("-1", "1"), 2**32 - 1),
    ("max.u32", "u32", ("-1", "1"), 2**32 - 1),
    ("shl.b32", "u32", ("1", "32"), 0),
    ("shr.u32", "u32", ("2147483648", "31"), 1),
    ("shr.s32", "u32", ("-2147483648", "40"), 2**32 - 1),
    ("shr.s32", "u32", ("-8", "1"), 2**32 - 4),
    ("shf.l.wrap.b32", "u32", ("2147483648", "1", "33"), 3),
    ("shf.r.wrap.b32", "u32", ("2147483648", "1", "1"), 0xC0000000),
    ("bfe.u32", "u32", ("4660", "4", "8"), 0x23),
    ("bfe.s32", "u32", ("4080", "4", "8"), 2**32 - 1),
    ("bfe.s32", "u32", ("-2147483648", "31", "5"), 2**32 - 1),
    ("bfi.b32", "u32", ("255", "305419896", "8", "4"), 0x12345F78),
    ("prmt.b32", "u32", ("305419896", "2596069104", "36116"), 0x00FF56F0),
    ("not.b32", "u32", ("0",), 2**32 - 1),
    ("neg.s32", "u32", ("5",), 2**32 - 5),
    ("xor.pred", "pred", ("1", "1"), 0),
    ("selp.b32", "u32", ("5", "6", "0"), 6),
    ("cvt.s64.s32", "u64", ("-1",), 2**64 - 1),
    ("cvt.u64.u32", "u64", ("-1",), 2**32 - 1),
    ("cvt.s32.s8", "u32", ("255",), 2**32 - 1),
    ("cvt.rn.f32.s32", "f32", ("16777219",), 0x4B800002),
    ("cvt.rn.f32.f64", "f32", ("0d3FF0000030000000",), 0x3F800002),
    ("cvt.f32.f16", "f32", ("1",), 0x33800000),
    ("cvt.rn.bf16x2.f32", "u32", (ONE, TWO), 0x3F804000),
    ("cvt.rn.f16x2.f32", "u32", (ONE, TWO), 0x3C004000),
    ("cvt.rna.tf32.f32", "u32", ("0f3F801000",), 0x3F802000),
    ("fma.rn.f32", "f32", ("0f3F800001", "0f3F800001", "0fBF800002"), 0x28800000),
    ("div.rn.f32", "f32", (ONE, THREE), 0x3EAAAAAB),
    ("rcp.rn.f32", "f32", (ZERO,), 0x7F800000),
    ("sqrt.rn.f32", "f32", (TWO,), 0x3FB504F3),
    ("min.f32", "f32", (NAN, ONE), 0x3F800000),
    ("max.f32", "f32", (ONE, NAN), 0x3F800000),
    ("min.f32", "f32", (ZERO, MINUS_ZERO), 0x80000000),
    ("max.f32", "f32", (MINUS_ZERO, ZERO), 0),
    ("neg.f32", "f32", (ZERO,), 0x80000000),
    *((f"setp.{name}.f32", "pred", (NAN, ONE), is_true) for name, is_true in (("eq", 0), ("ne", 0), ("lt", 0), ("nan", 1))),
    *((f"setp.{name}u.f32", "pred", (NAN, ONE), 1) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(
        (f"setp.{name}.f32", "pred", (INF, ONE), is_true)
        for name, is_true in (("num", 1), ("gtu", 1), ("leu", 0), ("equ", 0))
    ),
    ("setp.lt.s32", "pred", ("-1", "0"), 1),
    ("setp.lt.u32", "pred", ("-1", "0"), 0),
]
REGISTERS = {"u32": ("%r1", "u32"), "u64": ("%rd2", "u64"), "f32": ("%f1", "f32"), "pred": ("%r1", "u32")}
RUN = """
#include "ptx.h"

extern "C" void instructions(ptx::Parameters<24>);

extern "C" void run(uint64_t* results, int count) {
  ptx::Parameters<24> parameters{};
  memcpy(parameters.bytes, &results, sizeof results);
  emu::allow(results, count * sizeof *results, true);
  emu::launch(dim3(1), dim3(32), 0, [&] { instructions(parameters); });
  emu::forbid_all();
}
"""


def entry(*lines: str) -> str:
    head = ".visible .entry instructions(\n.param .align 8 .b8 parameters[24]\n)\n{\n"
    registers = ".reg .pred %p<2>;\n.reg .b32 %r<2>;\n.reg .b64 %rd<3>;\n.reg .f32 %f<2>;\n.reg .b16 %rs<3>;\n"
    return head + registers + "\n".join(lines) + "\n}\n"


def test_instructions(tmp_path: Path) -> None:
    own = [
        "mov.u32 %r1, %tid.x;",
        f"mul.wide.u32 %rd2, %r1, {8 * len(CASES)};",
        "add.s64 %rd1, %rd1, %rd2;",
    ]  # a thread's row
    lines = ["ld.param.u64 %rd1, [parameters];", *own]
    for i, (name, kind, operands, _) in enumerate(CASES):
        register, stored = REGISTERS[kind]
        target = "%p1" if kind == "pred" else register
        lines.append(f"{name} {target}, {', '.join(operands)};")
        if kind == "pred":
            lines.append(f"selp.u32 {register}, 1, 0, %p1;")
        lines.append(f"st.global.{stored} [%rd1+{8 * i}], {register};")
    (kernel,) = ptx.translate(entry(*lines, "ret;"))
    assert kernel.instructions.total() == len(lines) + 1
    files = {"instructions": ptx.source([kernel]), "run": RUN}
    for stem, text in files.items():
        (tmp_path / f"{stem}.cpp").write_text(text)
    flags = ("-O0", "-w", "-fwrapv")
    objects = build.compile_objects(
        [*(tmp_path / f"{stem}.cpp" for stem in files), build.HERE / "machine.cpp"], flags, folder=tmp_path
    )
    library = ctypes.CDLL(str(build.link(objects, tmp_path / "instructions.so")))
    rows = torch.zeros(32, len(CASES), dtype=torch.int64)
    library.run(ctypes.c_void_p(rows.data_ptr()), rows.numel())
    for row in rows:
        check(row)


def check(results: Tensor) -> None:
    for (name, _, operands, expected), result in zip(CASES, results.tolist(), strict=True):
        assert result % 2**64 == expected, f"{name} {operands}: {result % 2**64:#x}, not {expected:#x}"


@pytest.mark.parametrize(
    "line",
    [
        "sin.approx.f32 %f1, %f1;",
        "add.ftz.f32 %f1, %f1, %f1;",
        "ld.local.u32 %r1, [%rd1];",
        "ld.u32 %r1, [%rd1];",
        "atom.global.add.u32 %r1, [%rd1], 1;",
        "cp.async.ca.shared.global [%r1], [%rd1], 4;",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r1}, {%f1};",
        "add.s32 %r1, %q1, 1;",
        "mov.u32 %r1, somewhere;",
        "mov.u32 %r1, %laneid;",
        "add.s32 %r1, 1;",
        ".local .align 4 .b8 depot[8];",
    ],
)
def test_what_is_not_known_is_an_error(line: str) -> None:
    with pytest.raises(ptx.Untranslatable, match=r"line 11 of instructions: "):
        ptx.translate(entry("ret;", line))
