"""The choice of kernels: candidates, tables, the model of cost, and that nothing is measured on the way."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from tolerances import assert_close
from tuned import BF16, CHIP, FP32, call, conv, entry, put

import fastconv.functional as FC
from fastconv import backends, reference, tuning
from fastconv.backends import triton
from fastconv.backends.triton_calls import FULL, OTHERS, RECIPE, VGG16
from fastconv.backends.triton_launch import PROCESSORS, recording
from fastconv.geometry import ConvGeometry, PoolGeometry
from fastconv.precision import Policy
from fastconv.tuning import Call, Candidate, candidates, pick, tables
from fastconv.tuning.calls import CONVOLUTIONS
from fastconv.tuning.candidates import ATEN, NATIVE
from fastconv.tuning.sides import product_splits, shared_bytes, shared_memory

LAYERS = (*FULL, *VGG16, *RECIPE, *OTHERS)
pytestmark = pytest.mark.usefixtures("cache")


def test_pick_takes_the_measured_order() -> None:
    modelled = pick(*call())
    assert tuning.explain(*call()).startswith(f"cost model: {modelled[0]} ")
    worst, second = modelled[-1], modelled[-2]
    put(entry(call(), worst, second, ATEN))
    picked = pick(*call())
    assert picked[:3] == (worst, second, ATEN)
    assert picked[3:] == tuple(c for c in modelled if c not in picked[:3]), "what was not measured follows as modelled"
    assert tuning.explain(*call()) == f"table: measured {worst} 20 µs, 1.55× aten, on {CHIP}"


def test_pick_takes_the_nearest_of_its_bucket() -> None:
    worst, other = ATEN, next(c for c in reversed(pick(*call())) if c != ATEN)
    put(entry(call(), worst), entry(call(conv(batch=50)), other))
    assert pick(*call(conv(batch=30)))[0] == worst
    assert pick(*call(conv(batch=45)))[0] == other, "of two the nearer"
    reason = tuning.explain(*call(conv(batch=30)))
    assert reason == f"nearest in table, {call()}: measured aten 20 µs, on {CHIP}"
    assert pick(*call(conv(batch=30)))[1:] == tuple(c for c in _modelled(conv(batch=30)) if c != worst)


def _modelled(g: ConvGeometry) -> tuple[Candidate, ...]:
    return pick(*call(g, chip="NVIDIA H100 SXM5 sm_90"))  # as fast, without a table


@pytest.mark.parametrize(
    "outside",
    [
        call(conv(batch=65)),
        call(conv(size=13)),
        call(conv(channels=256)),
        call(conv(kernel=5)),
        call(conv(stride=2)),
        call(op="conv2d"),
        call(direction="input_grad"),
        call(policy=Policy(torch.float16)),
    ],
    ids=lambda c: str(c).replace(" ", "_"),
)
def test_what_lies_outside_of_the_bucket_is_modelled(outside: Call) -> None:
    before = pick(*outside)
    put(entry(call(), pick(*call())[-1]))
    assert pick(*outside) == before
    assert tuning.explain(*outside).startswith("cost model: ")


def test_a_table_survives_a_changed_configuration_list() -> None:
    modelled = pick(*call())
    tile = next(c for c in modelled if c.config)
    gone = tile._replace(config=(*tile.config[:-1], ("num_warps", 3)))
    renamed = tile._replace(kernel="winograd")
    near, far = conv(batch=40), conv(batch=16)
    put(entry(call(), gone, ATEN), entry(call(near), renamed), entry(call(far), ATEN))
    assert len(tables.load(CHIP)) == 3
    assert pick(*call())[0] == ATEN, "the nearest whose candidate there still is"
    assert gone not in pick(*call())
    assert tuning.explain(*call()).startswith(f"nearest in table, {call(far)}: ")
    put(entry(call(far), gone))
    assert pick(*call()) == modelled


def test_forget_makes_a_new_table_effective() -> None:
    modelled = pick(*call())
    tables.write(tables.user_file(CHIP), CHIP, [entry(call(), modelled[-1])])
    assert pick(*call()) == modelled, "a running process keeps to its choices"
    tuning.forget()
    assert pick(*call())[0] == modelled[-1]


def test_rules_explain_themselves() -> None:
    g = PoolGeometry.of("max_pool2d", (2, 8, 8, 8), (2, 2), (2, 2), (0, 0), (1, 1), False)
    strided = ConvGeometry.of("conv2d", (2, 8, 9, 9), (8, 8, 3, 3), None, (2, 2), (1, 1), (1, 1), 1)
    for op, geometry, first in (
        ("max_pool2d", g, "native"),
        ("conv2d", conv(), "native winograd"),
        ("conv2d", strided, "aten"),
    ):
        reason = tuning.explain(op, "forward", geometry, FP32, "cpu", False)
        assert reason == f"rule: native reads channels_last, operands do not: {first}"
    assert tuning.explain("max_pool2d", "forward", g, FP32, CHIP, True).endswith("operands do: triton")
    assert tuning.explain(*call(channels_last=False)) == "rule: kernels of ours read channels_last, operands do not: aten"
    with tuning.forcing(call(), ATEN):
        assert tuning.explain(*call()) == "forced: aten is being measured"


@pytest.mark.parametrize("chip", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "NVIDIA L4 sm_89", "cpu", "interpreter"])
def test_candidates_suit_the_chip_and_hold_aten(chip: str) -> None:
    arch = tuning.capability(chip)
    for layer in LAYERS[::2]:
        for op, direction in CONVOLUTIONS:
            for policy in (BF16, FP32, Policy(torch.float32, True), Policy(torch.float64)):
                for channels_last in (True, False):
                    found = candidates(op, direction, layer.geometry, policy, chip, channels_last)
                    assert ATEN in found
                    assert len(set(found)) == len(found)
                    assert set(pick(op, direction, layer.geometry, policy, chip, channels_last)) == set(found)
                    if arch is None or policy.dtype == torch.float64:
                        continue
                    kernels = {c.kernel for c in found}
                    assert "pointer" in kernels
                    assert arch >= 90 or "tma" not in kernels
                    for c in found:
                        assert shared_bytes(dict(c.config), policy.dtype.itemsize) <= shared_memory(arch), (
                            f"{layer.name}: {c}"
                        )


def test_sizes_never_seen_make_few_kernels() -> None:
    """Compiled are distinct configurations: a bounded number, whatever the batches and maps."""
    numbers = random.Random(0)
    for op, direction in CONVOLUTIONS:
        seen: list[Candidate] = []
        for _ in range(200):
            g = conv(batch=numbers.randint(1, 300), channels=64, size=numbers.randint(7, 250))
            seen.append(pick(op, direction, g, BF16, CHIP)[0])
        assert len(set(seen[:50])) <= 12, f"{op} {direction}"
        assert len(set(seen)) <= 24, f"{op} {direction}"


@pytest.mark.parametrize(
    ("layer", "direction", "family"),
    [
        ((3, 64, 224, 3, 1), "forward", "first"),
        ((64, 64, 224, 3, 1), "forward", "tma"),
        ((96, 96, 28, 3, 96), "forward", "depthwise"),
        ((256, 256, 14, 3, 32), "forward", "pointer"),
        ((64, 64, 224, 3, 1), "input_grad", "tma"),
        ((512, 512, 7, 3, 1), "weight_grad", ""),
    ],
)
def test_the_model_prefers_the_family_made_for_a_layer(layer: tuple[int, ...], direction: str, family: str) -> None:
    c, o, size, k, groups = layer
    g = ConvGeometry.of("test", (32, c, size, size), (o, c // groups, k, k), None, (1, 1), (1, 1), (1, 1), groups)
    chosen = pick("conv2d_relu" if direction != "weight_grad" else "conv2d", direction, g, BF16, CHIP)[0]
    assert chosen.kernel == family
    if groups == 32:
        assert dict(chosen.config)["PACK"] > 1, "eight channels alone would fill half a tile with zeros"


def test_the_model_knows_chips_by_name() -> None:
    known = {chip: tuning.cost._speeds(chip) for chip in ("sm_80", "sm_90", "sm_100", "sm_120")}
    assert {chip: known[chip].processors for chip in PROCESSORS} == PROCESSORS, "recordings split sums as the model does"
    assert known["sm_120"].processors == 170 and known["sm_120"].half < known["sm_80"].half
    assert tuning.cost._speeds(CHIP) == known["sm_90"]
    for name, processors in (("H200", 132), ("H20", 78), ("H20-3e", 78), ("H100 PCIe", 114)):
        speeds = tuning.cost._speeds(f"NVIDIA {name} sm_90")
        assert speeds.processors == processors and speeds.memory != known["sm_90"].memory, name
    for name in ("A100-SXM4-40GB", "A100-PCIE-40GB"):
        assert tuning.cost._speeds(f"NVIDIA {name} sm_80").memory < 0.8 * known["sm_80"].memory
    assert tuning.cost._speeds("NVIDIA A100-SXM4-80GB sm_80") == known["sm_80"]


def test_the_model_counts_what_overhangs() -> None:
    def seconds(size: int, box: tuple[int, int, int]) -> float:
        sides = dict(zip(("BLOCK_B", "BLOCK_H", "BLOCK_W"), box, strict=True))
        tile = {**sides, "BLOCK_N": 128, "BLOCK_K": 64, "BATCH_INNER": 0, "NUM_STAGES": 4, "num_warps": 4}
        return tuning.cost.seconds(
            "conv2d", "forward", conv(256, size=size), BF16, CHIP, Candidate("triton", "tma", tuple(tile.items()))
        )

    assert seconds(14, (1, 16, 8)) > 1.2 * seconds(14, (32, 2, 2)), "16 × 16 pixels for 14 × 14"
    assert seconds(16, (1, 16, 8)) == pytest.approx(seconds(16, (8, 4, 4))), "both are exact"


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def test_calls_are_observed_and_forced_past_what_is_remembered() -> None:
    x, weight = _x(2, 16, 8, 8), _x(16, 16, 3, 3)
    FC.conv2d_relu(x, weight, padding=1)
    with tuning.observing() as calls:
        FC.conv2d_relu(x, weight, padding=1)
        FC.conv2d_relu(x, weight, padding=1)
    ((observed, count),) = calls.items()
    assert count == 2
    assert observed[:2] == ("conv2d_relu", "forward")
    assert observed.chip == backends.chip("cpu")
    chosen = []
    for forced in (NATIVE, ATEN):
        backends.chosen.clear()
        with tuning.forcing(observed, forced):
            FC.conv2d_relu(x, weight, padding=1)
            FC.max_pool2d(x, 2)  # another call is not forced
        chosen.append(set(backends.chosen))
    assert chosen == [{"native"}, {"native", "aten"}]
    backends.chosen.clear()
    FC.conv2d_relu(x, weight, padding=1)
    assert backends.chosen == {"native"}, "and nothing stays forced"


def test_a_forced_plan_reaches_the_triton_launchers() -> None:
    g = conv(2, 64, 16)
    x, weight = (
        torch.empty(s, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
        for s in (g.input_shape, g.weight_shape)
    )
    with recording(90) as launches:
        for wanted in (c for c in candidates("conv2d", "forward", g, BF16, "sm_90", True) if c.backend == "triton"):
            triton.conv2d(x, weight, None, None, g, BF16, relu=False)  # remembered
            with tuning.forcing(Call("conv2d", "forward", g, BF16, CHIP, True), wanted):
                triton.conv2d(x, weight, None, None, g, BF16, relu=False)
            assert dict(wanted.config).items() <= launches[-1].arguments.items()


def test_directions_are_chosen_one_by_one() -> None:
    chip, g = backends.chip("cpu"), conv(2, 16, 8)
    layer = Call("conv2d", "forward", g, FP32, chip, True)
    put(
        entry(layer, ATEN, NATIVE),
        entry(layer._replace(direction="input_grad"), NATIVE),
        entry(layer._replace(direction="weight_grad"), ATEN),
    )

    def names() -> list[str]:
        x = _x(*g.input_shape)
        return [
            backends.select("auto", "conv2d", d, g, FP32, x, True).NAME for d in ("forward", "input_grad", "weight_grad")
        ]

    assert names() == ["aten", "native", "aten"]
    tables.user_file(chip).unlink()
    tuning.forget()
    assert names() == ["native"] * 3


@pytest.mark.parametrize("window", [2, 3])
def test_a_convolution_and_its_pool_may_come_from_two_backends(window: int) -> None:
    x, weight, bias = _x(2, 16, 9, 9), _x(16, 16, 3, 3), torch.randn(16)
    with tuning.observing() as calls:
        FC.conv2d_relu_max_pool2d(x, weight, bias, padding=1, pool_kernel_size=window)
    names = [(c.op, c.direction) for c in calls]
    conv_call = next(iter(calls))
    if window == 2:
        assert names == [("conv2d_relu_max_pool2d", "forward")]
    else:
        assert names == [("conv2d", "forward"), ("relu_max_pool2d", "forward")], "no kernel fuses that pool"
    put(entry(conv_call, ATEN))
    backends.chosen.clear()
    output = FC.conv2d_relu_max_pool2d(x, weight, bias, padding=1, pool_kernel_size=window)
    assert backends.chosen == {"aten", "native"}
    exact = reference.conv2d_relu_max_pool2d(x.double(), weight.double(), bias.double(), padding=1, pool_kernel_size=window)
    assert_close(output, exact, torch.float32, 144)


def test_a_masked_gradient_may_come_from_two_backends() -> None:
    g = conv(2, 16, 8)
    grad, x, weight = _x(*g.output_shape), _x(*g.input_shape).relu(), _x(*g.weight_shape)
    arguments = (True, True, g.stride, g.padding, g.dilation, g.groups)
    expected = torch.ops.fastconv.conv2d_backward_relu(*(t.double() for t in (grad, x, weight)), *arguments, "aten")
    masked = Call("conv2d_relu", "input_grad", g, FP32, backends.chip("cpu"), True)
    for weight_grad in (ATEN, NATIVE):
        put(entry(masked, ATEN), entry(masked._replace(op="conv2d", direction="weight_grad"), weight_grad))
        with tuning.observing() as calls:
            results = torch.ops.fastconv.conv2d_backward_relu(grad, x, weight, *arguments, "auto")
        assert ("relu", "backward") in {(c.op, c.direction) for c in calls}, "the pass over cuDNN's gradient is ours"
        for result, wanted, terms in zip(results, expected, (144, 128, 144 + 128), strict=True):
            assert_close(result, wanted, torch.float32, terms)


def test_a_first_step_searches_nothing() -> None:
    code = """
import sys, torch, fastconv
net = fastconv.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)))
net(torch.randn(2, 3, 8, 8)).sum().backward()
print([name for name in sys.modules if name.startswith("fastconv.bench")])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]", "nothing that could measure is even loaded"


def test_a_product_is_split_only_where_slabs_cost_less_than_idle_processors() -> None:
    assert product_splits(25, 64, 144, 132) == 1, "two waves of short programs: slabs would cost more than the second"
    assert product_splits(10_000, 64, 132, 132) == 1, "one full wave"
    assert product_splits(10_000, 64, 1, 132) == 132, "a tile alone"
    assert product_splits(1, 64, 1, 132) == 1, "nothing to split"
    assert 36 * product_splits(1568, 64, 36, 132) % 132 == 0, "whole waves"
