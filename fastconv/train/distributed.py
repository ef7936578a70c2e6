"""Several processes that train one net: what `torchrun` starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Group:
    """The processes of a training, and which of them this one is. All of them make the same calls in the same order.

    Attributes:
        rank: from 0 to world - 1; rank 0 writes files and talks.
        world: how many processes.
        control: of gloo, over which the hosts agree without a GPU's waiting; None for one process.
    """

    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """`model`, whose gradients are the mean over all processes'."""
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    def total(self, *values: Tensor) -> list[float]:
        """The sums over all processes of zero-dimensional tensors."""
        sums = torch.stack([value.double().cpu() for value in values])
        if self.world > 1:
            dist.all_reduce(sums, group=self.control)
        return sums.tolist()

    def any(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.world == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def gather(self, value: Tensor) -> list[Tensor]:
        """A CPU tensor of one shape from each process, by rank."""
        if self.world == 1:
            return [value]
        values = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(values, value, group=self.control)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's running statistics, which are those that a checkpoint keeps."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)


def current(device: torch.device) -> AbstractContextManager[object]:
    """A block in which a GPU is the one that CUDA's calls without a device mean."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def joined(device: str) -> Iterator[tuple[Group, str]]:
    """The group that `torchrun` started this process in, and this process's device; one process alone without torchrun.

    NCCL carries the gradients between GPUs, gloo between CPUs. With "cuda", each process of a machine has a GPU of its own.

    Raises:
        ValueError: more processes than GPUs, or a GPU named by number for several processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Group(), device
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        if torch.device(device).index is not None:
            raise ValueError(f"--device {device}: with several processes each takes a GPU of its own; allowed: cuda, cpu")
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun started a process {local} on a machine of {torch.cuda.device_count()} GPUs")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    yield Group(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo")), device
    dist.destroy_process_group()  # not behind an error: it would wait for processes that know of none
