"""fastconv.explain: nets of which everything can be counted by hand, and that nothing is changed by it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv
from fastconv import convert, explain
from fastconv.bench.explain import Explanation, LayerReport
from fastconv.bench.saved import saved_bytes

N, SIZE = 2, 16
LAST = torch.channels_last


def _x(channels: int = 8, size: int = SIZE, layout: torch.memory_format = LAST) -> Tensor:
    return torch.randn(N, channels, size, size).contiguous(memory_format=layout)


def _chain() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU()),
    )


class Block(nn.Module):
    """One ReLU called twice, a residual, and a map's mean by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y).mean((2, 3))


class Forward(nn.Module):
    """A forward of one line around a net's parts."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.line = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Any:
        return self.line(self, x) if skip is None else self.line(self, x, skip)


def _rows(found: Explanation) -> dict[str, LayerReport]:
    return {layer.path or layer.kind: layer for layer in found.layers}


def _fates(found: Explanation) -> dict[str, str]:
    return {name: layer.done for name, layer in _rows(found).items()}


def test_flops_are_those_of_the_formula() -> None:
    rows = _rows(explain(_chain(), _x()))
    first, second = 2 * N * 16 * SIZE**2 * 8 * 9, 2 * N * 8 * (SIZE // 2) ** 2 * 16 * 9
    assert (rows["0"].forward_flops, rows["0"].step_flops) == (first, 2 * first), "its input needs no gradient"
    assert (rows["3"].forward_flops, rows["3"].step_flops) == (second, 3 * second)
    assert rows["0"].shape == (N, 16, SIZE // 2, SIZE // 2) and rows["3"].shape == (N, 8, SIZE // 2, SIZE // 2)
    linear = explain(nn.Sequential(nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * SIZE**2, 10)), _x())
    assert linear.others.step_flops == 3 * 2 * N * 10 * 4 * SIZE**2
    assert linear.layers[0].step_flops == 2 * linear.layers[0].forward_flops == 4 * N * 4 * SIZE**2 * 8
    assert {c.direction for c in linear.layers[0].choices} == {"forward", "weight_grad", "bias_grad"}
    assert linear.total.step_flops == linear.others.step_flops + linear.layers[0].step_flops
    grouped = nn.Conv2d(8, 8, (3, 1), groups=4, stride=2, padding_mode="reflect", padding=(1, 0))
    assert explain(grouped, _x()).total.forward_flops == 2 * N * 8 * (SIZE // 2) ** 2 * 2 * 3


def test_saved_bytes_are_whose_result_they_are() -> None:
    found = explain(_chain(), _x())
    rows = _rows(found)
    x, wide, pooled, last = (4 * N * c * s**2 for c, s in ((8, 16), (16, 16), (16, 8), (8, 8)))
    assert rows["0"].saved_before == wide, "which the ReLU has changed in place, and the pool reads"
    assert rows["2"].saved_before == pooled + 2 * pooled, "with indices of eight bytes"
    assert rows["4"].saved_before == last and rows["1"].saved_before == 0
    assert rows["0"].saved_after == pooled + pooled // 4, "with codes of a byte"
    assert rows["3"].saved_after == last
    assert {rows[name].saved_after for name in "124"} == {0}
    assert found.others.saved_before == found.others.saved_after == x, "the input"


@pytest.mark.parametrize("make", [_chain, lambda: nn.Sequential(nn.Conv2d(8, 8, 1), Block())], ids=["chain", "block"])
def test_totals_are_those_of_the_models(make: Callable[[], nn.Module]) -> None:
    model, x = make(), _x()
    total = explain(model, x).total
    assert total.saved_before == saved_bytes(lambda: model(x))
    converted = convert(copy.deepcopy(model))
    assert total.saved_after == saved_bytes(lambda: converted(x))
    assert total.moved_after < total.moved_before


def test_a_block_is_told_by_layer() -> None:
    found = explain(nn.Sequential(nn.Conv2d(8, 8, 1), Block()), _x())
    rows = _rows(found)
    assert rows["1.conv2"].detail == "Conv2d + BatchNorm2d + add + ReLU"
    assert rows["1.bn1"].detail == "1.conv1" and rows["1.bn1"].done == "absorbed"
    assert {(c.op, c.direction) for c in rows["1.bn2"].choices} >= {
        ("batch_norm_relu", "forward"),
        ("batch_norm_relu", "backward"),
    }
    directions = {c.direction for c in rows["1.conv1"].choices}
    assert directions == {"forward", "input_grad", "weight_grad"}
    mean = next(layer for layer in found.layers if layer.kind == "global_avg_pool2d()")
    assert mean.path == "1" and mean.done == "swapped" and [c.direction for c in mean.choices] == ["forward", "backward"]
    assert mean.moved_before > 0, "torch's mean before"
    assert rows["1.relu"].moved_before > 0 and rows["1.relu"].moved_after == 0 and not rows["1.relu"].choices


def test_choices_are_tunings() -> None:
    found = explain(_chain(), _x())
    choice = next(c for c in _rows(found)["3"].choices if c.direction == "forward")
    with fastconv.tuning.observing() as calls:
        convert(_chain())(_x())
    call = next(call for call in calls if call.geometry.batch == N and call.op == "conv2d_relu")
    assert choice.reason == fastconv.tuning.explain(*call)
    assert str(fastconv.tuning.pick(*call)[0]) == f"{choice.backend} {choice.kernel}".strip()
    assert choice.times == 1


def test_norms_folded_in_evaluation() -> None:
    net = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    found = explain(net, _x(size=96))
    rows = _rows(found)
    assert [c.op for c in rows["0"].evaluation] == ["conv2d_relu"] and not rows["1"].evaluation
    assert "conv2d → conv2d_relu: 0" in str(found)


def test_layout_copies_are_named_by_their_cause() -> None:
    def causes(model: nn.Module, x: Any, **options: Any) -> list[tuple[str, str, str, str]]:
        copies = explain(model, x, **options).copies
        assert all(copy.copied and copy.bytes > 0 for copy in copies)
        return [(copy.layer, copy.direction, copy.operand, copy.source) for copy in copies]

    conv = {"conv": nn.Conv2d(8, 8, 3, padding=1)}
    assert causes(nn.Sequential(nn.Conv2d(8, 8, 3)), _x()) == []
    assert ("0", "forward", "input", "input") in causes(
        nn.Sequential(nn.Conv2d(8, 8, 3)), _x(layout=torch.contiguous_format)
    )
    turned = Forward(lambda self, x: self.conv(x.transpose(2, 3)), **conv)
    assert ("conv", "forward", "input", "transpose") in causes(turned, _x())
    joined = Forward(lambda self, x: self.conv(torch.cat([x[:, :4].contiguous(), x[:, 4:].contiguous()], 1)), **conv)
    assert ("conv", "forward", "input", "cat") in causes(joined, _x(layout=torch.contiguous_format))
    unflat = nn.Sequential(nn.Linear(8, 8 * SIZE**2), nn.Unflatten(1, (8, SIZE, SIZE)), nn.Conv2d(8, 8, 3))
    assert ("2", "forward", "input", "1") in causes(unflat, torch.randn(N, 8))
    behind = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * SIZE**2, 2))
    assert ("0", "backward", "grad", "gradient of 2") in causes(behind, _x())


def test_layouts_that_choose_torch() -> None:
    """A pool on the CPU is served by torch where its input is not channels_last; an average, that is."""
    found = explain(nn.Sequential(nn.AvgPool2d(2)), _x(layout=torch.contiguous_format).requires_grad_())
    (copy_forward,) = [c for c in found.copies if c.direction == "forward"]
    assert (copy_forward.layer, copy_forward.source, copy_forward.copied) == ("0", "input", False)
    assert {c.backend for c in found.layers[0].choices} == {"aten"}
    assert not explain(nn.Sequential(nn.AvgPool2d(2)), _x().requires_grad_()).copies


def test_left_alone_and_why() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    hooked = nn.Conv2d(8, 8, 3, padding=1)
    hooked.register_forward_hook(lambda *_: None)
    net = nn.Sequential(conv, hooked, nn.Sequential(conv, nn.SiLU()), nn.Conv2d(8, 4, 1), nn.SiLU())
    found = explain(net, _x())
    rows = _rows(found)
    assert _fates(found) == {"0": "left", "1": "left", "3": "swapped"}
    assert rows["0"].detail == "it sits in several places" and rows["1"].detail == "it has hooks"
    assert not rows["1"].choices and rows["1"].step_flops == 3 * rows["1"].forward_flops > 0
    assert rows["0"].forward_flops == 2 * rows["1"].forward_flops, "it is called twice"
    printed = str(found)
    assert "1 (Conv2d): it has hooks" in printed and max(map(len, printed.splitlines())) <= 160


def test_forwards_that_cannot_be_read() -> None:
    def branching(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) if x.sum() > 1e9 else self.conv(x)

    found = explain(Forward(branching, conv=nn.Conv2d(8, 8, 3)), _x())
    assert _fates(found) == {"conv": "swapped"}
    assert [path for path, _ in found.forwards] == [""]
    assert "Run layer by layer:\n  (model): " in str(found)


def test_shared_weights_belong_to_who_is_called() -> None:
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    second.weight = first.weight
    rows = _rows(explain(nn.Sequential(first, nn.SiLU(), second), _x()))
    assert rows["0"].forward_flops == rows["2"].forward_flops > 0
    assert [c.times for c in rows["2"].choices] == [1] * len(rows["2"].choices)


def test_tuples_dicts_and_keywords() -> None:
    def heads(self: Any, x: Tensor, skip: Tensor) -> dict[str, Any]:
        y = self.conv(x) + skip
        return {"main": y.mean(), "aux": (self.head(y), 3, y.detach())}

    net = Forward(heads, conv=nn.Conv2d(8, 8, 3, padding=1), head=nn.Conv2d(8, 2, 1))
    by_name = explain(net, {"x": _x(), "skip": _x()})
    assert by_name == explain(net, (_x(), _x()))
    assert _rows(by_name)["head"].step_flops == 3 * _rows(by_name)["head"].forward_flops > 0


def test_a_converted_model_is_explained_as_it_is() -> None:
    net = _chain()
    plain = explain(net, _x())
    assert explain(convert(copy.deepcopy(net)), _x()).layers == plain.layers
    alone = explain(convert(copy.deepcopy(net), fuse=False), _x())
    assert set(_fates(alone).values()) == {"swapped", "left"}
    assert "by default fused: Conv2d + ReLU + MaxPool2d" in _rows(alone)["0"].detail
    assert alone.total.saved_before == plain.total.saved_before
    assert alone.total.saved_after > plain.total.saved_after


def test_the_model_stays_what_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), Block()).train()
    net[4].eval()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before, kinds = copy.deepcopy(net), [type(module) for module in net.modules()]
    strides, modes = [p.stride() for p in net.parameters()], [m.training for m in net.modules()]
    x = _x(layout=torch.contiguous_format)
    states = torch.random.get_rng_state()
    explain(net, x)
    assert torch.equal(torch.random.get_rng_state(), states)
    assert [type(module) for module in net.modules()] == kinds
    assert [m.training for m in net.modules()] == modes and [p.stride() for p in net.parameters()] == strides
    for name, value in net.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight)) and net[1].weight.grad is None
    assert not any("_call_impl" in vars(module) for module in net.modules())


def test_other_chips_and_no_data() -> None:
    with torch.device("meta"):
        net, x = _chain(), torch.empty(64, 8, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    found = explain(net.to(torch.bfloat16), x)
    assert found.total.forward_flops == 2 * 64 * (16 * 224**2 * 8 + 8 * 112**2 * 16) * 9
    hopper = explain(net, x, chip="sm_90")
    assert hopper.chip == "sm_90"
    assert {c.backend for c in hopper.layers[0].choices if c.direction == "forward"} == {"triton"}
    assert "cost model" in hopper.layers[0].choices[0].reason
    assert explain(_chain(), _x(), chip="sm_90").total.saved_after == explain(_chain(), _x()).total.saved_after

    def asks(self: Any, x: Tensor) -> Tensor:
        return self.conv(x * x.sum().item())

    with pytest.raises(ValueError, match=r"does not run on example=\[\[2, 8, 16, 16\]\].*meta"):
        explain(Forward(asks, conv=nn.Conv2d(8, 8, 3)), _x(), chip="sm_90")
    with pytest.raises(ValueError, match=r"chip must be a name that ends in sm_80.*got 'Hopper'"):
        explain(_chain(), _x(), chip="Hopper")


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rows = _rows(explain(_chain(), _x()))
    assert rows["0"].saved_after == (N * 16 * (SIZE // 2) ** 2) * (2 + 1)
    assert rows["3"].step_flops == 3 * rows["3"].forward_flops > 0


def test_frozen_parameters() -> None:
    net = _chain().requires_grad_(False)
    found = explain(net, _x())
    assert found.total.saved_after == 0 and found.total.step_flops == found.total.forward_flops > 0
    frozen = explain(fastconv.freeze(convert(_chain())), _x())
    assert frozen.total.forward_flops == found.total.forward_flops


def test_plain_data() -> None:
    found = explain(_chain(), _x())
    content = dataclasses.asdict(found)
    assert content["layers"][0]["choices"][0]["op"] == "conv2d_relu_max_pool2d"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.chip = "another"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "example", "kind", "match"),
    [
        (lambda: 3, _x, TypeError, "model must be a torch.nn.Module, got int"),
        (_chain, lambda: _x(3), ValueError, r"example=\[\[2, 3, 16, 16\]\] in \w+ mode: RuntimeError: .*channels"),
        (_chain, lambda: {"y": _x()}, ValueError, "unexpected keyword"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), _x, ValueError, r"without a shape \(0.weight\)"),
    ],
    ids=["model", "example", "keyword", "lazy"],
)
def test_errors(model: Any, example: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        explain(model(), example())
