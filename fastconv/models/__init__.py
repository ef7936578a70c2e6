"""Networks, each written once in plain torch.nn and handed to the fuser.

Every builder takes `layers`: "fastconv" (the default) passes the net through fastconv.convert, "torch" leaves it as it
is. Both have the same state_dict keys and, under the same seed, the same initial weights.
"""

from __future__ import annotations

from fastconv.models.recipe import recipe_net
from fastconv.models.vgg import vgg

__all__ = ["recipe_net", "vgg"]
