"""Checkpoints: going on from one is as if nothing had happened, and a killed process leaves a whole one."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fastconv.train import Outcome, Predictor, Settings, Split, Stopped, checkpoint, fit, load
from fastconv.train.checkpoint import Checkpoint, Facts
from fastconv.train.trainee import Trainee

SMALL = Settings.of(
    "synthetic:80", resolution=8, options={"width": 8, "max_width": 16}, epochs=3, batch_size=16, learning_rate=1e-3
)
STEPS = 3


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGINT as a terminal's foreground has it; where tests run in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _state(outcome: Outcome) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in outcome.model.state_dict().items()}


def _equal(a: Outcome, b: Outcome) -> None:
    ours, theirs = _state(a), _state(b)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for one, other in zip(a.epochs, b.epochs, strict=True):
        times = {"seconds": 0.0, "images_per_second": 0.0}
        assert dataclasses.replace(one, **times) == dataclasses.replace(other, **times)
    assert a.test == b.test


def _stopping_at(epoch: int, step: int, number: int = signal.SIGTERM):
    def on_step(trainee: Trainee) -> None:
        if (trainee.epoch, trainee.step) == (epoch, step):
            os.kill(os.getpid(), number)

    return on_step


class Dropping(nn.Module):
    """Dropout draws from torch's generator at every step; the norm has statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x))).flatten(1)))


def _dropping() -> nn.Module:
    torch.manual_seed(5)
    return Dropping()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"optimizer": "sgd", "schedule": "cosine", "learning_rate": 1e-2},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
    ],
    ids=["adamw", "sgd", "bfloat16", "float16"],
)
@pytest.mark.parametrize("step", [1, 2])
def test_going_on_in_the_middle_of_an_epoch_is_bit_for_bit(tmp_path: Path, how: dict, step: int) -> None:
    settings = dataclasses.replace(SMALL, **how)
    whole = fit(settings, model=_dropping())
    with pytest.raises(Stopped) as stopped:
        fit(settings, model=_dropping(), folder=tmp_path, on_step=_stopping_at(1, step))
    assert stopped.value.signal == signal.SIGTERM
    assert f"epoch 2, step {step}" in str(stopped.value)
    _equal(fit(settings, model=_dropping(), folder=tmp_path, resume=True), whole)


def test_going_on_after_an_epoch_and_after_the_end(tmp_path: Path) -> None:
    whole = fit(SMALL)

    def fail(trainee: Trainee) -> None:
        if trainee.epoch == 2:
            raise RuntimeError("as if the process had died")

    with pytest.raises(RuntimeError, match="died"):
        fit(SMALL, folder=tmp_path, on_step=fail)
    _equal(fit(SMALL, folder=tmp_path, resume=True), whole)
    steps: list[int] = []
    _equal(fit(SMALL, folder=tmp_path, resume=True, on_step=lambda trainee: steps.append(trainee.step)), whole)
    assert not steps, "a finished training is not trained again"


def test_a_net_is_transferred_as_it_is(tmp_path: Path) -> None:
    fit(dataclasses.replace(SMALL, epochs=1, embedding=3), folder=tmp_path)
    path = tmp_path / "fastconv-seed0.pt"
    settings = checkpoint.transferring(path, "cifar10", epochs=2, options={"max_width": 8})
    assert dict(settings.options) == {"width": 8, "max_width": 8}, "CIFAR-10's own net has norms, this one has none"
    assert (settings.model, settings.resolution, settings.embedding, settings.transfer) == ("recipe", 8, 3, str(path))
    assert (settings.epochs, settings.batch_size) == (2, Settings.of("cifar10").batch_size)
    other = checkpoint.transferring(path, "digits", model="lenet5")
    assert (other.model, other.resolution, dict(other.options)) == ("lenet5", 28, {})


