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
    """Why the compiled CUDA library cannot serve CUDA tensors; None where it can, on every device that torch sees."""
    library = unavailable() or cuda_library()
    if isinstance(library, str):
        return library
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _without_code(library.build_info()["architectures"])


@cache
def _without_code(architectures: str) -> str | None:
    """Why one of the devices cannot run what was built for `architectures`."""
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not any(runs_on(built, capability) for built in architectures.split(";")):
            name = f"{torch.cuda.get_device_name(index)} (compute capability {capability[0]}.{capability[1]})"
            return f"its CUDA kernels were built for {architectures}, not for {name}: TORCH_CUDA_ARCH_LIST chooses"
    return None


def runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether code built for '8.0', '9.0a' or '10.0+PTX' runs on a device: of its generation or, by PTX, of a later one."""
    number, _, ptx = built.partition("+")
    own = tuple(map(int, number.rstrip("af").split(".")))
    if number.endswith("a"):
        return own == capability
    return own <= capability and (own[0] == capability[0] or (ptx == "PTX" and not number.endswith("f")))


@cache
def cuda_library() -> ModuleType | str:
    """The compiled CUDA library, its `build_info()`; or why it is not there."""
    library, schemas = _load(_CUDA), _load(_CPU)
    if isinstance(library, str) or isinstance(schemas, str):
        return library
    if library.build_info()["schemas"] != schemas.build_info()["schemas"]:
        return f"the compiled libraries were built from different sources: {_INSTALL[_CUDA]}"
    return library


@cache
def _load(name: str) -> ModuleType | str:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return f"the compiled library is not installed ({name} is missing): {_INSTALL[name]}"
    except ImportError as error:
        reason = f"the compiled library {name} does not load ({error}): it was built for another torch, CUDA or Python"
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
