"""What a training came to, as text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from fastconv.bench import timing
from fastconv.bench.timing import Timing
from fastconv.train.batches import Batches
from fastconv.train.data import Dataset
from fastconv.train.loop import Outcome
from fastconv.train.settings import Settings


def beginning(settings: Settings, data: Dataset, batches: Batches, parameters: int, seeds: Sequence[int], world: int) -> str:
    """What will be trained, on what, how and where."""
    channels, size = data.train.images.shape[1:3]
    counts = f"{len(data.train):,} training"
    if data.validation is not None:
        counts += f", {len(data.validation):,} validation"
    rows = [
        ("data", f"{data.name}: {counts}, {len(data.test):,} test images, {len(data.classes)} classes"),
        ("images", f"{channels}×{settings.resolution}×{settings.resolution}, kept on the {batches.placement}"),
        ("net", f"{settings.model}, {parameters:,} parameters"),
        (
            "steps",
            f"{settings.epochs} epochs of {batches.steps} steps of {batches.batch_size} images; {settings.optimizer}, "
            f"{settings.schedule}, learning rate {settings.learning_rate:g}, weight decay {settings.weight_decay:g}",
        ),
        ("where", f"{machine(settings, world)}; {settings.dtype}; torch {torch.__version__}"),
    ]
    if size != settings.resolution:
        rows[1] = (rows[1][0], f"{rows[1][1]}, at {size}×{size}")
    if data.skipped:
        rows.append(("left out", f"{len(data.skipped)} images that cannot be read, {data.skipped[0]} the first of them"))
    if len(seeds) > 1:
        rows.append(("seeds", f"{seeds[0]} to {seeds[-1]}"))
    return "\n".join(f"{name:<10} {value}" for name, value in rows)


def results(outcomes: Sequence[Outcome], memory: Mapping[str, int], backend: str, world: int = 1) -> str:
    """Test accuracy after the last epoch, images a second, peak memory, and ratios to the first of the nets.

    Args:
        memory: bytes by label, of those for which they were measured.
        backend: fastconv's.
    """
    settings = outcomes[0].settings
    by_label: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_label.setdefault(outcome.label, []).append(outcome)
    speeds = {
        label: Timing(tuple(e.images_per_second for o in group for e in o.epochs)) for label, group in by_label.items()
    }
    accuracies = {label: _accuracy(group) for label, group in by_label.items()}
    width = max(len("test accuracy"), *map(len, accuracies.values()))
    lines = [
        f"{'net':<9} {'test accuracy':<{width}}  {'images/s (20–80 % of epochs)':<30}" + ("  peak memory" if memory else "")
    ]
    for label, speed in speeds.items():
        line = f"{label:<9} {accuracies[label]:<{width}}  {f'{speed.median:,.0f} ({speed.q20:,.0f}–{speed.q80:,.0f})':<30}"
        lines.append((line + (f"  {memory[label] / 1e6:,.0f} MB" if label in memory else "")).rstrip())
    first, *others = by_label
    for label in others:
        ratio = timing.ratio(speeds[first], speeds[label])
        line = f"{first} / {label}: {timing.times(ratio)} the images a second, over {len(ratio.runs)} paired epochs"
        if memory.keys() >= {first, label}:
            line += f"; {memory[first] / memory[label]:.2f}× the memory"
        lines.append(line)
    lines.append(f"backend {backend}; {machine(settings, world)}; {settings.dtype}; torch {torch.__version__}")
    lines.append("images/s: of training with its batches' making, by epoch, evaluation not counted")
    return "\n".join(lines)


def machine(settings: Settings, world: int = 1) -> str:
    device = torch.device(settings.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) + (f" × {world}" if world > 1 else "")
    return f"cpu, {torch.get_num_threads()} threads" + (f" in each of {world} processes" if world > 1 else "")


def _accuracy(group: Sequence[Outcome]) -> str:
    accuracies = [100 * outcome.test.accuracy for outcome in group]
    if len(accuracies) == 1:
        return f"{accuracies[0]:.2f} %"
    return f"{statistics.mean(accuracies):.2f} % ± {statistics.stdev(accuracies):.2f} ({len(accuracies)} seeds)"
