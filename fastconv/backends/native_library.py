"""The compiled library: only this module loads `fastconv._C`. Its kernels take dense channels_last tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_LIBRARY = "fastconv._C"
_INSTALL = "install torch and a C++ compiler, then run `pip install --no-build-isolation -e .` in fastconv's source folder"


def unavailable() -> str | None:
    """Why the compiled library cannot be used, with what to do about it; None where it can."""
    library = _load()
    return library if isinstance(library, str) else None


def library() -> ModuleType:
    """The compiled library: its `build_info()` and `cpu_capability()`.

    Raises:
        RuntimeError: it is not installed, or does not load.
    """
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@cache
def _load() -> ModuleType | str:
    try:
        return importlib.import_module(_LIBRARY)
    except ModuleNotFoundError:
        return f"the compiled library is not installed ({_LIBRARY} is missing): {_INSTALL}"
    except ImportError as error:
        return f"the compiled library does not load ({error}): it was built for another torch or Python; {_INSTALL}"


@cache
def kernel(name: str) -> Callable[..., Tensor]:
    library()
    kernel: Callable[..., Tensor] = getattr(torch.ops.fastconv_native, name).default
    return kernel


def dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)
