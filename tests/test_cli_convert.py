"""`fastconv convert`: models of one's own, the gate before the times, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv.bench import conversion
from fastconv.cli import main

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x):
        y = self.relu(self.norm(self.conv(x)))
        return {"scores": self.head(self.drop(y.mean((2, 3)))), "map": (y, 3)}

def net():
    return Net()

def chain():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU())

def number():
    return 3

def broken():
    raise KeyError("weights")

constant = 1
"""
SMALL = ["--input", "2x3x16x16", "--device", "cpu", "--repeats", "2"]


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "some_nets.py"
    path.write_text(NETS, encoding="utf-8")
    return path


@pytest.mark.parametrize("options", [[], ["--no-fuse", "--no-fold", "--memory-format", "contiguous", "--dtype", "bfloat16"]])
def test_before_and_after(nets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["convert", "--model", f"{nets}:net", *SMALL, *options, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    for expected in ("relative error against float64", "forward, evaluation", "training step", "MB", "torch / fastconv"):
        assert expected in printed
    assert ("Conv2d + norm + ReLU" in printed) == (not options)
    assert max(map(len, printed.splitlines())) <= 160
    content = json.loads(out.read_text(encoding="utf-8"))
    assert set(content["sides"]) == {"torch", "torch channels_last", "fastconv"} and content["wrong"] is None
    for side in content["sides"].values():
        assert side["peak_bytes"] > side["saved_bytes"] > 0
        assert 0 < side["step_seconds"]["q20"] <= side["step_seconds"]["median"] <= side["step_seconds"]["q80"]
        assert all(0 <= error < 0.1 for error in side["errors"].values())
    assert content["explanation"]["total"]["saved_after"] == content["sides"]["fastconv"]["saved_bytes"]


def test_a_module_by_its_name(nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(nets.parent)
    monkeypatch.syspath_prepend(str(nets.parent))
    assert main(["convert", "--model", "some_nets:chain", *SMALL]) == 0
    assert "Conv2d + ReLU + pool" in capsys.readouterr().out


def test_no_times_of_what_is_wrong(nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a conversion that forgets a ReLU would be."""

    def forgetful(model: nn.Module, **options: object) -> nn.Module:
        converted = fastconv.convert(model, inplace=True)
        assert isinstance(converted, nn.Sequential)
        converted[0] = fastconv.nn.Conv2d.from_torch(converted[0])  # type: ignore[arg-type]
        converted[2] = nn.MaxPool2d(2)
        return converted

    monkeypatch.setattr(conversion, "convert", forgetful)
    assert main(["convert", "--model", f"{nets}:chain", *SMALL]) == 1
    printed = capsys.readouterr()
    assert "relative error against float64" in printed.out
    assert "forward, evaluation" not in printed.out and " ms" not in printed.out
    (line,) = [line for line in printed.err.splitlines() if line.startswith("fastconv convert:")]
    assert "no times" in line and "allowed" in line


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        ("nowhere.py:net", [], "nowhere.py is not a Python file"),
        ("no.such.module:net", [], "no.such.module cannot be imported"),
        ("{nets}", [], "path/to/file.py:callable"),
        ("{nets}:missing", [], "has no callable 'missing'"),
        ("{nets}:constant", [], "has no callable 'constant'"),
        ("{nets}:number", [], "must return a torch.nn.Module, got int"),
        ("{nets}:broken", [], "broken() fails: KeyError: 'weights'"),
        ("{nets}:net", ["--input", "3x16x16"], "--input must be NxCxHxW"),
        ("{nets}:net", ["--input", "2x4x16x16"], "the model does not run on example=[[2, 4, 16, 16]]"),
        ("{nets}:net", ["--device", "nonsense"], "nonsense"),
    ],
)
def test_errors_are_one_line(
    nets: Path, model: str, options: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "--model", model.format(nets=nets), *SMALL, *options]) == 2
    printed = capsys.readouterr()
    assert match in printed.err and len(printed.err.splitlines()) == 1 and printed.err.startswith("fastconv convert: ")
    assert not printed.out


class Noisy(nn.Module):
    """Random in training, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.conv(x).relu(), 0.5, self.training)


def test_random_forwards_are_compared_in_evaluation_mode() -> None:
    found = conversion.compare(Noisy(), torch.randn(2, 3, 8, 8), repeats=1)
    assert found.wrong is None and "random in training" in found.mode


def test_a_comparison_leaves_the_model_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    strides = [p.stride() for p in net.parameters()]
    conversion.compare(net, torch.randn(2, 3, 8, 8), repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [p.stride() for p in net.parameters()] == strides and not net.training
    assert all(p.grad is None for p in net.parameters())


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="no step to train"):
        conversion.compare(nn.Conv2d(3, 4, 3).requires_grad_(False), torch.randn(2, 3, 8, 8))


def test_a_converted_model_is_compared_with_what_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    images = torch.randn(2, 3, 8, 8)
    given, plain = (conversion.compare(model, images, repeats=1) for model in (fastconv.convert(net), net))
    for name in plain.sides:
        assert given.sides[name].saved_bytes == plain.sides[name].saved_bytes
    assert given.sides["torch"].saved_bytes > given.sides["fastconv"].saved_bytes
