"""Seeded batches on a device, the same however many processes share them; and all images of a split once, to evaluate."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fastconv.train import augment
from fastconv.train.augment import Augmentation
from fastconv.train.data import Dataset, Files, Split


class Batches:
    """Seeded, augmented, standardised batches of a data set's training images on a device.

    Order and moves of an epoch depend on the seed and the epoch alone.

    Attributes:
        steps: batches an epoch, all of one size: the images left over wait for another epoch's order.
        batch_size: images a step, over all processes: no more than there are.
        images_per_epoch: steps times batch_size.
        placement: where images lie: "device"; "host", where they take more than half of the device's free memory; "disk",
            where they are Files. From host and disk the next batch is fetched in the background.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        batch_size: int,
        device: torch.device,
        augmentation: Augmentation,
        seed: int,
        rank: int = 0,
        world: int = 1,
        memory_limit: int | None = None,
    ) -> None:
        """
        Args:
            batch_size: over all processes, each of which gets an equal part.
            seed: of the order of images and of their moves.
            rank, world: this process among how many; it gets images rank, rank + world, ... of each batch.
            memory_limit: bytes that images may take on the device; None: half of what is free.

        Raises:
            ValueError: a batch that cannot be divided among the processes, or a rank that is none of them.
        """
        _check_rank(rank, world)
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batches: batch_size must be a multiple of world={world}, got batch_size={batch_size}")
        if len(data.train) < world:
            raise ValueError(f"batches: {len(data.train)} training images cannot be divided among world={world} processes")
        if len(data.train) < batch_size:
            batch_size = len(data.train) - len(data.train) % world
        self.batch_size = batch_size
        self.steps = len(data.train) // batch_size
        self.images_per_epoch = self.steps * batch_size
        self._resolution, self._augmentation, self._seed = data.resolution, augmentation, seed
        self._rank, self._world, self._device = rank, world, torch.device(device)
        self._mean, self._std = (torch.tensor(values, device=device) for values in (data.mean, data.std))
        self._split = data.train
        self.placement = _placement(data.train.images, self._device, memory_limit)
        if self.placement == "device":
            assert isinstance(data.train.images, Tensor)
            images = data.train.images.to(self._device)
            self._split = Split(images, data.train.labels.to(self._device), data.train.names)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from `first_step` on: bit for bit those of the whole epoch.

        Yields:
            on the device, images float32 [batch_size / world, C, R, R], channels_last; labels int64 [batch_size / world].

        Raises:
            ValueError: a step that an epoch does not have.
        """
        if not 0 <= first_step <= self.steps:
            raise ValueError(f"batches: first_step must be in [0, {self.steps}], got first_step={first_step}")
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        images = self._split.images
        order = torch.randperm(len(self._split), generator=generator)
        moves = augment.draw(
            self._augmentation, len(order), stored=images.shape[-1], seen=self._resolution, generator=generator
        )
        # [steps, batch_size / world]: which images of the order are this process's
        mine = torch.arange(self.images_per_epoch).view(self.steps, -1)[first_step:, self._rank :: self._world]
        return self._moved(order[mine], moves.take(mine.flatten()).to(self._device))

    def _moved(self, rows: Tensor, moves: augment.Moves) -> Iterator[tuple[Tensor, Tensor]]:
        fetched = self._resident(rows) if self.placement == "device" else _fetched(self._split, rows, self._device)
        start = 0
        for pixels, labels, _ in fetched:
            some = moves.take(slice(start, start + len(labels)))
            start += len(labels)
            images = augment.apply(pixels, some, self._augmentation, seen=self._resolution, fill=self._mean)
            yield standardise(images, self._mean, self._std), labels

    def _resident(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        assert isinstance(self._split.images, Tensor)
        for some in rows.to(self._device):
            yield self._split.images.index_select(0, some), self._split.labels.index_select(0, some), some


def evaluation(
    data: Dataset, split: Split, *, batch_size: int = 256, device: torch.device, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """All images of a split once over all processes, in order, unmoved and standardised; the last batch may be smaller.

    Corrupt files that are skipped when they are met are left out.

    Args:
        batch_size: of each process.
        rank, world: this process among how many; it gets images rank, rank + world, ... of the split.

    Yields:
        images float32 [B, C, R, R], channels_last, and labels int64 [B] on the device; on the CPU their rows in the split,
        int64 [B].

    Raises:
        ValueError: images stored larger than nets see them (those that crops are drawn from), or arguments out of range.
    """
    _check_rank(rank, world)
    if batch_size < 1:
        raise ValueError(f"evaluation: batch_size must be at least 1, got batch_size={batch_size}")
    if split.images.shape[-1] != data.resolution:
        raise ValueError(
            f"evaluation: images of {data.resolution}×{data.resolution} pixels are wanted, these are "
            f"{split.images.shape[-1]}×{split.images.shape[-1]}: training images, which crops are drawn from"
        )
    return _evaluated(data, split, batch_size, torch.device(device), rank, world)


def _evaluated(
    data: Dataset, split: Split, batch_size: int, device: torch.device, rank: int, world: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    mean, std = (torch.tensor(values, device=device) for values in (data.mean, data.std))
    mine = [rows for rows in torch.arange(rank, len(split), world).split(batch_size) if len(rows)]
    for wanted, (pixels, labels, rows) in zip(mine, _fetched(split, mine, device), strict=True):
        whole = rows == wanted
        if not whole.all():
            pixels, labels, rows = pixels[whole.to(device)], labels[whole.to(device)], rows[whole]
        if len(rows):
            yield standardise(pixels, mean, std), labels, rows


def standardise(pixels: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """(pixels - mean) / std by channel, float32; batches are channels_last.

    Args:
        pixels: [B, C, R, R] or [C, R, R]: uint8, or float32 in [0, 1].
        mean, std: [C], of pixels in [0, 1], as Dataset has them.
    """
    layout = torch.channels_last if pixels.dim() == 4 else torch.contiguous_format
    scaled = pixels.to(torch.float32, memory_format=layout)
    if pixels.dtype == torch.uint8:
        scaled = scaled / 255
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=pixels.device).view(-1, 1, 1) for v in (mean, std))
    return (scaled - mean) / std


def _fetched(split: Split, batches: Iterable[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pixels and labels on the device, and rows, of each batch of rows; the next one is read in the background."""
    on_gpu = device.type == "cuda"
    with ThreadPoolExecutor(1) as background:
        coming: deque[tuple[Tensor, Future[Tensor]]] = deque()

        def arrived() -> tuple[Tensor, Tensor, Tensor]:
            pixels, reading = coming.popleft()
            rows = reading.result()
            labels = split.labels[rows].pin_memory() if on_gpu else split.labels[rows]
            return pixels.to(device, non_blocking=on_gpu), labels.to(device, non_blocking=on_gpu), rows

        for rows in batches:
            # Made here, for CUDA is called from this thread only; torch keeps it until the copy to the device is done.
            pixels = torch.empty((len(rows), *split.images.shape[1:]), dtype=torch.uint8, pin_memory=on_gpu)
            coming.append((pixels, background.submit(_read, split, rows, pixels)))
            if len(coming) > 1:
                yield arrived()
        while coming:
            yield arrived()


def _read(split: Split, rows: Tensor, out: Tensor) -> Tensor:
    """The rows that were read to `out`."""
    if isinstance(split.images, Files):
        return split.images.read(rows, out)[1]
    torch.index_select(split.images, 0, rows, out=out)
    return rows


def _placement(images: Tensor | Files, device: torch.device, memory_limit: int | None) -> str:
    if isinstance(images, Files):
        return "disk"
    if memory_limit is None:
        if device.type == "cpu":
            return "device"
        if device.type != "cuda":
            return "host"
        memory_limit = torch.cuda.mem_get_info(device)[0] // 2
    return "device" if images.numel() <= memory_limit else "host"


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"batches: rank must be in [0, {world}) for world={world}, got rank={rank}")