def test_a_net_that_was_handed_over_is_not_built_from_its_checkpoint(tmp_path: Path) -> None:
    outcome = fit(dataclasses.replace(SMALL, epochs=1), model=_dropping(), folder=tmp_path)
    path = tmp_path / "fastconv-seed0.pt"
    with pytest.raises(ValueError, match="this net was handed over"):
        checkpoint.load_model(path)
    again = _dropping()
    again.load_state_dict(checkpoint.load(path).state["model"])
    assert all(torch.equal(value, _state(outcome)[name]) for name, value in again.state_dict().items())


def test_without_a_checkpoint_to_resume_it_begins(tmp_path: Path) -> None:
    _equal(fit(SMALL, folder=tmp_path, resume=True), fit(SMALL))


def test_a_stop_in_the_last_step_of_an_epoch_waits_for_its_end(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="epoch 3, step 0"):
        fit(SMALL, folder=tmp_path, on_step=_stopping_at(1, STEPS, signal.SIGINT))
    assert checkpoint.load(tmp_path / "fastconv-seed0.pt").state["epoch"] == 2
    _equal(fit(SMALL, folder=tmp_path, resume=True), fit(SMALL))


def test_an_epoch_of_one_step_can_be_stopped(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, batch_size=60)
    with pytest.raises(Stopped, match="epoch 2, step 0"):
        fit(settings, folder=tmp_path, on_step=_stopping_at(0, 1))
    _equal(fit(settings, folder=tmp_path, resume=True), fit(settings))


