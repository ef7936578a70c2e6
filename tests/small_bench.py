"""The benchmark's lists, as short as they can be."""

from __future__ import annotations

import pytest
import torch

from fastconv.bench import records, roofline
from fastconv.bench.suites import cases, run
from fastconv.bench.suites.cases import LayerCase, Net, PoolCase
from fastconv.bench.suites.layers import Layer
from fastconv.bench.trial import Effort
from fastconv.models import recipe_net

CPU = torch.device("cpu")
EFFORT = Effort(3, 0.01)
MACHINE = records.machine(CPU)
NET = Net("recipe_net", lambda layers: recipe_net(16, width=8, max_width=16, layers=layers), 4, 16)
LAYER = LayerCase(Layer(8, 16, 10, pool=2), 2)
POOL = PoolCase("relu_max_pool2d", 8, 10, 2, (2, 2, 0))
LISTS = cases.Cases(
    layers={"float32": (LAYER,), "bfloat16": (LAYER,)},
    scaling={"float32": (LAYER,)},
    pools={"float32": (POOL,)},
    nets=(NET,),
)
EAGER = ("fastconv", "eager_channels_last", "eager_nchw")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fastconv bench --quick` on them."""
    monkeypatch.setattr(cases, "CPU_QUICK", LISTS)
    monkeypatch.setattr(run, "_QUICK", dict.fromkeys(run.SUITES, EFFORT))
    monkeypatch.setattr(roofline, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(roofline, "matmul_rate", lambda dtype, device: 1e11)
