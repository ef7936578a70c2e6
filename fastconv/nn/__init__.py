"""Modules: torch.nn's own, with fastconv's kernels behind `forward`.

Every class here subclasses the torch.nn module that it stands for: same constructor, same `state_dict`, so checkpoints
move freely in both directions. `from_torch` makes one from an existing torch.nn module and shares its Parameters.
"""

from fastconv.nn.chain import ConvChain
from fastconv.nn.conv import Conv2d, ConvReLU2d, ConvReLUMaxPool2d, FrozenConv2d
from fastconv.nn.norm import BatchNormReLU2d, BatchNormReLUMaxPool2d
from fastconv.nn.pool import AvgPool2d, GlobalAvgPool2d, MaxPool2d

__all__ = [
    "AvgPool2d",
    "BatchNormReLU2d",
    "BatchNormReLUMaxPool2d",
    "Conv2d",
    "ConvChain",
    "ConvReLU2d",
    "ConvReLUMaxPool2d",
    "FrozenConv2d",
    "GlobalAvgPool2d",
    "MaxPool2d",
]
