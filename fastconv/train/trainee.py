"""A net in training, and the place in the training where it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastconv.bench.timing import stopwatch
from fastconv.train.batches import Batches, evaluation
from fastconv.train.data import Dataset
from fastconv.train.distributed import Group
from fastconv.train.settings import Settings
from fastconv.train.step import Growth, Step, autocast, loss_of, predicted, schedule

_EPOCH_SEED, _RANK_SEED = 1_000_003, 7_919  # primes, so that no two epochs of any seed share a stream


@dataclass(frozen=True)
class Epoch:
    """One epoch of one net.

    Losses are means over images, the training ones while the net learns; accuracies are shares in [0, 1]; what is held out
    is the validation images, or the test ones where there are none. `seconds` are of training only, since the epoch was last
    gone on with; `growth` is by how many bytes a GPU's memory grew above what was taken before, at most; 0 on a CPU.
    """

    label: str
    seed: int
    epoch: int
    train_loss: float
    train_accuracy: float
    held_out: str
    held_out_loss: float
    held_out_accuracy: float
    learning_rate: float
    seconds: float
    images_per_second: float
    growth: int


@dataclass(frozen=True)
class Score:
    """Of a net on all images of a split: mean loss, and accuracy in [0, 1]."""

    loss: float
    accuracy: float


class Trainee:
    """A net, its optimizer and how far it has come.

    Attributes:
        label: "fastconv", "torch" or "compile".
        model: the net, without what is wrapped round it while it learns.
        epoch, step: of the next step; `step` counts within the epoch.
        epochs: what came of the epochs before.
    """

    def __init__(
        self, label: str, model: nn.Module, data: Dataset, batches: Batches, settings: Settings, group: Group
    ) -> None:
        self.label, self.model = label, model
        self.epoch = self.step = 0
        self.epochs: list[Epoch] = []
        self._data, self._batches, self._settings, self._group = data, batches, settings, group
        self._device = torch.device(settings.device)
        self._learn = Step(model, settings, group, compiled=settings.compile or label == "compile")
        self._rng: Mapping[str, Tensor] = {}  # of the step that is gone on from

    @property
    def is_finished(self) -> bool:
        return self.epoch == self._settings.epochs

    @property
    def ends_epoch(self) -> bool:
        """Whether the epoch's last step is done."""
        return self.step == self._batches.steps

    @property
    def loss_and_accuracy(self) -> tuple[float, float]:
        """Of this process's training images of this epoch so far; waits for the GPU."""
        count = max(self.step * (self._batches.batch_size // self._group.world), 1)
        return self._learn.loss_sum.item() / count, self._learn.right.item() / count

    def prepare(self, always: bool = False) -> None:
        """Compile and capture before the clock runs; with `always`, take a step that leaves no trace in any case."""
        if always or self._learn.gains_by_preparation:
            self._learn.mode()
            self._learn.prepare(*next(self._batches.epoch(0)))

    def train_epoch(self, on_step: Callable[[Trainee], None]) -> Epoch:
        """Go on to the end of the epoch. `on_step` is called after each step, and may raise."""
        if self.step == 0:
            self._learn.loss_sum.zero_()
            self._learn.right.zero_()
        self._learn.mode()
        memory = Growth(self._device)
        steps = self._batches.steps - self.step
        with self._randomness(), stopwatch(self._device) as watch:
            for images, labels in self._batches.epoch(self.epoch, self.step):
                self._learn(images, labels, self.learning_rate)
                self.step += 1
                on_step(self)
        growth = max(memory.bytes(), self._learn.growth)
        count = self._batches.images_per_epoch
        loss, right = self._group.total(self._learn.loss_sum, self._learn.right)
        split = "test" if self._data.validation is None else "validation"
        self._group.share_buffers(self.model)
        score = self.evaluate(split)
        self.epochs.append(
            Epoch(
                label=self.label,
                seed=self._settings.seed,
                epoch=self.epoch + 1,
                train_loss=loss / count,
                train_accuracy=right / count,
                held_out=split,
                held_out_loss=score.loss,
                held_out_accuracy=score.accuracy,
                learning_rate=self._rate(self.step - 1),
                seconds=watch.seconds,
                images_per_second=steps * self._batches.batch_size / watch.seconds,
                growth=growth,
            )
        )
        self.epoch, self.step = self.epoch + 1, 0
        return self.epochs[-1]

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._rate(self.step)

    def _rate(self, step: int) -> float:
        done = self.epoch * self._batches.steps + step
        share = schedule(done / (self._settings.epochs * self._batches.steps), self._settings.schedule)
        return self._settings.learning_rate * share

    @torch.no_grad()
    def evaluate(self, split: str) -> Score:
        """Mean loss without smoothing, and accuracy, over all images of a split, unmoved."""
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        right = torch.zeros((), dtype=torch.int64, device=self._device)
        seen = 0  # corrupt files that are passed over are not
        images_of = getattr(self._data, split)
        group = self._group
        for images, labels, _ in evaluation(self._data, images_of, device=self._device, rank=group.rank, world=group.world):
            with autocast(self._settings):
                scores = self.model(images)
            loss += loss_of(scores, labels) * len(labels)
            right += (predicted(scores) == labels).sum()
            seen += len(labels)
        total_loss, total_right, total = group.total(loss, right, torch.tensor(seen))
        return Score(total_loss / total, total_right / total)

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        """Dropout's numbers: seeded by the epoch and the process, alike for nets that are compared; the caller's stay."""
        on_gpu = self._device.type == "cuda"
        with torch.random.fork_rng([self._device] if on_gpu else []):
            seed = self._settings.seed * _EPOCH_SEED + self.epoch
            seed += _RANK_SEED * _EPOCH_SEED * self._group.rank
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed(seed)  # of this device, whose state fork_rng puts back
            if "rng" in self._rng:
                torch.set_rng_state(self._rng["rng"])
            if on_gpu and "cuda_rng" in self._rng:
                torch.cuda.set_rng_state(self._rng["cuda_rng"], self._device)
            self._rng = {}
            yield

    def state(self) -> dict[str, Any]:
        """Net, optimizer, scaler, random numbers and place: what `restore` goes on from. All processes call it together."""
        own: dict[str, Tensor] = {}
        if self.step:
            own["sums"] = torch.stack((self._learn.loss_sum, self._learn.right.double())).cpu()
            own["rng"] = torch.get_rng_state()
            if self._device.type == "cuda":
                own["cuda_rng"] = torch.cuda.get_rng_state(self._device)
        return {
            "label": self.label,
            "epoch": self.epoch,
            "step": self.step,
            "epochs": [dataclasses.asdict(epoch) for epoch in self.epochs],
            "model": self.model.state_dict(),
            "learning": self._learn.state(),
            "by_rank": {name: self._group.gather(value) for name, value in own.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` told: with the same number of processes as it was told by, bit for bit."""
        self.model.load_state_dict(state["model"])
        self._learn.restore(state["learning"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self._rng = {name: values[self._group.rank] for name, values in state["by_rank"].items()}
        if "sums" in self._rng:
            loss_sum, right = self._rng["sums"].tolist()
            self._learn.loss_sum.fill_(loss_sum)
            self._learn.right.fill_(int(right))
