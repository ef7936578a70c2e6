"""`fastconv train`: train a net on fastconv's layers, or the same net on several kinds of layers side by side."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastconv
from fastconv import backends
from fastconv.cli import arguments
from fastconv.cli.progress import Progress, require_tqdm
from fastconv.train import canvas, checkpoint, gallery, loop, memory, pictures, runs, tables
from fastconv.train.augment import Augmentation
from fastconv.train.batches import evaluation
from fastconv.train.checkpoint import Facts
from fastconv.train.data import Dataset, Files
from fastconv.train.distributed import Group, joined
from fastconv.train.loop import Outcome
from fastconv.train.runs import Plan
from fastconv.train.settings import DTYPES, LABELS, OPTIMIZERS, SCHEDULES, Settings
from fastconv.train.step import autocast, freeze

_DESCRIPTION = """\
Train a net and leave its checkpoint, metrics.jsonl and pictures in RUNS/NAME. What is not given is what suits the data set:
`fastconv train` alone trains the recipe net on 1,797 handwritten digits in about a minute.

  fastconv train --compare                     the same net on stock torch and torch.compile, epoch about, with ratios
  fastconv train --data folder:photos          a folder of images for each class
  fastconv train --transfer runs/a/fastconv-seed0.pt --freeze features --data folder:few
  torchrun --nproc-per-node 2 -m fastconv train ...   several processes, a GPU for each
  fastconv train --resume --name a             go on with a run that was stopped
"""


_AUGMENTATIONS = ", ".join(field.name for field in dataclasses.fields(Augmentation))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return names


def _labels(text: str) -> tuple[str, ...]:
    names = _names(text)
    if not set(names) <= set(LABELS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be different ones of {','.join(LABELS)}, got {text!r}")
    return names


def _option(text: str) -> tuple[str, int | float | bool | str]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, such as width=64; got {text!r}")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, {"true": True, "false": False}.get(value.lower(), value)


def _augmentation(text: str) -> Augmentation:
    if text == "none":
        return Augmentation()
    values = dict(_option(part) for part in text.split(","))
    unknown = values.keys() - {field.name for field in dataclasses.fields(Augmentation)}
    if unknown:
        raise argparse.ArgumentTypeError(f"allowed: none, or of {_AUGMENTATIONS}; got {', '.join(sorted(unknown))}")
    try:
        return Augmentation(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train the recipe net, another one or your own, on digits or on your data",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run_ = parser.add_argument_group("run").add_argument
    run_("--name", help="of the run (default: the data set's, numbered if it is taken)")
    run_("--runs", type=Path, default=Path("runs"), help="folder that runs are kept in (default: runs)")
    run_("--resume", action="store_true", help="go on with the run of this name, the last one without a name")
    run_("--overwrite", action="store_true", help="begin anew in the folder of a former run of this name")
    run_("--seed", type=arguments.whole, help="first seed: weights, order and changes of images, dropout (default: 0)")
    run_("--seeds", type=arguments.positive, help="how many seeds to train, one after the other (default: 1)")
    run_(
        "--compare",
        type=_labels,
        nargs="?",
        const=LABELS,
        metavar="NETS",
        help="train the net of each of these kinds of layers side by side: fastconv, torch, compile (default: all three)",
    )
    run_("--quiet", action="store_true", help="print errors alone")

    data = parser.add_argument_group("data").add_argument
    data("--data", metavar="DATA", help="digits (default), cifar10[:PATH], mnist[:PATH], folder:PATH, synthetic[:COUNT]")
    data("--classes", type=_names, help="a subset of the classes, by name: cat,dog")
    data("--validation", type=float, metavar="SHARE", help="share of the training images to hold out")
    data("--skip-corrupt", action="store_true", default=None, help="leave out images that cannot be read, and count them")
    data("--resolution", type=arguments.positive, metavar="R", help="images are R×R pixels")
    data("--augment", type=_augmentation, metavar="NAME=VALUE,...", help=f"none, or of: {_AUGMENTATIONS}")

    net = parser.add_argument_group("net").add_argument
    net("--model", help="a name of fastconv.models.list(), or path/to/file.py:callable")
    net("--option", action="append", type=_option, metavar="NAME=VALUE", help="of the model, such as width=64; repeatable")
    net(
        "--embedding", type=arguments.positive, metavar="UNITS", help="a layer of so many units before the last; 2 are drawn"
    )
    net(
        "--transfer",
        metavar="CHECKPOINT",
        help="start from the weights of a checkpoint, whose net and size are then the default",
    )
    net("--freeze", type=_names, metavar="MODULES", help="modules that are not trained: features")

    how = parser.add_argument_group("how").add_argument
    how("--epochs", type=arguments.positive, help="passes over the training images")
    how("--batch-size", type=arguments.positive, help="images a step, over all processes")
    how("--optimizer", choices=OPTIMIZERS, help="sgd has Nesterov's momentum")
    how("--learning-rate", type=float, help="the highest of the schedule")
    how("--weight-decay", type=float, help="of weights, not of biases and norms")
    how("--momentum", type=float, help="of sgd")
    how("--schedule", choices=SCHEDULES)
    how("--label-smoothing", type=float)
    how("--dtype", choices=tuple(DTYPES), help="the 16-bit ones by autocast")
    how("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ... (default: auto)")
    how("--compile", action="store_true", default=None, help="through torch.compile")
    how(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="capture a whole step and replay it (default: on a GPU, with one process)",
    )
    how("--backend", choices=backends.REQUESTS, default=backends.requested(), help="fastconv's backend")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, write what there is to keep, print the table."""
    # For all nets alike: a CPU's convolutions take up to 200 times as long over denormal numbers. Threads inherit the
    # setting when they start, so it comes before the first operator.
    torch.set_flush_denormal(True)
    try:
        with joined(arguments.device(options.device)) as (group, device):
            _Command(options, group, device).run()
    finally:
        torch.set_flush_denormal(False)


