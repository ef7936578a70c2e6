"""Which sources and versions a result was made with: whoever goes on with what was made before asks that it be the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import fastconv
from fastconv.tuning import tables

_PACKAGE = Path(fastconv.__file__).parent
_SUFFIXES = (".py", ".cpp", ".cu", ".h")
_LIBRARIES = ("torch", "triton")


def digest(*folders: Path, with_tables: bool = False) -> str:
    """Of the package, of csrc where it lies beside the package, of `folders`, and of torch's and Triton's versions.

    Args:
        with_tables: the tables of measurements count too. Whoever measures them leaves them out: they change meanwhile.
    """
    found = hashlib.sha256()
    for library in _LIBRARIES:
        found.update(f"{library} {tables.version(library)}\0".encode())
    for folder in (_PACKAGE, _PACKAGE.parent / "csrc", *folders):
        suffixes = (*_SUFFIXES, ".json") if with_tables else _SUFFIXES
        for file in sorted(file for file in folder.rglob("*") if file.suffix in suffixes):
            found.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:8]
