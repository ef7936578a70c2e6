"""Data sets for tests: files as they are published, only smaller, and images in folders."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

PER_FILE = 20  # what tests take cifar10's 10,000 for


def cifar10_batches(seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Pixels uint8 [20, 3072] and labels [20] of five training batches and the test batch."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, 256, (PER_FILE, 3072), dtype=torch.uint8, generator=generator), torch.arange(PER_FILE) % 10)
        for _ in range(6)
    ]


def cifar10_names(ending: str = "") -> list[str]:
    return [f"{name}{ending}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]


def pickled(pixels: Tensor, labels: Tensor) -> bytes:
    """As Python 2 wrote it: the keys are bytes. Python 3 writes those, by this protocol, through _codecs.encode."""
    return pickle.dumps({b"data": pixels.numpy(), b"labels": labels.tolist(), b"batch_label": b"of 6"}, protocol=2)


def binary(pixels: Tensor, labels: Tensor) -> bytes:
    return bytes(torch.cat((labels[:, None].to(torch.uint8), pixels), 1).flatten().tolist())


def cifar10(folder: Path, form: str) -> list[tuple[Tensor, Tensor]]:
    """`form`: "py" or "bin" in a folder, "python.tar.gz" or "binary.tar.gz"."""
    batches = cifar10_batches()
    write, ending, inner = (pickled, "", "py") if form.startswith("py") else (binary, ".bin", "bin")
    contents = {f"cifar-10-batches-{inner}/{n}": write(*b) for n, b in zip(cifar10_names(ending), batches, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    if form.endswith(".tar.gz"):
        pack(folder / f"cifar-10-{form}", contents)
    else:
        for name, content in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    return batches


def pack(path: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def idx(values: Tensor) -> bytes:
    header = struct.pack(f">4B{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return header + bytes(values.to(torch.uint8).flatten().tolist())


def mnist(folder: Path, *, mark: str = "-", zipped: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    content: dict[str, Tensor] = {}
    for prefix, count in (("train", 40), ("t10k", 20)):
        content[f"{prefix}-images{mark}idx3-ubyte"] = torch.randint(0, 256, (count, 28, 28), generator=generator)
        content[f"{prefix}-labels{mark}idx1-ubyte"] = torch.arange(count) % 10
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in content.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))
    return content


def pictures(
    folder: Path, count: int, *, size: tuple[int, int] = (20, 16), seed: int = 7, ending: str = "png"
) -> list[Path]:
    """`count` images of noise, `size` wide and high."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}.{ending}" for number in range(count)]
    for path in paths:
        pixels = torch.randint(0, 256, (size[0] * size[1] * 3,), generator=generator)
        Image.frombytes("RGB", size, bytes(pixels.tolist())).save(path)
    return paths


def folder(root: Path, classes: Sequence[str] = ("cat", "dog", "owl"), count: int = 10) -> Path:
    for number, name in enumerate(classes):
        pictures(root / name, count, seed=number)
    return root
