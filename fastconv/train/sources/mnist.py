"""MNIST, and whatever else comes in its four files: Fashion-MNIST, KMNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from fastconv.train.sources import Part, Source

_FOLDER = "data/mnist"
_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_SIZE, _CLASSES = 28, 10


def read(where: str) -> Source:
    """The idx files in the folder `where` (default data/mnist), or in its `raw` or `MNIST/raw`; gzipped or not.

    Raises:
        FileNotFoundError: one is missing; the message says how to get them.
        ValueError: one holds something else, or less, than it should; the message holds its path.

    Source:
        Y. LeCun, C. Cortes, C. Burges: The MNIST database of handwritten digits, 1998.
    """
    folder = Path(where or _FOLDER)
    train, test = (_part(folder, part, prefix) for part, prefix in (("train", "train"), ("test", "t10k")))
    return Source(tuple("0123456789"), train, None, test, resolution=_SIZE)


def _part(folder: Path, part: str, prefix: str) -> Part:
    path, label_path = _find(folder, f"{prefix}-images", 3), _find(folder, f"{prefix}-labels", 1)
    images, labels = _array(path, 3), _array(label_path, 1)
    if images.shape[1:] != (_SIZE, _SIZE):
        raise ValueError(f"{path}: images of {_SIZE}×{_SIZE} pixels are wanted, these are {tuple(images.shape[1:])}")
    if len(images) != len(labels):
        raise ValueError(f"{label_path} holds {len(labels)} labels for the {len(images)} images of {path}")
    if not len(labels) or labels.max() >= _CLASSES:
        raise ValueError(f"{label_path}: labels from 0 to {_CLASSES - 1} are wanted, these are {labels.unique().tolist()}")
    return Part(images[:, None], labels.to(torch.int64), [f"mnist {part} {row}" for row in range(len(labels))])


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{mark}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for mark in "-."]
    folders = (folder, folder / "raw", folder / "MNIST" / "raw")
    for place in folders:
        for name in names:
            if (place / name).is_file():
                return place / name
    wanted = ", ".join(
        f"{s}-idx{n}-ubyte.gz" for p in ("train", "t10k") for s, n in ((f"{p}-images", 3), (f"{p}-labels", 1))
    )
    raise FileNotFoundError(
        f"mnist: no {names[0]}, gzipped or not, in {', '.join(map(str, folders))}. "
        f"Download {wanted} from {_URL} into {folder}; they need no unpacking"
    )


def _array(path: Path, dimensions: int) -> Tensor:
    """The uint8 array of an idx file: 0, 0, 8 (bytes), number of dimensions, their sizes as big-endian int32, the bytes."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from error
    start = 4 + 4 * dimensions
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"{path}: not an idx{dimensions}-ubyte file: it starts with {content[:4].hex(' ')}, not {magic.hex(' ')}"
        )
    sizes = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) != start + math.prod(sizes):
        raise ValueError(
            f"{path}: {start + math.prod(sizes)} bytes are wanted for the sizes {sizes}, it holds {len(content)}"
        )
    if not math.prod(sizes):
        raise ValueError(f"{path}: it is empty: its sizes are {sizes}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(sizes)
