"""`fastconv train`: the recipe net on real images, on fastconv's layers and on torch's."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

import fastconv
from fastconv import backends
from fastconv.bench import timing
from fastconv.cli import arguments
from fastconv.models.layers import LAYERS
from fastconv.train import checkpoint, data, loop, pictures
from fastconv.train.loop import Epoch, Outcome, Settings

_DEFAULTS = Settings()


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train the recipe net on the digits data set",
        description=(
            "Train the recipe net on scikit-learn's 1,797 handwritten digits, through fastconv's fused layers and "
            "through stock torch layers: same initial weights, same batches, epoch about, so that their times are "
            "paired. Writes metrics.jsonl, curves.png and a checkpoint per net to RUNS/NAME, replacing a former run "
            "of that name, and prints a table."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--name", default="digits", help="name of the run")
    option("--runs", type=Path, default=Path("runs"), help="folder that runs are kept in")
    option("--layers", choices=("both", *LAYERS), default="both", help="which nets to train")
    option("--seeds", type=arguments.positive, default=1, help="how many seeds to train, from --seed upwards")
    option("--seed", type=int, default=_DEFAULTS.seed, help="first seed: weights, order and moves of images")
    option("--epochs", type=arguments.positive, default=_DEFAULTS.epochs, help="passes over the training images")
    option("--batch-size", type=arguments.positive, default=_DEFAULTS.batch_size, help="images a step")
    option("--learning-rate", type=float, default=_DEFAULTS.learning_rate, help="the highest of the one-cycle schedule")
    option("--resolution", type=arguments.positive, default=_DEFAULTS.resolution, help="images are resized to R×R pixels")
    option("--width", type=arguments.positive, default=_DEFAULTS.width, help="channels of the net's first block")
    option("--max-width", type=arguments.positive, default=_DEFAULTS.max_width, help="most channels of any block")
    option("--downsample", choices=("max", "conv"), default=_DEFAULTS.downsample, help="how maps are halved")
    option("--dtype", choices=tuple(loop.DTYPES), default=_DEFAULTS.dtype, help="the 16-bit ones by autocast")
    option("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    option("--backend", choices=backends.REQUESTS, default=backends.requested(), help="fastconv's backend")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, write what there is to keep, print the table."""
    # For both nets alike: a CPU's convolutions take up to 200 times as long over denormal numbers. Threads inherit the
    # setting when they start, so it comes before the first operator.
    torch.set_flush_denormal(True)
    try:
        _train(options)
    finally:
        torch.set_flush_denormal(False)


def _train(options: argparse.Namespace) -> None:
    pictures.require_matplotlib()  # not found missing only after the training
    device = arguments.device(options.device)
    layers = LAYERS if options.layers == "both" else (options.layers,)
    settings = [
        Settings(
            resolution=options.resolution,
            width=options.width,
            max_width=options.max_width,
            downsample=options.downsample,
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=seed,
            dtype=options.dtype,
            device=device,
        )
        for seed in range(options.seed, options.seed + options.seeds)
    ]
    with torch.device("meta"):
        loop.build(settings[0], 1, 1, "torch")  # settings that make no net are refused before a former run is replaced
    folder = options.runs / options.name
    folder.mkdir(parents=True, exist_ok=True)
    digits = data.load_digits(options.resolution)
    outcomes: list[Outcome] = []
    backends.chosen.clear()
    with (
        backends.use_backend(options.backend),
        open(folder / "metrics.jsonl", "w", encoding="utf-8") as metrics,
        _progress(options.seeds * len(layers) * options.epochs * loop.steps_per_epoch(digits, settings[0])) as bar,
    ):
        _write(metrics, event="start", **_environment(options.backend), **settings[0].as_dict(), seeds=options.seeds)
        for each in settings:
            finished = loop.fit(
                digits,
                each,
                layers=layers,
                on_step=bar.update,
                on_epoch=lambda epoch: _report(epoch, options.epochs, metrics, bar),
            )
            for outcome in finished:
                _write(metrics, event="result", layers=outcome.layers, seed=each.seed, test_accuracy=outcome.test_accuracy)
                checkpoint.save(
                    folder / f"{outcome.layers}-seed{each.seed}.pt",
                    outcome,
                    in_channels=digits.train.images.shape[1],
                    classes=digits.classes,
                )
            outcomes += finished
    pictures.draw_curves(folder / "curves.png", [epoch for outcome in outcomes for epoch in outcome.epochs])
    backend = options.backend + (f" ({', '.join(sorted(backends.chosen))})" if backends.chosen else "")
    print(table(outcomes, backend))
    print(f"curves, metrics and checkpoints: {folder}")


def table(outcomes: Sequence[Outcome], backend: str) -> str:
    """What a run came to: test accuracy at the last epoch, seconds per epoch, their ratio, and what it ran on."""
    settings = outcomes[0].settings
    by_layers: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_layers.setdefault(outcome.layers, []).append(outcome)
    epoch_times = {
        layers: timing.Timing(tuple(epoch.seconds for outcome in group for epoch in outcome.epochs))
        for layers, group in by_layers.items()
    }
    lines = [f"{'layers':<10} {'test accuracy':<26} seconds per epoch"]
    for layers, group in by_layers.items():
        accuracies = [100 * outcome.test_accuracy for outcome in group]
        accuracy = f"{statistics.mean(accuracies):.2f} %"
        if len(accuracies) > 1:
            accuracy += f" ± {statistics.stdev(accuracies):.2f} ({len(accuracies)} seeds)"
        lines.append(f"{layers:<10} {accuracy:<26} {timing.seconds(epoch_times[layers])}")
    if len(by_layers) == 2:
        ratio = timing.ratio(epoch_times["torch"], epoch_times["fastconv"])
        lines.append(f"torch / fastconv: {timing.times(ratio)} over {len(ratio.runs)} paired epochs")
    where = torch.device(settings.device)
    machine = torch.cuda.get_device_name(where) if where.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    lines.append(f"backend {backend}; {machine}; {settings.dtype}; torch {torch.__version__}")
    lines.append("times: median (20%–80% of the epochs), training only, evaluation not counted")
    return "\n".join(lines)


def _report(epoch: Epoch, epochs: int, metrics: TextIO, bar: Any) -> None:
    _write(metrics, event="epoch", **vars(epoch))
    bar.write(
        f"seed {epoch.seed} epoch {epoch.epoch:>2}/{epochs} {epoch.layers:<8} "
        f"train loss {epoch.train_loss:.3f} accuracy {100 * epoch.train_accuracy:6.2f} %  "
        f"validation loss {epoch.validation_loss:.3f} accuracy {100 * epoch.validation_accuracy:6.2f} %  "
        f"{epoch.seconds:.2f} s"
    )


def _write(metrics: TextIO, **record: object) -> None:
    metrics.write(json.dumps(record) + "\n")
    metrics.flush()


def _environment(backend: str) -> dict[str, object]:
    return {
        "fastconv": fastconv.__version__,
        "torch": torch.__version__,
        "backend": backend,
        "threads": torch.get_num_threads(),
    }


def _progress(steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress is shown by tqdm, which is not installed: pip install 'fastconv[train]' (or tqdm)"
        ) from error
    return tqdm(total=steps, unit="step", disable=None, smoothing=0.05)
