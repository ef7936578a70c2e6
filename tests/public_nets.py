"""torchvision's and timm's definitions of models, where they import; else the reason why not."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType

import torch

# What torchvision describes for torch.compile while it is imported, and its compiled library would have defined: the
# library does not load beside a torch that was built without CUDA. No model of classification calls these.
_MISSING = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_definitions: list[torch.library.Library] = []  # kept: a definition ends with its Library


@cache
def public_models(package: str) -> ModuleType | str:
    """torchvision.models for 'torchvision', timm for 'timm', or why it cannot be had.

    timm imports torchvision, so that the same is done for it.
    """
    try:
        _import_torchvision()
        return importlib.import_module("torchvision.models" if package == "torchvision" else package)
    except (ImportError, RuntimeError) as error:
        return f"{package} does not import: {type(error).__name__}: {error}"


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _MISSING:
            library.define(schema)
        _definitions.append(library)
        importlib.import_module("torchvision")
