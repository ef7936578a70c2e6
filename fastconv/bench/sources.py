"""Which sources and versions a result was made with: whoever goes on with what was made before asks that it be the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import fastconv

_PACKAGE = Path(fastconv.__file__).parent
_SUFFIXES = (".py", ".cpp", ".cu", ".h")
_LIBRARIES = ("torch", "triton")


def digest(*folders: Path) -> str:
    """Of the package, of csrc where it lies beside the package, of `folders`, and of torch's and Triton's versions.

    Tables of measurements are none of it: they change while they are measured.
    """
    found = hashlib.sha256()
    for library in _LIBRARIES:
        found.update(f"{library} {_version(library)}\0".encode())
    for folder in (_PACKAGE, _PACKAGE.parent / "csrc", *folders):
        for file in sorted(file for file in folder.rglob("*") if file.suffix in _SUFFIXES):
            found.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:8]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
