"""CIFAR-10 in its two official forms, unpacked or as downloaded."""

from __future__ import annotations

import codecs
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastconv.train.sources import Part, Source

_FOLDER = "data/cifar10"
_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN, _TEST = tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_PER_FILE = 10_000
_FOLDERS = {"cifar-10-batches-py": "", "cifar-10-batches-bin": ".bin"}  # and how their files' names end
_ARCHIVES = {"cifar-10-python.tar.gz": "", "cifar-10-binary.tar.gz": ".bin"}


def read(where: str) -> Source:
    """50,000 training and 10,000 test images of 32×32 pixels, three channels.

    Args:
        where: cifar-10-batches-py or cifar-10-batches-bin, or a folder that holds one of them or cifar-10-python.tar.gz or
            cifar-10-binary.tar.gz, or one of these two, read without unpacking; default data/cifar10.

    Raises:
        FileNotFoundError: nothing of that is there; the message says how to get it.
        ModuleNotFoundError: the python form needs numpy, which is not installed.
        ValueError: a file holds something else, or less, than it should; the message holds its path.

    Source:
        A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009. https://www.cs.toronto.edu/~kriz/cifar.html
    """
    path = Path(where or _FOLDER)
    place, ending = _find(path)
    names = [name + ending for name in (*_TRAIN, _TEST)]
    contents = _unpacked(place, names) if place.is_file() else [_content(place / name, path) for name in names]
    parse = _binary if ending else _pickled
    batches = [parse(content, place / name) for content, name in zip(contents, names, strict=True)]
    images = torch.cat([batch for batch, _ in batches[:-1]])
    labels = torch.cat([batch for _, batch in batches[:-1]])
    train = Part(images, labels, [f"cifar10 train {row}" for row in range(len(labels))])
    test = Part(*batches[-1], [f"cifar10 test {row}" for row in range(len(batches[-1][1]))])
    return Source(_CLASSES, train, None, test, resolution=32)


def _find(path: Path) -> tuple[Path, str]:
    """The folder or archive to read, and how its files' names end."""
    if path.is_file():
        if path.name not in _ARCHIVES:
            raise ValueError(f"{path}: an archive must be named as it was published: {' or '.join(_ARCHIVES)}")
        return path, _ARCHIVES[path.name]
    for ending in _FOLDERS.values():
        if (path / (_TRAIN[0] + ending)).is_file():
            return path, ending
    for name, ending in {**_FOLDERS, **_ARCHIVES}.items():
        if (path / name).exists():
            return path / name, ending
    raise _missing(path, f"none of {', '.join((*_FOLDERS, *_ARCHIVES))} in {path}")


def _missing(path: Path, what: str) -> FileNotFoundError:
    return FileNotFoundError(f"cifar10: {what}. Download {_URL} (163 MiB) into {path}; it needs no unpacking")


def _content(path: Path, folder: Path) -> bytes:
    if not path.is_file():
        raise _missing(folder, f"no {path.name} in {path.parent}")
    return path.read_bytes()


def _unpacked(archive: Path, names: list[str]) -> list[bytes]:
    """The files of these names in a .tar.gz, whatever folder they lie in."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if name in names and (file := tar.extractfile(member)) is not None:
                    found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: not a whole .tar.gz: {error}; download it again") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{archive} does not hold {', '.join(missing)}; download it again")
    return [found[name] for name in names]


def _binary(content: bytes, path: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of records of a label's byte and 3,072 bytes of pixels."""
    wanted = _PER_FILE * (1 + _PIXELS)
    if len(content) != wanted:
        raise ValueError(f"{path}: {wanted} bytes are wanted, it holds {len(content)}")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(_PER_FILE, 1 + _PIXELS)
    return _checked(records[:, 1:], records[:, 0].to(torch.int64), path)


def _pickled(content: bytes, path: Path) -> tuple[Tensor, Tensor]:
    try:
        import numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the python form of CIFAR-10 holds numpy's arrays, and numpy is not installed: pip install 'fastconv[train]' "
            "(or numpy); cifar-10-binary.tar.gz needs none"
        ) from error
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    # What a broken pickle leads to is not only UnpicklingError: see the documentation of pickle.
    except (pickle.UnpicklingError, EOFError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a batch of CIFAR-10: {error}") from error
    if not isinstance(batch, dict):
        raise ValueError(f"{path}: not a batch of CIFAR-10: it holds a {type(batch).__name__}, not a dict")
    data, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(data, numpy.ndarray) or data.dtype != numpy.uint8 or data.shape != (_PER_FILE, _PIXELS):
        raise ValueError(f"{path}: data must be uint8 [{_PER_FILE}, {_PIXELS}], it is {_description(data)}")
    if not isinstance(labels, list) or len(labels) != _PER_FILE or not all(isinstance(label, int) for label in labels):
        raise ValueError(f"{path}: labels must be a list of {_PER_FILE} ints, it is {_description(labels)}")
    return _checked(torch.from_numpy(data.copy()), torch.tensor(labels), path)


def _description(value: Any) -> str:
    if hasattr(value, "dtype"):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else repr(value)


class _Unpickler(pickle.Unpickler):
    """Of arrays and Python's own containers: a pickle that calls for anything else could do anything at all."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy

        reconstruct = numpy.empty(0).__reduce__()[0]  # numpy 2 moved it, and pickles of either name are about
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy", "ndarray"): numpy.ndarray,
            ("numpy", "dtype"): numpy.dtype,
            ("_codecs", "encode"): codecs.encode,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it calls for {module}.{name}, which is refused")
        return allowed[module, name]


def _checked(pixels: Tensor, labels: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    if labels.min() < 0 or labels.max() >= len(_CLASSES):
        raise ValueError(f"{path}: labels from 0 to {len(_CLASSES) - 1} are wanted, these are {labels.unique().tolist()}")
    return pixels.reshape(-1, *_SHAPE), labels
