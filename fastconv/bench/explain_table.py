"""An explanation as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from fastconv.bench.explain import Choice, Explanation, Figures, LayerReport

WIDTH = 160
# Titles, widths; numbers stand to the right.
_TEXTS = (("layer", 24), ("what became of it", 32), ("output", 15), ("forward", 15), ("input grad", 15), ("weight grad", 15))
_NUMBERS = (("GFLOP", 9), ("MB moved", 15), ("MB saved", 15))


def table(found: Explanation) -> str:
    """Lines of at most `WIDTH` columns."""
    return "\n".join(_lines(found))


def _lines(found: Explanation) -> Iterator[str]:
    yield f"{found.model} on {', '.join(found.example)}; kernels for {found.chip}"
    yield _line([title for title, _ in _TEXTS], [title for title, _ in _NUMBERS])
    for layer, depth in _grouped(found.layers):
        yield _line(_texts(layer, depth), _numbers(layer))
    yield _line(["others"], _numbers(found.others))
    yield _line(["total"], _numbers(found.total))
    yield from _wrapped(
        "GFLOP: of a training step, multiply-adds counted as two. MB (10^6 bytes) before → after, of a training step: "
        "operands and results of each operator; what autograd keeps for backward, by whose result it is. Indented layers "
        "run with the one above; backward of norms and pools stands under input grad; torch: torch's own operators."
    )
    yield from _differences(found.layers)
    yield from _reasons(found)
    yield from _copies(found)


def _grouped(layers: Iterable[LayerReport]) -> Iterator[tuple[LayerReport, int]]:
    """Each layer, behind it those that it absorbed, wherever they are in the model."""
    layers = list(layers)
    known = {layer.path for layer in layers if layer.done != "absorbed"}
    inner = [layer for layer in layers if layer.done == "absorbed" and layer.detail.partition(";")[0] in known]
    for layer in layers:
        if layer in inner:
            continue
        yield layer, 0
        if layer.done == "fused":
            yield from ((other, 1) for other in inner if other.detail.partition(";")[0] == layer.path)


def _texts(layer: LayerReport, depth: int) -> list[str]:
    became = f"{layer.kind}: {layer.done}"
    if layer.done == "fused":
        became = (
            layer.detail.partition(" (")[0].partition(";")[0].replace("BatchNorm2d", "norm").replace("MaxPool2d", "pool")
        )
    if depth:
        became = f"  {layer.kind}"
    shape = "" if layer.shape is None else "x".join(map(str, layer.shape))
    name = layer.path or "(model)"
    if not layer.choices:
        runs = ["torch" if layer.moved_after else "", "", ""]
    else:
        directions = ["forward", "input_grad", "weight_grad"]
        if not any(choice.direction in ("input_grad", "weight_grad") for choice in layer.choices):
            directions = ["forward", "backward", ""]
        runs = [_kernels(layer.choices, wanted) for wanted in directions]
    return ["  " * depth + name, became, shape, *runs]


def _kernels(choices: Iterable[Choice], direction: str) -> str:
    """'native winograd': backends and families of kernels, without their settings."""
    chosen = [c for c in choices if c.direction == direction and c.op != "batch_norm_update"]
    return " + ".join(dict.fromkeys(_short(choice) for choice in chosen))


def _short(choice: Choice) -> str:
    family = choice.kernel.partition(" ")[0]
    return choice.backend if not family or "=" in family else f"{choice.backend} {family}"


def _numbers(figures: Figures) -> list[str]:
    return [
        f"{figures.step_flops / 1e9:.3g}" if figures.step_flops else "",
        _change(figures.moved_before, figures.moved_after),
        _change(figures.saved_before, figures.saved_after),
    ]


def _change(before: int, after: int) -> str:
    return f"{_mb(before)} → {_mb(after)}" if before or after else ""


def _mb(size: int) -> str:
    if size < 1000:
        return "<.001" if size else "0"
    return f"{size / 1e6:.3f}" if size < 1e5 else f"{size / 1e6:.1f}" if size < 1e8 else f"{size / 1e6:.0f}"


def _line(texts: list[str], numbers: list[str]) -> str:
    columns = [
        text if len(text) <= width else text[: width - 1] + "…" for text, (_, width) in zip(texts, _TEXTS, strict=False)
    ]
    columns = [f"{text:<{width}}" for text, (_, width) in zip([*columns, *[""] * 6], _TEXTS, strict=False)]
    return (
        " ".join(columns) + "".join(f"{text:>{width}}" for text, (_, width) in zip(numbers, _NUMBERS, strict=True))
    ).rstrip()


def _wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH, subsequent_indent="    ")


def _differences(layers: Iterable[LayerReport]) -> Iterator[str]:
    """Layers whose forward is another operator in evaluation mode: where norms are folded."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        training, evaluation = ({c.op for c in of if c.direction == "forward"} for of in (layer.choices, layer.evaluation))
        training.discard("batch_norm_update")
        if training != evaluation and (training or evaluation):
            change = f"{' + '.join(sorted(training)) or 'torch'} → {' + '.join(sorted(evaluation)) or 'nothing'}"
            found.setdefault(change, []).append(layer.path or "(model)")
    if found:
        yield "In evaluation mode without gradients:"
    for change, paths in found.items():
        yield from _wrapped(f"  {change}: {', '.join(paths)}")


def _reasons(found: Explanation) -> Iterator[str]:
    left: dict[str, list[str]] = {}
    for layer in found.layers:
        if layer.done == "left":
            left.setdefault(layer.detail, []).append(f"{layer.path or '(model)'} ({layer.kind})")
    if left:
        yield "Left alone:"
    for reason, paths in left.items():
        yield from _wrapped(f"  {', '.join(paths)}: {reason}")
    alone: dict[str, list[str]] = {}
    for layer in found.layers:
        if layer.done == "swapped" and layer.detail and not layer.kind.endswith("()"):
            alone.setdefault(layer.detail, []).append(layer.path or "(model)")
    if alone:
        yield "Swapped, not fused:"
    for reason, paths in alone.items():
        yield from _wrapped(f"  {', '.join(paths)}: {reason}")
    if found.forwards:
        yield "Run layer by layer:"
    for path, reason in found.forwards:
        yield from _wrapped(f"  {path or '(model)'}: {reason}")


def _copies(found: Explanation) -> Iterator[str]:
    yield "Layout copies in a training step:" if found.copies else "Layout copies in a training step: none"
    for copy in found.copies:
        what = f"{'x'.join(map(str, copy.shape))}, {_mb(copy.bytes)} MB"
        how = "copied" if copy.copied else "left to torch's kernels, as it is not channels_last"
        yield from _wrapped(
            f"  {copy.layer or '(model)'}, {copy.direction}: {copy.operand} ({what}), from {copy.source}: {how}"
        )