def test_a_signal_at_the_very_end_is_not_lost(tmp_path: Path) -> None:
    """The next seed of a run must not begin."""
    with pytest.raises(Stopped, match="stopped at the end"):
        fit(SMALL, folder=tmp_path, on_step=_stopping_at(SMALL.epochs - 1, STEPS))
    _equal(fit(SMALL, folder=tmp_path, resume=True), fit(SMALL))


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fit(dataclasses.replace(SMALL, epochs=1), folder=tmp_path, on_step=_stopping_at(0, 1, signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_net_of_ones_own_is_run_only_where_it_is_named(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    own = tmp_path / "own.py"
    own.write_text(
        "from pathlib import Path\nfrom torch import nn\n"
        "def net(num_classes):\n"
        f"    Path({str(ran)!r}).touch()\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))\n"
    )
    spec = f"{own}:net"
    fit(dataclasses.replace(SMALL, model=spec, options={}, epochs=1), folder=tmp_path)
    path = tmp_path / "fastconv-seed0.pt"
    ran.unlink()
    for refused in (
        lambda: checkpoint.load_model(path),
        lambda: checkpoint.transferring(path, "digits"),
        lambda: Predictor(path),
    ):
        with pytest.raises(ValueError, match=r"its net is built by running .*own\.py:net; .* name it"):
            refused()
    with pytest.raises(ValueError, match="model='other:net' is another one"):
        checkpoint.load_model(path, model="other:net")
    assert not ran.exists()
    assert checkpoint.transferring(path, "digits", model=spec).model == spec
    checkpoint.load_model(path, model=spec)
    assert ran.exists()


def test_other_data_are_not_gone_on_with(tmp_path: Path) -> None:
    data = load("synthetic:80", resolution=8)
    fit(dataclasses.replace(SMALL, epochs=1), data=data, folder=tmp_path)
    fewer = dataclasses.replace(data, test=Split(data.test.images[1:], data.test.labels[1:], list(data.test.names)[1:]))
    with pytest.raises(ValueError, match="is of another training: the data have changed"):
        fit(dataclasses.replace(SMALL, epochs=1), data=fewer, folder=tmp_path, resume=True)


def test_signals_are_the_callers_again(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit(dataclasses.replace(SMALL, epochs=1), folder=tmp_path)
    with pytest.raises(Stopped):
        fit(SMALL, folder=tmp_path, on_step=_stopping_at(0, 1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_random_numbers_of_the_caller_stay_as_they_are() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    fit(dataclasses.replace(SMALL, epochs=1), model=_dropping_with_rng_kept())
    assert torch.equal(torch.rand(3), expected)


def _dropping_with_rng_kept() -> nn.Module:
    with torch.random.fork_rng():
        return _dropping()


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    fit(dataclasses.replace(SMALL, epochs=1), folder=tmp_path)
    with pytest.raises(ValueError, match=r"another training: .*epochs=1, now 3.*learning_rate"):
        fit(dataclasses.replace(SMALL, learning_rate=0.5), folder=tmp_path, resume=True)


def test_a_checkpoint_holds_nothing_but_tensors_and_plain_values(tmp_path: Path) -> None:
    outcome = fit(dataclasses.replace(SMALL, epochs=1), folder=tmp_path)
    path = tmp_path / "fastconv-seed0.pt"
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no partial file is left"
    torch.load(path, weights_only=True)
    images = load("synthetic:80", resolution=8).test.images[:4].float()
    for layers in ("fastconv", "torch"):
        model, kept = checkpoint.load_model(path, layers=layers)
        assert kept.settings == outcome.settings
        assert kept.result == {"loss": outcome.test.loss, "accuracy": outcome.test.accuracy}
        torch.testing.assert_close(model(images), outcome.model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("content", [b"", b"half a check", b"PK\x03\x04 cut off"])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt"
    with pytest.raises(FileNotFoundError, match=r"net\.pt: no such checkpoint"):
        checkpoint.load(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"net\.pt is not a checkpoint"):
        checkpoint.load(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match=r"net\.pt is not a checkpoint .*format"):
        checkpoint.load(path)


def _checkpoint(count: int, value: float) -> Checkpoint:
    facts = Facts(("a", "b"), 3, (0.5,) * 3, (0.2,) * 3, "")
    return Checkpoint(Settings(), facts, {"tensor": torch.full((count,), value)}, None, {})


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt"
    checkpoint.save(path, _checkpoint(10, 1.0))

    def full_disk(content: object, file) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, _checkpoint(10, 2.0))
    assert checkpoint.load(path).state["tensor"].tolist() == [1.0] * 10
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_renamed_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt"
    checkpoint.save(path, _checkpoint(10, 1.0))
    renamed = []

    def rename(partial: Path, to: Path) -> None:
        values = [checkpoint.load(file).state["tensor"][0].item() for file in (to, partial)]
        renamed.append(values)
        partial.rename(to)

    monkeypatch.setattr(os, "replace", rename)
    checkpoint.save(path, _checkpoint(10, 2.0))
    assert renamed == [[1.0, 2.0]]
    assert checkpoint.load(path).state["tensor"][0] == 2


_WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    from fastconv.train import Settings, checkpoint
    from fastconv.train.checkpoint import Checkpoint, Facts

    facts = Facts(("a", "b"), 3, (0.5,) * 3, (0.2,) * 3, "")
    value = float(sys.argv[2])
    while True:
        value += 1
        state = {"tensor": torch.full((10_000_000,), value), "value": value}
        checkpoint.save(Path(sys.argv[1]), Checkpoint(Settings(), facts, state, None, {}))
        print("written", flush=True)
    """
)


def test_a_process_killed_in_the_middle_of_a_write_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Killed for real, while the next file of 40 MB is being written."""
    path = tmp_path / "net.pt"
    cut = 0
    for attempt in range(3):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(100 * attempt)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        deadline = time.monotonic() + 30
        while not any(part.stat().st_size for part in _partials(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        cut += any(0 < part.stat().st_size < 40_000_000 for part in _partials(tmp_path))
        state = checkpoint.load(path).state
        assert torch.equal(state["tensor"], torch.full((10_000_000,), state["value"]))
        assert state["value"] > 100 * attempt, "a former process's"
    assert cut, "none was in the middle of a write"
    checkpoint.save(path, _checkpoint(1, 0.0))
    assert list(tmp_path.iterdir()) == [path], "what was left half done is cleared away"


def _partials(folder: Path) -> list[Path]:
    found = []
    for path in folder.glob("*.partial"):
        try:
            path.stat()
        except FileNotFoundError:
            continue
        found.append(path)
    return found
