"""The compiled libraries: only this module loads `fastconv._C`, for CPU tensors, and `fastconv._cuda`.

Their kernels take dense channels_last tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_CPU, _CUDA = "fastconv._C", "fastconv._cuda"
_COMMAND = "pip install --no-build-isolation -e .` in fastconv's source folder"
_INSTALL = {
    _CPU: f"install torch and a C++ compiler, then run `{_COMMAND}",
    _CUDA: f"install a torch built for CUDA and nvcc, then run `FASTCONV_BUILD=cuda {_COMMAND}",
}
_LEAST_CAPABILITY = (8, 0)


def unavailable() -> str | None:
    """Why the compiled library cannot be used, with what to do about it; None where it can."""
    library = _load(_CPU)
    return library if isinstance(library, str) else None


def library() -> ModuleType:
    """The compiled library: its `build_info()` and `cpu_capability()`.

    Raises:
        RuntimeError: it is not installed, or does not load.
    """
    library = _load(_CPU)
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def unavailable_cuda() -> str | None:
    """Why the compiled CUDA library cannot serve the current CUDA device; None where it can."""
    library = unavailable() or cuda_library()
    if isinstance(library, str):
        return library
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _too_old(torch.cuda.current_device())


@cache
def _too_old(device: int) -> str | None:
    """Its kernels need cp.async, and tensor cores that know bfloat16 and TF32."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST_CAPABILITY:
        return None
    major, minor = capability
    return f"its CUDA kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"


def cuda_library() -> ModuleType | str:
    """The compiled CUDA library, its `build_info()`; or why it is not there."""
    return _load(_CUDA)


@cache
def _load(name: str) -> ModuleType | str:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return f"the compiled library is not installed ({name} is missing): {_INSTALL[name]}"
    except ImportError as error:
        reason = f"the compiled library {name} does not load ({error}): it was built for another torch or Python"
        return f"{reason}; {_INSTALL[name]}"


_NAMESPACE = "fastconv_native"

# Of torch.ops, where the libraries' operators are; tests that run the CUDA kernels on a CPU name another one.
namespace = _NAMESPACE


def runs_cuda(tensor: Tensor) -> bool:
    """Whether operators on `tensor` are those of the CUDA library."""
    return tensor.is_cuda or namespace != _NAMESPACE


def kernel(name: str) -> Callable[..., Tensor]:
    return _kernel(namespace, name)


@cache
def _kernel(namespace: str, name: str) -> Callable[..., Tensor]:
    library()
    cuda_library()  # whose operators have their schemas from the other
    kernel: Callable[..., Tensor] = getattr(getattr(torch.ops, namespace), name).default
    return kernel


def dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)
