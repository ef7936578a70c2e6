"""What a training may be told, and what it makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastconv import models
from fastconv.train import Augmentation, Settings, nets

SMALL = {"width": 4, "max_width": 8}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got epochs=0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got dtype='int8'"),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, sgd"),
        ({"schedule": "step"}, "schedule must be one of one-cycle, cosine"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number from 0 on"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"momentum": -0.1}, "momentum must be in"),
        ({"cuda_graph": True}, "cuda_graph must be off where device='cpu'"),
        ({"embedding": -1}, "embedding must be at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_out_of_range_is_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_unknown_data_and_settings() -> None:
    with pytest.raises(
        ValueError, match="data must be one of digits, mnist, cifar10, folder, synthetic, got data='imagenet'"
    ):
        Settings.of("imagenet")
    with pytest.raises(TypeError, match="epoch"):
        Settings.of("digits", epoch=3)


def test_what_is_not_given_suits_the_data_and_the_model() -> None:
    assert Settings.of("digits") == Settings()
    assert Settings.of("digits", epochs=None, batch_size=32) == Settings(batch_size=32)
    assert Settings.of("digits", options={"width": 16}).options == {"width": 16, "max_width": 256}
    lenet = Settings.of("digits", model="lenet5")
    assert (lenet.resolution, dict(lenet.options)) == (28, {})
    assert Settings.of("cifar10", model="vgg11").resolution == 32
    assert Settings.of("cifar10", model="alexnet").resolution == 224
    assert Settings.of("digits", model="lenet5", resolution=32).resolution == 32, "what is given is taken, and refused later"


@pytest.mark.parametrize(
    "settings", [Settings(), Settings(augmentation=Augmentation(turn=3), freeze=("a", "b"), classes=("x", "y"))]
)
def test_settings_go_through_json(settings: Settings) -> None:
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize("layers", ["fastconv", "torch"])
def test_the_seed_decides_on_weights(layers: str) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        settings = Settings.of("digits", resolution=8, options={"width": 4, "max_width": 8}, seed=seed, embedding=2)
        return nets.build(settings, classes=10, channels=1, layers=layers).state_dict()

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(torch.rand(1), expected), "the caller's generator stays as it is"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])
    assert first["classifier.embedding.weight"].shape == (2, 8)


@pytest.mark.parametrize("name", [name for name in models.list() if name not in ("alexnet",) and not name.startswith("vgg")])
def test_every_small_net_can_be_built_for_the_digits(name: str) -> None:
    settings = Settings.of("digits", model=name)
    model = nets.build(settings, classes=models.native(name).classes, channels=1)
    assert model.training
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


def _write(folder: Path, body: str) -> str:
    path = folder / "own.py"
    path.write_text("import torch\nfrom torch import nn\n" + body)
    return f"{path}:net"


def test_a_net_of_ones_own(tmp_path: Path) -> None:
    spec = _write(
        tmp_path,
        "def net(num_classes, in_channels, hidden=4):\n"
        "    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, num_classes)]\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, hidden, 3), nn.ReLU(), *head)\n",
    )
    model = nets.build(Settings.of("digits", model=spec, options={"hidden": 6}), classes=10, channels=1)
    assert type(model[0]).__name__ == "ConvReLU2d"
    assert (model[0].in_channels, model[0].out_channels, model[-1].out_features) == (1, 6, 10)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def net():\n    return nn.Flatten()\n", "the data have 10 classes, but model=.* has 64 outputs"),
        ("def net():\n    return nn.Conv2d(1, 10, 3)\n", r"must give scores \[N, classes\], got \[1, 10, 6, 6\]"),
        ("def net():\n    return nn.Linear(3, 10)\n", r"does not run on images \[1, 1, 8, 8\]"),
        ("def net():\n    return 3\n", "must return a torch.nn.Module"),
    ],
)
def test_a_net_that_does_not_fit_is_refused(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nets.build(Settings.of("digits", model=_write(tmp_path, body), resolution=8), classes=10, channels=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": "abc"}, "model=recipe cannot be built with width='abc'"),
        ({"layers": "torch"}, "options must not hold layers, which the data decide"),
        ({"name": 3}, "options must not hold name"),
    ],
)
def test_options_that_make_no_net_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nets.build(Settings(options=options), classes=10, channels=1)


def test_a_net_that_was_converted_already_is_torchs_where_that_is_asked_for(tmp_path: Path) -> None:
    spec = _write(
        tmp_path,
        "import fastconv\n"
        "def net():\n"
        "    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)]\n"
        "    return fastconv.convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *head))\n",
    )
    settings = Settings.of("digits", model=spec)
    assert type(nets.build(settings, classes=10, channels=1, layers="torch")[0]) is nn.Conv2d
    assert type(nets.build(settings, classes=10, channels=1)[0]).__name__ == "ConvReLU2d"


def test_on_another_device_a_captured_training_is_as_any_other() -> None:
    settings = Settings(device="cuda", cuda_graph=True)
    assert settings.on("cpu") == Settings()
    assert settings.on("cuda:1").cuda_graph is True


def test_borrowed_weights() -> None:
    def net(classes: int, width: int = 4) -> nn.Module:
        settings = Settings.of("digits", resolution=8, options={**SMALL, "width": width}, seed=classes)
        return nets.build(settings, classes=classes, channels=1)

    lent, model = net(10), net(3)
    head = model.state_dict()["classifier.weight"].clone()
    nets.borrow(model, lent.state_dict(), "net.pt")
    assert torch.equal(model.state_dict()["features.0.weight"], lent.state_dict()["features.0.weight"])
    assert torch.equal(model.state_dict()["classifier.weight"], head)
    other = nets.build(Settings.of("digits", resolution=8, options=SMALL, embedding=2), classes=10, channels=1)
    nets.borrow(other, lent.state_dict(), "net.pt")
    assert torch.equal(other.state_dict()["features.0.weight"], lent.state_dict()["features.0.weight"])
    deeper = {**lent.state_dict(), "features.9.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"its features\.9\.weight has shape \[1\], this one's none"):
        nets.borrow(net(10), deeper, "net.pt")
    with pytest.raises(
        ValueError,
        match=r"transfer=net\.pt is of another net: its features\.0\.weight has shape \[4, 1, 3, 3\], this .*\[8,",
    ):
        nets.borrow(net(10, width=8), lent.state_dict(), "net.pt")
