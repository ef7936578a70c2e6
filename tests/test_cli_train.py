"""`fastconv train` and `fastconv predict`, end to end."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv import backends
from fastconv.cli import main
from fastconv.train import checkpoint, runs

for library in ("sklearn", "tqdm", "matplotlib", "PIL"):
    pytest.importorskip(library)

ROOT = Path(fastconv.__file__).parent.parent
TINY = ["--resolution", "8", "--option", "width=4", "--option", "max_width=8", "--epochs", "2", "--batch-size", "256"]
SMALL = [*TINY, "--device", "cpu"]
PICTURES = {"curves.png", "filters.png", "features.png", "confusion.png", "mistakes.png"}


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_compare_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--compare", "fastconv,torch", "--seeds", "2", "--backend", "aten", "--name", "tiny"]
    assert main(["train", *SMALL, "--runs", str(tmp_path), *arguments]) == 0
    printed = capsys.readouterr().out
    for expected in ("fastconv / torch:", "over 4 paired epochs", "(2 seeds)", "backend aten", "peak memory", "MB"):
        assert expected in printed, expected
    folder = tmp_path / "tiny"
    checkpoints = {f"{label}-seed{seed}.pt" for label in ("fastconv", "torch") for seed in (0, 1)}
    assert {file.name for file in folder.iterdir()} == {*checkpoints, *PICTURES, "metrics.jsonl", "run.json"}
    records = _records(folder)
    assert [record["event"] for record in records] == ["start", *(["epoch"] * 4 + ["result"] * 2) * 2]
    assert records[0]["resolution"] == 8 and records[0]["threads"] == torch.get_num_threads()
    assert {(r["label"], r["seed"], r["epoch"]) for r in records if r["event"] == "epoch"} == {
        (label, seed, epoch) for label in ("fastconv", "torch") for seed in (0, 1) for epoch in (1, 2)
    }
    for record in records:
        if record["event"] == "result":
            kept = checkpoint.load(folder / f"{record['label']}-seed{record['seed']}.pt")
            assert kept.result == {"loss": record["loss"], "accuracy": record["accuracy"]}
    assert backends.requested() == "auto", "the backend asked for is that of the run only"


def test_one_net_and_its_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--epochs", "1", "--runs", str(tmp_path), "--embedding", "2"]) == 0
    printed = capsys.readouterr().out
    assert "fastconv /" not in printed
    assert "backend auto (" in printed, "what the automatic choice fell on"
    assert "1,258 training, 180 validation, 359 test images, 10 classes" in printed or "1,259 training" in printed
    assert {file.name for file in (tmp_path / "digits").glob("*.png")} == {*PICTURES, "embedding.png"}


def test_a_run_is_never_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", *SMALL, "--epochs", "1", "--runs", str(tmp_path), "--quiet"]
    assert main(train) == main(train) == 0
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["digits", "digits-2"]
    kept = (tmp_path / "digits" / "fastconv-seed0.pt").read_bytes()
    assert main([*train, "--name", "digits"]) == 1
    assert "holds a run: --resume goes on with it, --overwrite begins anew" in capsys.readouterr().err
    assert (tmp_path / "digits" / "fastconv-seed0.pt").read_bytes() == kept
    (tmp_path / "digits" / "mine.txt").write_text("mine")
    assert main([*train, "--name", "digits", "--overwrite", "--seed", "3"]) == 0
    assert {file.name for file in (tmp_path / "digits").glob("*.pt")} == {"fastconv-seed3.pt"}
    assert (tmp_path / "digits" / "mine.txt").exists()


def test_no_run_is_emptied_for_what_cannot_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", *SMALL, "--epochs", "1", "--runs", str(tmp_path), "--name", "a"]
    assert main([*train, "--quiet"]) == 0
    net = tmp_path / "a" / "fastconv-seed0.pt"
    kept = net.read_bytes()
    for wrong, message in (
        (["--transfer", str(net)], "which --overwrite would empty"),
        (["--option", "width=abc"], "cannot be built"),
        (["--freeze", "nothing"], "freeze must name"),
        (["--compare", "--compile"], "--compile is of one net"),
        (["--resume"], "--overwrite begins anew, --resume goes on"),
    ):
        assert main([*train, "--overwrite", *wrong]) == 1
        assert message in capsys.readouterr().err
        assert net.read_bytes() == kept


def test_runs_are_numbered(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a holds no run"):
        runs.last(tmp_path, "a")
    assert [runs.claim(tmp_path, "a") for _ in range(3)] == [1, 2, 3]
    runs.folder(tmp_path, "a", 2).rmdir()
    assert runs.last(tmp_path, "a") == 3
    assert runs.claim(tmp_path, "a") == 2


def test_quiet_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--epochs", "1", "--runs", str(tmp_path), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def _process(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """In an environment that does not make Python write each line at once."""
    command = [sys.executable, "-m", "fastconv", "train", "--runs", str(folder), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        preexec_fn=_heard,
    )


def _heard() -> None:
    """SIGINT as a terminal's foreground has it; where tests run in the background it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_stops_and_resume_goes_on(tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--epochs", "12", "--batch-size", "64", "--seeds", "2", "--name", "cut"]
    process = _process(tmp_path, arguments)
    assert process.stdout is not None
    for line in process.stdout:
        assert "\x1b" not in line and "\r" not in line, "what is no terminal gets plain lines"
        if line.startswith("seed 0 epoch  2"):
            break
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "--resume goes on from it" in said and "Traceback" not in said
    assert main(["train", "--resume", "--name", "cut", "--runs", str(tmp_path), "--epochs", "13"]) == 1
    assert "as it was begun: epochs is 12, got 13" in capsys.readouterr().err
    assert main(["train", "--resume", "--name", "cut", "--runs", str(tmp_path), "--seeds", "3"]) == 1
    assert "seeds is (0, 1), got (0, 1, 2)" in capsys.readouterr().err
    assert main(["train", "--resume", "--name", "cut", "--runs", str(tmp_path), "--device", "cpu"]) == 0
    assert main(["train", *arguments[:-1], "whole", "--runs", str(tmp_path), "--quiet"]) == 0

    def curve(name: str) -> list[tuple]:
        epochs = [record for record in _records(tmp_path / name) if record["event"] == "epoch"]
        return [(e["seed"], e["epoch"], e["train_loss"], e["held_out_loss"]) for e in epochs]

    assert curve("cut") == curve("whole"), "bit for bit"
    results = [[r for r in _records(tmp_path / name) if r["event"] == "result"] for name in ("cut", "whole")]
    assert results[0] == results[1]


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    """On a pseudo-terminal: images, time left, loss; with NO_COLOR no colours."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    for extra in ({}, {"NO_COLOR": "1"}):
        main_end, other_end = pty.openpty()
        fcntl.ioctl(main_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
        command = [sys.executable, "-m", "fastconv", "train", *SMALL, "--batch-size", "8", "--runs", str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **extra}
        if not extra:
            environment.pop("NO_COLOR", None)
        process = subprocess.Popen(command, stdout=other_end, stderr=other_end, env=environment, cwd=tmp_path)
        os.close(other_end)
        shown = b""
        while True:
            try:
                part = os.read(main_end, 65536)
            except OSError:  # Linux tells the end so
                break
            shown += part
            if not part:
                break
        os.close(main_end)
        assert process.wait() == 0
        text = shown.decode(errors="replace")
        assert "img/s" in text and "fastconv loss" in text and "<" in text
        assert ("\x1b[34m" in text) is not bool(extra)


def test_resume_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "--runs", str(tmp_path)]) == 1
    assert "digits holds no run to go on with" in capsys.readouterr().err
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text("{")
    assert main(["train", "--resume", "--name", "x", "--runs", str(tmp_path)]) == 1
    assert "run.json is not the plan of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--device", "cuda"],
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--resolution", "36"], "nearest resolutions that work"),
        (["--option", "width=64", "--option", "max_width=32"], "max_width must be at least width=64"),
        (["--option", "depth=3"], "unknown option depth"),
        (["--model", "lenet"], "did you mean 'lenet5'"),
        (["--model", "lenet5", "--resolution", "32"], "resolution must be 28, got resolution=32"),
        (["--data", "imagenet"], "data must be one of digits"),
        (["--data", "cifar10:nowhere"], "nowhere"),
        (["--data", "folder:nowhere"], "nowhere"),
        (["--classes", "3,eleven"], "eleven"),
        (["--freeze", "stem"], "freeze must name modules of the net"),
        (["--transfer", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["--learning-rate", "-1"], "learning_rate must be a number from 0 on"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["train", "--runs", str(tmp_path / "runs"), "--device", "cpu", *arguments]) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("fastconv train: ")
    assert message in "\n".join(printed)
    assert not (tmp_path / "runs").exists(), "nothing is made, and a former run of that name would be untouched"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be at least 1"),
        (["--seed", "-1"], "must be at least 0"),
        (["--compare", "eager"], "must be different ones of fastconv,torch,compile, got 'eager'"),
        (["--augment", "zoom=2"], "got zoom"),
        (["--augment", "flip=no"], "flip must be true or false"),
        (["--option", "width"], "must be NAME=VALUE"),
        (["--classes", "a,,b"], "must be names with commas between them"),
    ],
)
def test_options_are_looked_at_first(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("library", ["sklearn", "matplotlib", "tqdm"])
def test_a_missing_library_is_named(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["train", *SMALL, "--epochs", "1", "--runs", str(tmp_path)]) == 1
    assert "pip install 'fastconv[train]'" in capsys.readouterr().err


def _photos(folder: Path, colours: dict[str, tuple[int, int, int]], count: int = 12) -> Path:
    """Squares of one colour a class on a noisy ground, as PNGs of different sizes."""
    import numpy
    from PIL import Image

    random = numpy.random.default_rng(7)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            height, width = random.integers(20, 40, 2)
            pixels = random.integers(0, 80, (height, width, 3), dtype=numpy.uint8)
            pixels[5:15, 5:15] = colour
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_train_transfer_and_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = _photos(tmp_path / "photos", {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)})
    small = ["--resolution", "16", "--option", "width=8", "--option", "max_width=16", "--batch-size", "8", "--device", "cpu"]
    runs = ["--runs", str(tmp_path / "runs")]
    train = [
        "train",
        "--data",
        f"folder:{photos}",
        *small,
        "--epochs",
        "20",
        "--learning-rate",
        "5e-3",
        "--augment",
        "flip=1",
    ]
    assert main([*train, *runs, "--name", "photos"]) == 0
    net = tmp_path / "runs" / "photos" / "fastconv-seed0.pt"
    shown = capsys.readouterr().out
    assert "folder: " in shown and "3 classes" in shown
    images = [str(photos / name / "0.png") for name in ("red", "green", "blue")]
    for extra in ([], ["--tta"]):
        assert main(["predict", "--checkpoint", str(net), "--device", "cpu", "--json", *extra, *images]) == 0
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [record["image"] for record in records] == images
        assert [record["top"][0]["class"] for record in records] == ["red", "green", "blue"]
        for record in records:
            scores = [entry["score"] for entry in record["top"]]
            assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-5)
    assert main(["predict", "--checkpoint", str(net), "--top", "1", images[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == images[0] and lines[1].endswith("%  red") and len(lines) == 2

    two = _photos(tmp_path / "two", {"warm": (255, 60, 0), "cold": (0, 60, 255)}, count=6)
    transfer = ["--transfer", str(net), "--freeze", "features", "--data", f"folder:{two}", "--epochs", "15"]
    how = ["--batch-size", "4", "--learning-rate", "2e-2", "--augment", "none", "--device", "cpu", "--name", "head"]
    assert main(["train", *transfer, *how, *runs]) == 0
    assert "recipe" in capsys.readouterr().out, "net and size are the checkpoint's"
    head = tmp_path / "runs" / "head" / "fastconv-seed0.pt"
    kept = checkpoint.load(head)
    assert kept.settings.resolution == 16 and kept.facts.classes == ("cold", "warm")
    assert main(["predict", "--checkpoint", str(head), str(two / "warm" / "1.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top"][0]["class"] == "warm"


def test_predictions_of_a_net_of_one_channel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Colour images become grey for it."""
    assert main(["train", *SMALL, "--epochs", "1", "--runs", str(tmp_path), "--quiet"]) == 0
    photos = _photos(tmp_path / "photos", {"a": (255, 0, 0)}, count=1)
    net = tmp_path / "digits" / "fastconv-seed0.pt"
    assert main(["predict", "--checkpoint", str(net), str(photos / "a" / "0.png"), "--json"]) == 0
    assert {entry["class"] for entry in json.loads(capsys.readouterr().out)["top"]} <= set("0123456789")


def test_what_cannot_be_predicted_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--epochs", "1", "--runs", str(tmp_path), "--quiet"]) == 0
    net = str(tmp_path / "digits" / "fastconv-seed0.pt")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for image in ("absent.png", "broken.png"):
        assert main(["predict", "--checkpoint", net, str(tmp_path / image)]) == 1
        assert image in capsys.readouterr().err
    assert main(["predict", "--checkpoint", str(tmp_path / "broken.png"), "x.png"]) == 1
    assert "broken.png is not a checkpoint" in capsys.readouterr().err
