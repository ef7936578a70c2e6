"""PTX, as nvcc writes it, in C++ for the machine: what inline assembly and the compiler have made of the sources is run.

An entry becomes a function of the kernel's own name, which the linker takes in place of g++'s instance of the template.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from emu.ptx_rules import C_TYPES, RULES

_SPECIAL = {"%tid": "threadIdx", "%ctaid": "blockIdx", "%ntid": "blockDim", "%nctaid": "gridDim"}


class Untranslatable(Exception):
    """PTX that the machine does not know."""


@dataclass
class Kernel:
    name: str
    code: str = ""
    instructions: Counter[str] = field(default_factory=Counter)


_MULTIPLY = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "emu::Bf16",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "emu::F16",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": "emu::Tf32",
}
_LOAD_MATRICES = {
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": "false",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": "true",
}


@dataclass
class _Entry:
    """The body of one entry on its way to C++."""

    kernel: Kernel
    parameter_bytes: int
    symbols: frozenset[str]  # of shared memory and of the parameters, both of which start at 0
    registers: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def declare(self, kind: str, prefix: str, count: str) -> None:
        self.registers[prefix] = kind
        self.lines.append(f"{C_TYPES[kind]} {prefix}_[{count}];")

    def register(self, operand: str) -> tuple[str, str]:
        """The C++ variable of a register, and its declared type."""
        match = re.fullmatch(r"%([a-z]+)(\d+)", operand)
        if match is None or match[1] not in self.registers:
            raise Untranslatable(f"operand {operand}")
        return f"{match[1]}_[{match[2]}]", self.registers[match[1]]

    def read(self, operand: str, kind: str) -> str:
        if operand in self.symbols:
            return "0"
        if match := re.fullmatch(r"(%\w+)\.([xyz])", operand):
            if match[1] not in _SPECIAL:
                raise Untranslatable(f"register {operand}")
            return f"{_SPECIAL[match[1]]}.{match[2]}"
        if match := re.fullmatch(r"0([fd])([0-9A-F]+)", operand):
            value = f"emu::as_float(0x{match[2]}u)" if match[1] == "f" else f"ptx::as_double(0x{match[2]}ull)"
            return _convert(value, "f32" if match[1] == "f" else "f64", kind)
        if re.fullmatch(r"-?\d+", operand):
            return f"({C_TYPES[kind]}){operand}{'ll' if operand[0] == '-' else 'ull'}"
        variable, declared = self.register(operand)
        return _convert(variable, declared, kind)

    def write(self, operand: str, kind: str, expression: str) -> str:
        if operand == "_":
            return ""
        variable, declared = self.register(operand)
        return f"{variable} = {_convert(f'({C_TYPES[kind]})({expression})', kind, declared)};"

    def address(self, operand: str) -> str:
        match = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", operand)
        if match is None:
            raise Untranslatable(f"address {operand}")
        base = "0" if match[1] in self.symbols else self.register(match[1])[0]
        return f"{base} + {match[2]}" if match[2] else base

    def instruction(self, name: str, operands: list[str], line: int) -> str:
        self.kernel.instructions[name] += 1
        name = name.removesuffix(".uni")
        rule = RULES.get(name)
        if rule is not None and not any(operand[0] == "{" for operand in operands):
            values = [self.read(operand, kind) for operand, kind in zip(operands[1:], rule.operands, strict=True)]
            return self.write(operands[0], rule.result, rule.expression.format(*values, line=line))
        if name in _MULTIPLY:
            return self._multiply(name, operands, line)
        if name in _LOAD_MATRICES:
            arguments = f"words, {self.address(operands[1])}, {_LOAD_MATRICES[name]}, {line}"
            stores = self._spread(_elements(operands[0]), "b32", "words")
            return f"{{ uint32_t words[4]; emu::load_matrices({arguments}); {stores} }}"
        handler = _HANDLERS.get(name.split(".")[0])
        if handler is None:
            raise Untranslatable(name)
        return handler(self, name, operands, line)

    def _spread(self, registers: list[str], kind: str, array: str) -> str:
        return " ".join(self.write(register, kind, f"{array}[{i}]") for i, register in enumerate(registers))

    def _multiply(self, name: str, operands: list[str], line: int) -> str:
        d, a, b, c = map(_elements, operands)
        words, sums = ", ".join(self.read(x, "b32") for x in a), ", ".join(self.read(x, "f32") for x in c)
        columns = ", ".join(self.read(x, "b32") for x in b)
        return (
            f"{{ float d[4] = {{{sums}}}; const uint32_t a[4] = {{{words}}}, b[2] = {{{columns}}}; "
            f"emu::multiply<{_MULTIPLY[name]}>(d, a, b, {line}); {self._spread(d, 'f32', 'd')} }}"
        )

    def _move(self, name: str, operands: list[str], line: int) -> str:
        """Between a register and its parts."""
        whole = name.removeprefix("mov.")
        parts = _elements(operands[0] if operands[0][0] == "{" else operands[1])
        bits = int(whole[1:]) // len(parts)
        part = f"b{bits}"
        if operands[0][0] == "{":
            value = self.read(operands[1], whole)
            return " ".join(self.write(x, part, f"{value} >> {bits * i}") for i, x in enumerate(parts))
        words = (f"({C_TYPES[whole]}){self.read(x, part)} << {bits * i}" for i, x in enumerate(parts))
        return self.write(operands[0], whole, " | ".join(words))

    def _load(self, name: str, operands: list[str], line: int) -> str:
        space, count, kind = _memory(name, "ld")
        address, registers = self.address(operands[1]), _elements(operands[0])
        if len(registers) != count:
            raise Untranslatable(f"{name} of {len(registers)} registers")
        vector = f"ptx::Vector<{C_TYPES[kind]}, {count}>"
        load_global = "load_global" if ".nc" in name else "load_own"
        load = {
            "param": f"ptx::parameter<{vector}>(parameters, {address}, {line})",
            "shared": f"emu::load_shared<{vector}>({address}, {line})",
            "global": f"emu::{load_global}<{vector}>(reinterpret_cast<const void*>({address}), {line})",
        }[space]
        return f"{{ const auto vector = {load}; {self._spread(registers, kind, 'vector.at')} }}"

    def _store(self, name: str, operands: list[str], line: int) -> str:
        space, count, kind = _memory(name, "st")
        address, values = self.address(operands[0]), [self.read(x, kind) for x in _elements(operands[1])]
        vector = f"ptx::Vector<{C_TYPES[kind]}, {count}>{{{', '.join(values)}}}"
        if space == "shared":
            return f"emu::store_shared({address}, {vector}, {line});"
        return f"emu::store_global(reinterpret_cast<void*>({address}), {vector}, {line});"

    def _copy_async(self, name: str, operands: list[str], line: int) -> str:
        if name == "cp.async.commit_group":
            return "emu::copy_async_commit();"
        if name == "cp.async.wait_group":
            return f"emu::copy_async_wait({self.read(operands[0], 's32')});"
        if name not in ("cp.async.cg.shared.global", "cp.async.cg.shared.global.L2::128B"):
            raise Untranslatable(name)
        shared, source, size, *rest = operands
        size = self.read(size, "u32")
        bytes_there = self.read(rest[0], "u32") if rest else size
        return f"ptx::copy_async({self.address(shared)}, {self.address(source)}, {size}, {bytes_there}, {line});"

    def _shuffle(self, name: str, operands: list[str], line: int) -> str:
        if name != "shfl.sync.bfly.b32":
            raise Untranslatable(name)
        target, *predicate = operands[0].split("|")
        values = ", ".join(self.read(operand, "b32") for operand in operands[1:])
        is_there = "".join(self.write(p, "pred", "true") for p in predicate)  # among all lanes of a warp
        return f"{self.write(target, 'b32', f'ptx::shuffle_xor({values}, {line})')} {is_there}"

    def _barrier(self, name: str, operands: list[str], line: int) -> str:
        if name != "bar.sync" or len(operands) != 1:
            raise Untranslatable(name)
        return f"ptx::barrier({self.read(operands[0], 'u32')}, {line});"

    def _branch(self, name: str, operands: list[str], line: int) -> str:
        return f"goto {_label(operands[0])};"

    def _return(self, name: str, operands: list[str], line: int) -> str:
        return "return;"


_HANDLERS: dict[str, Callable[[_Entry, str, list[str], int], str]] = {
    "mov": _Entry._move,
    "ld": _Entry._load,
    "st": _Entry._store,
    "cp": _Entry._copy_async,
    "shfl": _Entry._shuffle,
    "bar": _Entry._barrier,
    "bra": _Entry._branch,
    "ret": _Entry._return,
}


def _convert(value: str, kind: str, wanted: str) -> str:
    """Bits are kept where one is a float and the other is not, else numbers are."""
    if kind == wanted:
        return value
    if (kind[0] == "f") == (wanted[0] == "f"):
        return f"({C_TYPES[wanted]}){value}"
    if kind[1:] != wanted[1:]:
        raise Untranslatable(f"{kind} in a register of {wanted}")
    if wanted[0] == "f":
        return f"emu::as_float({value})" if wanted == "f32" else f"ptx::as_double({value})"
    return f"emu::as_bits({value})" if kind == "f32" else f"ptx::as_bits({value})"


def _memory(name: str, access: str) -> tuple[str, int, str]:
    """State space, number of elements and their type."""
    spaces = "param|shared|global" if access == "ld" else "shared|global"
    match = re.fullmatch(rf"{access}\.({spaces})(\.nc)?(?:\.v([24]))?\.(\w+)", name)
    if match is None or match[4] not in C_TYPES:
        raise Untranslatable(name)
    return match[1], int(match[3] or 1), match[4]


def _elements(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{}").split(",")]


def _label(name: str) -> str:
    return name.replace("$", "")


_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;")
_HINTS = (".maxntid", ".minnctapersm", ".pragma", ".reqntid")  # they change no result


def translate(ptx: str, pattern: str = "") -> list[Kernel]:
    """The entries in whose names `pattern` is found.

    Raises:
        Untranslatable: an instruction is not known; the message has its line.
    """
    shared = frozenset(re.findall(r"^\.extern \.shared .*?(\w+)\[\];", ptx, re.MULTILINE))
    kernels: list[Kernel] = []
    entry: _Entry | None = None
    name = ""
    for number, raw in enumerate(ptx.splitlines(), 1):
        line = raw.partition("//")[0].strip()
        try:
            if match := re.fullmatch(r"\.visible \.entry (\w+)\(", line):
                name = match[1] if re.search(pattern, match[1]) else ""
            elif name and (match := re.fullmatch(r"\.param \.align 8 \.b8 (\w+)\[(\d+)\]", line)):
                entry = _Entry(Kernel(name), int(match[2]), shared | {match[1]})
            elif line == "}" and entry is not None:
                kernels.append(_finish(entry))
                entry, name = None, ""
            elif entry is not None:
                _translate_line(entry, line, number)
        except (Untranslatable, ValueError) as error:
            raise Untranslatable(f"line {number} of {name}: {line}: {error}") from error
    return kernels


def _translate_line(entry: _Entry, line: str, number: int) -> None:
    if line in ("", "{", ")") or line.startswith(_HINTS):
        return
    if match := _REGISTERS.fullmatch(line):
        entry.declare(match[1], match[2], match[3])
    elif match := re.fullmatch(r"(\$\w+):", line):
        entry.lines.append(f"{_label(match[1])}:;")
    elif match := _INSTRUCTION.fullmatch(line):
        code = entry.instruction(match[3], _OPERAND.findall(match[4]), number)
        if match[2]:
            code = f"if ({match[1]}{entry.register(match[2])[0]}) {{ {code} }}"
        entry.lines.append(code)
    else:
        raise Untranslatable("not an instruction")


def _finish(entry: _Entry) -> Kernel:
    """The count of threads tells tests that a launch came here."""
    kernel = entry.kernel
    body = "\n".join(entry.lines)
    kernel.code = (
        f'extern "C" {{\nuint64_t threads_of_{kernel.name};\n'
        f"void {kernel.name}(const ptx::Parameters<{entry.parameter_bytes}> parameters) {{\n"
        f"++threads_of_{kernel.name};\n{body}\n}}\n}}\n"
    )
    return kernel


def source(kernels: Iterable[Kernel]) -> str:
    return '#include "ptx.h"\n#include <algorithm>\n' + "\n".join(kernel.code for kernel in kernels)
