"""scikit-learn's handwritten digits: the one data set that is there without a download."""

from __future__ import annotations

import torch

from fastconv.train.sources import Part, Source, stratified

_VALIDATION, _TEST = 0.1, 0.2
_LARGEST_PIXEL = 16


def read(where: str) -> Source:
    """The 1,797 real images of 8×8 pixels, one channel; of every class 70% training, 10% validation and 20% test images.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message holds the command.
        ValueError: `where` is not empty: they lie in scikit-learn.

    Source:
        E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    if where:
        raise ValueError(f"data: the digits come with scikit-learn and take no path, got 'digits:{where}'")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install 'fastconv[train]' (or scikit-learn)"
        ) from error
    source = load_digits()
    # Not rounded yet: that comes after resizing.
    images = torch.from_numpy(source.images).to(torch.float32)[:, None] * (255 / _LARGEST_PIXEL)
    labels = torch.from_numpy(source.target).to(torch.int64)
    whole = Part(images, labels, [f"digits {row}" for row in range(len(labels))])
    train, validation, test = (whole.take(rows) for rows in stratified(labels, _VALIDATION, _TEST))
    return Source(tuple("0123456789"), train, validation, test, resolution=32)
