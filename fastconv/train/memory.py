"""The memory of a training step on a CPU, in a process of its own: `python -m fastconv.train.memory`.

As fastconv.bench.suites.memory tells it: how far the process grows, at its highest, above what it was with the net and the
batch in place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from fastconv.bench.suites.memory import resident
from fastconv.train import nets
from fastconv.train.distributed import Group
from fastconv.train.settings import Settings
from fastconv.train.step import Step

_STEPS = 3
_MODULE = "fastconv.train.memory"


def peak(label: str, settings: Settings, *, classes: int, channels: int, backend: str) -> int:
    """Bytes that a step of the net of this label grows by, measured in a new process.

    Args:
        classes, channels: of the data.
        backend: fastconv's, as FASTCONV_BACKEND names it.

    Raises:
        RuntimeError: that process failed; with what it said.
    """
    # Neither transfer nor epochs matter, and the checkpoint to borrow from may be gone.
    described = {**settings.as_dict(), "transfer": ""}
    content = {
        "label": label,
        "settings": described,
        "classes": classes,
        "channels": channels,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", _MODULE],
        input=json.dumps(content),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "FASTCONV_BACKEND": backend},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{_MODULE} of {label} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _measure(label: str, settings: Settings, classes: int, channels: int) -> int:
    layers = "fastconv" if label == "fastconv" else "torch"
    small = Settings.of("synthetic", resolution=8, options={"width": 8, "max_width": 8}, dtype=settings.dtype)
    for shown in (small, settings):  # the first step of all loads code, which is not a step's memory
        model = nets.build(shown, classes=classes, channels=channels, layers=layers)
        step = Step(model, shown, Group(), compiled=shown.compile or label == "compile")
        step.mode()
        images = torch.randn(shown.batch_size, channels, shown.resolution, shown.resolution)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.randint(0, classes, (shown.batch_size,))
        before = resident("VmRSS")
        for _ in range(_STEPS):
            step(images, labels, shown.learning_rate)
    return resident("VmHWM") - before


def main() -> int:
    content = json.load(sys.stdin)
    torch.set_num_threads(content["threads"])
    settings = Settings.from_dict(content["settings"])
    print(_measure(content["label"], settings, content["classes"], content["channels"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
