"""What a training step holds in memory: the maps that autograd saves, and the peak of everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile


def saved_bytes(step: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward of `step`, which runs once; parameters aside.

    A storage counts once, as a whole, however many nodes save it or views of it: that is what stays allocated.
    Parameters (torch.nn's, frozen or not), leaves that need gradients and views of either exist anyway and are left out;
    copies of them in another dtype, as autocast makes, count. So do inputs that need no gradient. Only shapes matter:
    the meta device gives the same number and computes nothing. What a checkpoint or a Function keeps by other ways than
    saved tensors is not seen.

    Args:
        step: a forward pass. Its result may be thrown away: what was saved is held until all is counted.
    """
    with saving() as held:
        result = step()
    total = sum(storage.nbytes() for storage in held.values())
    del result
    return total


@contextmanager
def saving() -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that `saved_bytes` counts, by their addresses, as the code in the context has autograd save them."""
    held: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being given out twice

    def pack(tensor: Tensor) -> Tensor:
        source = tensor if tensor._base is None else tensor._base
        if not (isinstance(source, nn.Parameter) or (source.is_leaf and source.requires_grad)):
            storage = tensor.untyped_storage()
            held[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield held


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes of CPU memory that `step`, which runs once, had allocated at a time, over what was there before.

    Temporaries inside of operators count, as far as torch's allocator hands them out. (torch.cuda.max_memory_allocated
    tells the same of a GPU.)
    """
    with profile(profile_memory=True, use_kineto=True) as profiler:
        result = step()
        del result
    allocations = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = live = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