class _Command:
    """A call of `fastconv train`, of this process of the group."""

    def __init__(self, options: argparse.Namespace, group: Group, device: str) -> None:
        canvas.require_matplotlib()  # neither is found missing only after the training
        require_tqdm()
        self.options, self.group, self.device = options, group, device
        self.quiet = options.quiet or not group.is_first

    def run(self) -> None:
        plan, folder = self._resumed() if self.options.resume else (self._new(), None)
        data = loop.of_settings(plan.settings, self.group.world)
        # What cannot be trained is refused before a former run is touched.
        net = loop.net_of(plan.settings, data, plan.labels[0])
        freeze(net, plan.settings.freeze)
        batches = loop.batches_of(plan.settings, data, self.group)
        if folder is None:
            folder = self._folder()
        if self.group.is_first:
            plan.write(folder)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        self._say(tables.beginning(plan.settings, data, batches, parameters, plan.seeds, self.group.world))
        self._say(f"{'run':<10} {folder}")
        outcomes = self._train(plan, data, folder, batches.images_per_epoch, batches.batch_size)
        if self.group.is_first:
            settings = dataclasses.replace(plan.settings, batch_size=batches.batch_size)
            self._say(
                "\n"
                + tables.results(outcomes, self._memory(plan, settings, data, outcomes), self._backend(), self.group.world)
            )
            self._draw(plan.settings, data, folder, outcomes)
            self._say(f"checkpoints, pictures and metrics: {folder}")

    def _given(self) -> dict[str, Any]:
        """The settings that options name."""
        own = ("resolution", "embedding", "epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "momentum")
        same = (*own, "schedule", "label_smoothing", "dtype", "compile", "cuda_graph", "transfer", "freeze", "model")
        given = {name: getattr(self.options, name) for name in (*same, "classes", "validation", "skip_corrupt")}
        given["augmentation"] = self.options.augment
        given["options"] = None if self.options.option is None else dict(self.options.option)
        return {name: value for name, value in given.items() if value is not None}

    def _new(self) -> Plan:
        data, given = self.options.data or "digits", self._given()
        lender = given.pop("transfer", None)
        of = Settings.of if lender is None else partial(checkpoint.transferring, Path(lender))
        settings = of(data, **given, device=self.device)
        labels = self.options.compare or ("fastconv",)
        if self.group.world > 1 and len(labels) > 1:
            raise ValueError(f"--compare is of one process, got {self.group.world} processes")
        if self.group.world > 1 and settings.cuda_graph:
            raise ValueError(f"--cuda-graph is of one process, got {self.group.world} processes")
        if settings.compile and len(labels) > 1:
            raise ValueError("--compile is of one net: 'compile' is one of those of --compare already")
        return Plan(settings, tuple(labels), self._seeds())

    def _seeds(self) -> tuple[int, ...]:
        first = self.options.seed or 0
        return tuple(range(first, first + (self.options.seeds or 1)))

    def _resumed(self) -> tuple[Plan, Path]:
        if self.options.overwrite:
            raise ValueError("--overwrite begins anew, --resume goes on: ask for one of them")
        folder = self._path(1 if self.options.name else runs.last(self.options.runs, self._name))
        plan = Plan.read(folder)
        given = self._given()
        held = {name: getattr(plan.settings, name) for name in given}
        if "options" in given:
            held["options"] = {name: plan.settings.options.get(name) for name in given["options"]}
        if self.options.data:
            given["data"], held["data"] = self.options.data, plan.settings.data
        if self.options.compare:
            given["compare"], held["compare"] = self.options.compare, plan.labels
        if self.options.seed is not None or self.options.seeds is not None:
            given["seeds"], held["seeds"] = self._seeds(), plan.seeds
        other = [f"{name} is {held[name]!r}, got {given[name]!r}" for name in given if given[name] != held[name]]
        if other:
            raise ValueError(f"--resume goes on with {folder} as it was begun: {'; '.join(other)}")
        return Plan(plan.settings.on(self.device), plan.labels, plan.seeds), folder

    def _folder(self) -> Path:
        """A new folder, or that of a former run, emptied; made by the first process."""
        found, path = 0, self._path(1)
        if self.group.is_first:
            found = 1
            if self.options.overwrite:
                if self.options.transfer and Path(self.options.transfer).resolve().is_relative_to(path.resolve()):
                    raise ValueError(f"--transfer {self.options.transfer} lies in {path}, which --overwrite would empty")
                runs.clear(path)
            elif self.options.name is None:
                found = runs.claim(self.options.runs, self._name)
            elif runs.is_begun(path):
                raise ValueError(
                    f"{path} holds a run: --resume goes on with it, --overwrite begins anew, another --name keeps it"
                )
        return self._path(self.group.any(found))

    @property
    def _name(self) -> str:
        return self.options.name or (self.options.data or "digits").split(":")[0]

    def _path(self, number: int) -> Path:
        path: Path = runs.folder(self.options.runs, self._name, number)
        return path

    def _train(self, plan: Plan, data: Dataset, folder: Path, images: int, batch: int) -> list[Outcome]:
        environment = {
            "fastconv": fastconv.__version__,
            "torch": str(torch.__version__),
            "backend": self.options.backend,
            "threads": torch.get_num_threads(),
            "machine": tables.machine(plan.settings, self.group.world),
        }
        epochs = plan.settings.epochs
        outcomes: list[Outcome] = []
        backends.chosen.clear()
        total = images * epochs * len(plan.labels) * len(plan.seeds)
        with (
            backends.use_backend(self.options.backend),
            runs.metrics(folder if self.group.is_first else None, plan, environment) as metrics,
            Progress(total, epochs, self.quiet) as progress,
        ):
            for warning in runs.changed(folder, plan, environment) if self.options.resume else ():
                progress.say(warning)

            def after(epoch: loop.Epoch) -> None:
                metrics.write("epoch", **vars(epoch))
                progress.epoch(epoch)

            for seed in plan.seeds:
                outcomes += loop.fit_together(
                    plan.settings.with_seed(seed),
                    plan.labels,
                    data=data,
                    folder=folder,
                    resume=self.options.resume,
                    group=self.group,
                    environment=environment,
                    on_step=lambda trainee: progress.step(trainee, batch),
                    on_epoch=after,
                )
                for outcome in outcomes[-len(plan.labels) :]:
                    metrics.write("result", label=outcome.label, seed=seed, **vars(outcome.test))
                progress.reach(len(outcomes) * images * epochs)
        return outcomes

    def _memory(self, plan: Plan, settings: Settings, data: Dataset, outcomes: Sequence[Outcome]) -> dict[str, int]:
        """Bytes that a step grows by, of each label for which that can be told."""
        if torch.device(self.device).type == "cuda":
            return {outcome.label: max(epoch.growth for epoch in outcome.epochs) for outcome in outcomes}
        if len(plan.labels) == 1 or self.quiet:
            return {}
        self._say("measuring the memory of a step, in a process for each net")
        facts, found = Facts.of(data), {}
        for label in plan.labels:
            if label == "compile":  # the compiler's own memory cannot be told from the net's
                continue
            size = {"classes": len(facts.classes), "channels": facts.channels}
            try:
                found[label] = memory.peak(label, settings, **size, backend=self.options.backend)
            except (RuntimeError, OSError) as error:  # no reason to lose what was trained
                self._say(f"not measured: {error}")
        return found

    def _backend(self) -> str:
        return self.options.backend + (f" ({', '.join(sorted(backends.chosen))})" if backends.chosen else "")

    def _draw(self, settings: Settings, data: Dataset, folder: Path, outcomes: Sequence[Outcome]) -> None:
        pictures.draw_curves(folder / "curves.png", [epoch for outcome in outcomes for epoch in outcome.epochs])
        tested = evaluation(data, data.test, device=torch.device(self.device))
        with autocast(settings):
            gallery.draw(
                folder,
                outcomes[0].model,
                batches=((images, labels) for images, labels, _ in tested),
                names=data.classes,
                mean=data.mean,
                std=data.std,
            )
        skipped = {
            file for split in (data.train, data.test) if isinstance(split.images, Files) for file in split.images.skipped
        }
        if skipped:
            self._say(f"{len(skipped)} images that cannot be read were passed over, {min(skipped)} the first of them")

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text)
