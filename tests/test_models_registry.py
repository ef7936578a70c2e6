"""Nets by name and by file: every name builds, what a net does not take is refused, one's own are loaded."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastconv
from fastconv import models
from fastconv import nn as fast
from fastconv.cli import main

NAMES = (
    *("recipe", "lenet5", "mnist", "nin", "car_truck", "alexnet"),
    *("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
)


def test_names() -> None:
    assert fastconv.models.list() == NAMES
    namespace: dict[str, object] = {}
    exec("from fastconv.models import *", namespace)
    assert "build" in namespace and "list" not in namespace, "a star import leaves Python's list alone"


@pytest.mark.parametrize("layers", ["fastconv", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_what_it_was_made_for(name: str, layers: str) -> None:
    native = models.native(name)
    with torch.device("meta"):
        net = models.build(name, layers=layers)
        scores = net(torch.empty(2, native.channels, native.resolution, native.resolution))
    assert scores.shape == (2, 1 if name == "car_truck" else native.classes)
    assert any(isinstance(module, fast.ConvChain) for module in net.modules()) == (layers == "fastconv")
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == (
        name.endswith("_bn") or name == "car_truck"
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "car_truck"])
def test_every_name_builds_other_classes_channels_and_sizes(name: str) -> None:
    entry = models.registry.entry(name)
    size = entry.smallest or {"recipe": 32}.get(name, entry.native.resolution)
    with torch.device("meta"):
        net = models.build(name, num_classes=7, in_channels=2, resolution=size)
        assert net(torch.empty(1, 2, size, size)).shape == (1, 7)


def test_what_nets_were_made_for() -> None:
    assert models.native("lenet5") == (1, 28, 10)
    assert models.native("car_truck") == (3, 128, 2)
    assert models.native("vgg16_bn") == models.native("alexnet") == (3, 224, 1000)


@pytest.mark.parametrize("name", [name for name in NAMES if models.registry.entry(name).smallest])
def test_the_smallest_image_is_the_smallest(name: str) -> None:
    entry = models.registry.entry(name)
    assert entry.smallest is not None
    with torch.device("meta"), pytest.raises(RuntimeError, match="too small"):
        models.build(name, layers="torch")(torch.empty(2, 3, entry.smallest - 1, entry.smallest - 1))


def test_options_are_the_builders() -> None:
    with torch.device("meta"):
        net = models.build("recipe", resolution=16, width=8, max_width=8, batch_norm=True)
        drops = [module.p for module in models.build("nin", dropout=0.1).modules() if isinstance(module, nn.Dropout)]
    assert [conv.out_channels for conv in net.modules() if isinstance(conv, nn.Conv2d)] == [8] * 6
    assert drops == [0.1, 0.1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet", {}, "no net is named 'lenet', did you mean 'lenet5'. known are recipe, lenet5, mnist, .*load"),
        ("???", {}, "no net is named '...'; known are recipe, "),
        ("lenet5", {"resolution": 32}, "lenet5: resolution must be 28, got resolution=32"),
        ("mnist", {"resolution": 29}, "mnist: resolution must be 28, got resolution=29"),
        ("vgg11", {"resolution": 31}, "vgg11: resolution must be at least 32, got resolution=31"),
        ("alexnet", {"resolution": 32}, "alexnet: resolution must be at least 63, got resolution=32"),
        ("recipe", {"resolution": 36}, "resolution=36 leads to a map of 9×9"),
        ("car_truck", {"num_classes": 10}, "car_truck: num_classes must be 2, got num_classes=10"),
        ("nin", {"num_classes": 0}, "nin: num_classes must be at least 1, got num_classes=0"),
        ("vgg16", {"in_channels": 0}, "vgg16: in_channels must be at least 1, got in_channels=0"),
        ("nin", {"layers": "jax"}, "layers must be one of 'fastconv', 'torch', got layers='jax'"),
        ("vgg16", {"depth": 11, "dropuot": 0.1}, "vgg16: unknown option depth, dropuot; allowed: dropout$"),
        ("vgg16", {"batch_norm": True}, "vgg16: unknown option batch_norm"),
        ("lenet5", {"dropout": 0.1}, "lenet5: unknown option dropout; it has none"),
    ],
)
def test_refused(name: str, options: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        models.build(name, **options)


OWN = """
import dataclasses
from torch import nn
import beside

@dataclasses.dataclass
class Sizes:  # a dataclass looks its module up by name
    width: int = 4

def net(width=Sizes().width):
    from beside import KERNEL
    return nn.Sequential(nn.Conv2d(3, width, KERNEL), nn.ReLU())

def number():
    return 3

def broken():
    raise KeyError("weights")

constant = 1
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("own_nets", "beside", "half"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "beside.py").write_text("KERNEL = 3\n", encoding="utf-8")
    (tmp_path / "half.py").write_text("import no_such_module\n", encoding="utf-8")
    path = tmp_path / "own_nets.py"
    path.write_text(OWN, encoding="utf-8")
    return path


