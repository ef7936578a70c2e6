"""The zoo: structures that convert must leave equal, of the literature and made to mislead a rewriter."""

from __future__ import annotations

import zoo_forwards
import zoo_layers
import zoo_nets
import zoo_skips

NETS = [*zoo_nets.NETS, *zoo_skips.NETS, *zoo_forwards.NETS, *zoo_layers.NETS]
