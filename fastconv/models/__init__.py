"""Networks, each written once in plain torch.nn and handed to the fuser.

Every builder takes `layers`: "fastconv" (the default) passes the net through fastconv.convert, "torch" leaves it as it
is. Both have the same state_dict keys and, under the same seed, the same initial weights. `build` makes a net by its name
in `list()`, `load` one of one's own by its file or module.
"""

from __future__ import annotations

from fastconv.models.alexnet import alexnet
from fastconv.models.car_truck import car_truck
from fastconv.models.embedding import with_embedding
from fastconv.models.lenet5 import lenet5
from fastconv.models.mnist_net import mnist_net
from fastconv.models.network_in_network import network_in_network
from fastconv.models.recipe import recipe_net
from fastconv.models.registry import build, load, native, resolution_for
from fastconv.models.registry import list as list  # not in __all__, or an import of * would hide Python's
from fastconv.models.vgg import vgg

__all__ = [
    "alexnet",
    "build",
    "car_truck",
    "lenet5",
    "load",
    "mnist_net",
    "native",
    "network_in_network",
    "recipe_net",
    "resolution_for",
    "vgg",
    "with_embedding",
]