@pytest.mark.parametrize("spec", ["{path}:net", "own_nets:net", "own_nets.py:net"])
def test_load(own: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    places = [*sys.path]
    net = models.load(spec.format(path=own))
    wide = models.load(spec.format(path=own), width=6)
    assert sys.path == places
    assert isinstance(net, nn.Sequential) and (net[0].out_channels, wide[0].out_channels) == (4, 6)


def test_load_a_builder_of_ours() -> None:
    assert models.load("fastconv.models:recipe_net", resolution=8, width=4)[0][0].out_channels == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_nets.py", "own_nets.py: must be path/to/file.py:callable or package.module:callable"),
        (":net", "must be path/to/file.py:callable"),
        ("own_nets.py:not-a-name", "must be path/to/file.py:callable"),
        ("nowhere.py:net", "nowhere.py is not a Python file"),
        ("./beside:net", "./beside is not a Python file"),
        ("no.such.module:net", "no.such.module cannot be imported: ModuleNotFoundError"),
        ("half.py:net", "half.py cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("own_nets.py:missing", "own_nets.py has no callable 'missing'"),
        ("own_nets.py:constant", "own_nets.py has no callable 'constant'"),
        ("own_nets.py:number", "must return a torch.nn.Module, got int"),
        ("own_nets.py:broken", r"broken\(\) fails: KeyError: 'weights'"),
    ],
)
def test_what_is_not_loaded(own: Path, spec: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    places = [*sys.path]
    with pytest.raises(ValueError, match=message) as raised:
        models.load(spec)
    assert str(raised.value).startswith(f"{spec}: ")
    assert sys.path == places


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("tune", ["--budget", "0.01", "--out", "table.json"], "conv2d_relu_max_pool2d forward"),
        ("convert", ["--repeats", "2"], "Conv2d + ReLU + pool"),
    ],
)
def test_commands_take_names(
    command: str,
    options: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, "--model", "lenet5", "--input", "2x1x28x28", "--device", "cpu", *options]) == 0
    assert expected in capsys.readouterr().out


def test_explain_takes_names_and_files(own: Path, tmp_path: Path) -> None:
    names, out = ["nin", f"{own}:net"], tmp_path / "moved.json"
    shape = ["--input", "3x16x16", "--batch", "2"]
    assert main(["explain", "--traffic", "--model", ",".join(names), *shape, "--json", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [*found] == names
    for steps in found.values():  # the file's net is plain, so that explain has converted it
        assert "aten::convolution" in steps["torch"]["moved"]
        assert any(kernel.startswith("conv_") for kernel in steps["fastconv"]["moved"])
        assert not any(kernel.startswith("conv_") for kernel in steps["torch"]["moved"])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["convert", "--model", "lenet5", "--input", "2x3x32x32"],
            2,
            "--model lenet5, --input 2x3x32x32: lenet5: resolution",
        ),
        (["convert", "--model", "lenet6", "--input", "2x1x28x28"], 2, "--model: no net is named 'lenet6', did you mean"),
        (["tune", "--model", "mnist", "--input", "2x1x28x30"], 1, "takes square images"),
        (["explain", "--model", "alexnet", "--input", "3x32x32"], 1, "alexnet: resolution must be at least 63"),
    ],
)
def test_commands_refuse(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == status
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"fastconv {arguments[0]}: ") and message in line


def test_images_that_are_not_square_are_taken_where_a_net_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "vgg11", "--input", "3x32x64", "--batch", "1", "--chip", "sm_90"]) == 0
    assert "x32x64" in capsys.readouterr().out


def test_an_entry_is_what_it_says() -> None:
    entry = models.registry.entry("vgg11")
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.smallest = 1  # type: ignore[misc]
    assert entry.arguments() == {"num_classes", "in_channels", "dropout", "layers"}


@pytest.mark.parametrize(
    ("name", "wanted", "taken"),
    [
        ("recipe", 32, 32),
        ("lenet5", 32, 28),
        ("vgg11", 32, 32),
        ("vgg11", 28, 224),
        ("alexnet", 32, 224),
        ("own.py:net", 7, 7),
    ],
)
def test_the_size_that_a_net_is_given(name: str, wanted: int, taken: int) -> None:
    assert models.resolution_for(name, wanted) == taken


def test_what_is_offered_is_taken_where_there_is_a_parameter_for_it(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("from torch import nn\ndef net(num_classes, width=3):\n    return nn.Linear(width, num_classes)\n")
    model = models.load(f"{path}:net", {"num_classes": 7, "resolution": 32}, width=5)
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features) == (5, 7)
    with pytest.raises(ValueError, match="unexpected keyword argument 'depth'"):
        models.load(f"{path}:net", {"num_classes": 7}, depth=2)
