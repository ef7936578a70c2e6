"""Instructions of PTX without side effects, as expressions of C++."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

C_TYPES = {
    "pred": "bool",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
}


@dataclass(frozen=True)
class Rule:
    """An instruction without side effects: its result is an expression of its operands."""

    result: str
    operands: tuple[str, ...]
    expression: str  # {0}, {1}, … are the operands, {line} the line of PTX


def _integer_rules() -> Iterable[tuple[str, Rule]]:
    for bits in (16, 32, 64):
        signed, unsigned, plain = f"s{bits}", f"u{bits}", f"b{bits}"
        for name, operator in {"add": "+", "sub": "-", "mul.lo": "*"}.items():
            for kind in (signed, unsigned):
                yield f"{name}.{kind}", Rule(kind, (unsigned, unsigned), f"{{0}} {operator} {{1}}")
        for kind in (signed, unsigned):
            yield f"mad.lo.{kind}", Rule(kind, (unsigned,) * 3, "{0} * {1} + {2}")
            yield f"div.{kind}", Rule(kind, (kind, kind), "ptx::divide({0}, {1}, {line})")
            yield f"rem.{kind}", Rule(kind, (kind, kind), "ptx::remainder({0}, {1}, {line})")
            yield f"min.{kind}", Rule(kind, (kind, kind), "std::min({0}, {1})")
            yield f"max.{kind}", Rule(kind, (kind, kind), "std::max({0}, {1})")
            yield f"shr.{kind}", Rule(kind, (kind, "u32"), "ptx::shift_right({0}, {1})")
        yield f"neg.{signed}", Rule(signed, (unsigned,), "-{0}")
        yield f"abs.{signed}", Rule(signed, (signed,), "{0} < 0 ? -{0} : {0}")
        yield f"shl.{plain}", Rule(plain, (plain, "u32"), "ptx::shift_left({0}, {1})")
        yield f"shr.{plain}", Rule(plain, (plain, "u32"), "ptx::shift_right({0}, {1})")
        yield f"not.{plain}", Rule(plain, (plain,), "~{0}")
        for name, operator in {"and": "&", "or": "|", "xor": "^"}.items():
            yield f"{name}.{plain}", Rule(plain, (plain, plain), f"{{0}} {operator} {{1}}")
    for bits in (16, 32):
        for kind, wide in ((f"{k}{bits}", f"{k}{2 * bits}") for k in "su"):
            product = f"({C_TYPES[wide]}){{0}} * {{1}}"
            yield f"mul.wide.{kind}", Rule(wide, (kind, kind), product)
            yield f"mad.wide.{kind}", Rule(wide, (kind, kind, wide), f"{product} + {{2}}")
            yield f"mul.hi.{kind}", Rule(kind, (kind, kind), f"({product}) >> {bits}")


def _bit_rules() -> Iterable[tuple[str, Rule]]:
    for name, operator in {"and": "&&", "or": "||", "xor": "!="}.items():
        yield f"{name}.pred", Rule("pred", ("pred", "pred"), f"{{0}} {operator} {{1}}")
    yield "not.pred", Rule("pred", ("pred",), "!{0}")
    yield "bfe.u32", Rule("u32", ("u32",) * 3, "ptx::extract_bits({0}, {1}, {2})")
    yield "bfe.s32", Rule("s32", ("s32", "u32", "u32"), "ptx::extract_bits({0}, {1}, {2})")
    yield "bfi.b32", Rule("b32", ("b32",) * 4, "ptx::insert_bits({0}, {1}, {2}, {3})")
    yield "prmt.b32", Rule("b32", ("b32",) * 3, "ptx::permute({0}, {1}, {2})")
    yield "shf.l.wrap.b32", Rule("b32", ("b32",) * 3, "ptx::funnel_left({0}, {1}, {2})")
    yield "shf.r.wrap.b32", Rule("b32", ("b32",) * 3, "ptx::funnel_right({0}, {1}, {2})")
    for kind, c_type in C_TYPES.items():
        if not kind.endswith("8"):
            yield f"mov.{kind}", Rule(kind, (kind,), "{0}")
            yield f"selp.{kind}", Rule(kind, (kind, kind, "pred"), f"{{2}} ? ({c_type}){{0}} : ({c_type}){{1}}")
    yield "cvta.to.global.u64", Rule("u64", ("u64",), "{0}")


def _float_rules() -> Iterable[tuple[str, Rule]]:
    for kind, suffix in (("f32", "f"), ("f64", "")):
        for name, operator in {"add": "+", "sub": "-", "mul": "*"}.items():
            for rounding in ("", ".rn"):
                yield f"{name}{rounding}.{kind}", Rule(kind, (kind, kind), f"{{0}} {operator} {{1}}")
        yield f"div.rn.{kind}", Rule(kind, (kind, kind), "{0} / {1}")
        yield f"rcp.rn.{kind}", Rule(kind, (kind,), f"1.0{suffix} / {{0}}")
        yield f"sqrt.rn.{kind}", Rule(kind, (kind,), f"sqrt{suffix}({{0}})")
        yield f"fma.rn.{kind}", Rule(kind, (kind,) * 3, f"fma{suffix}({{0}}, {{1}}, {{2}})")
        yield f"neg.{kind}", Rule(kind, (kind,), "-{0}")
        yield f"abs.{kind}", Rule(kind, (kind,), f"fabs{suffix}({{0}})")
    yield "min.f32", Rule("f32", ("f32", "f32"), "ptx::minimum({0}, {1})")
    yield "max.f32", Rule("f32", ("f32", "f32"), "ptx::maximum({0}, {1})")


def _conversion_rules() -> Iterable[tuple[str, Rule]]:
    integers = [kind for kind in C_TYPES if kind[0] in "su"]
    for source in integers:
        for target in integers:
            yield f"cvt.{target}.{source}", Rule(target, (source,), "{0}")
        for target in ("f32", "f64"):
            yield f"cvt.rn.{target}.{source}", Rule(target, (source,), "{0}")
    yield "cvt.f64.f32", Rule("f64", ("f32",), "{0}")
    yield "cvt.rn.f32.f64", Rule("f32", ("f64",), "{0}")
    yield "cvt.f32.f16", Rule("f32", ("b16",), "emu::f16_to_float({0})")
    yield "cvt.rn.f16.f32", Rule("b16", ("f32",), "emu::float_to_f16({0})")
    yield "cvt.rn.bf16.f32", Rule("b16", ("f32",), "emu::float_to_bf16({0})")
    yield "cvt.rn.f16x2.f32", Rule("b32", ("f32", "f32"), "ptx::pack_f16({0}, {1})")
    yield "cvt.rn.bf16x2.f32", Rule("b32", ("f32", "f32"), "ptx::pack_bf16({0}, {1})")
    yield "cvt.rna.tf32.f32", Rule("b32", ("b32",), "emu::round_to_tf32({0})")


def _comparison_rules() -> Iterable[tuple[str, Rule]]:
    operators = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    inverse = {"lt": ">=", "le": ">", "gt": "<=", "ge": "<"}
    for kind in C_TYPES:
        if kind == "pred" or kind.endswith("8"):
            continue
        expressions = {name: f"{{0}} {operator} {{1}}" for name, operator in operators.items()}
        if kind[0] == "f":  # a comparison with NaN is false, of the forms with a u true
            expressions["ne"] = "{0} < {1} || {0} > {1}"
            expressions["equ"] = "!({0} < {1} || {0} > {1})"
            expressions["neu"] = "{0} != {1}"
            expressions |= {f"{name}u": f"!({{0}} {operator} {{1}})" for name, operator in inverse.items()}
            expressions["num"] = "{0} == {0} && {1} == {1}"
            expressions["nan"] = "{0} != {0} || {1} != {1}"
        elif kind[0] == "b":
            expressions = {name: expressions[name] for name in ("eq", "ne")}
        for name, expression in expressions.items():
            yield f"setp.{name}.{kind}", Rule("pred", (kind, kind), expression)


RULES: dict[str, Rule] = {
    **dict(_integer_rules()),
    **dict(_bit_rules()),
    **dict(_float_rules()),
    **dict(_conversion_rules()),
    **dict(_comparison_rules()),
}
