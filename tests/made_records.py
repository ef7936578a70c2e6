"""Records that nobody measured, of plausible sizes: for tests of what is made of records."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from fastconv.bench.records import Record

CPU = {"chip": "Some CPU cpu-2", "driver": None, "torch": "2.13.0+cpu", "triton": "3.7.1", "cudnn": None}
GPU = {"chip": "Some GPU sm_90", "driver": "580.65", "torch": "2.13.0+cu130", "triton": "3.7.1", "cudnn": "91300"}
LAYERS = (
    (3, 64, 224, "7x7/2+pool"),
    *(
        (c, d, s, w)
        for c, d, s in ((64, 64, 56), (64, 128, 28), (128, 256, 14), (256, 512, 7))
        for w in ("3x3/1", "3x3/1+pool")
    ),
    *((c, c, s, w) for c, s in ((64, 32), (128, 16), (256, 8), (512, 4)) for w in ("3x3/1", "3x3/1+pool")),
    *((c, 2 * c, s, w) for c, s in ((64, 112), (128, 56), (256, 28)) for w in ("3x3/2", "1x1/2", "3x3/1", "1x1/1")),
)
POOLS = ("relu_max_pool2d 2x2/2 64@112", "max_pool2d 3x3/2 64@112", "avg_pool2d 2x2/2 256@14", "global_avg_pool2d 512@7")
NETS = ("recipe_net R=32 batch 64", "recipe_net R=224 batch 8", "vgg16 R=224 batch 2", "resnet18 R=224 batch 4")
GROWING = (
    *(f"64-64@56 3x3/1 batch {batch}" for batch in (1, 2, 4, 8, 16, 32)),
    *(f"64-64@{size} 3x3/1 batch 8" for size in (14, 28, 112, 224)),
    *(f"{width}-{width}@56 3x3/1 batch 8" for width in (16, 32, 128, 256)),
)


def record(**changes: Any) -> Record:
    what = {"suite": "layers", "case": "64-64@56 3x3/1 batch 32", "direction": "forward", "dtype": "float32"}
    times = {"provider": "fastconv", "median_ms": 2.0, "q20_ms": 1.9, "q80_ms": 2.2, "runs": 20}
    stock = {"fastest_stock": "eager_channels_last", "over_stock": 1.5, "over_stock_q20": 1.4, "over_stock_q80": 1.6}
    right = {"gate_passed": True, "max_error": 1e-5, "rms_error": 1e-6}
    counted = {"flops": 10**9, "bytes": 10**7, "roofline_percent": 50.0, "peak_bytes": 10**8, "saved_bytes": 10**7}
    machine = {**CPU, "commit": "0123456789ab", "date": "2026-11-22T10:00:00+00:00"}
    rates = {"launches": None, "copy_gb_per_s": 40.0, "matmul_tflop_per_s": 0.49}
    return Record(**{**what, **times, **stock, **right, **counted, **rates, **machine, **changes})


def pair(gain: float, milliseconds: float, stock: str = "eager_channels_last", **changes: Any) -> Iterator[Record]:
    """Ours, `gain` times as fast as stock torch, and stock torch's."""
    for provider, time, ratio in (("fastconv", milliseconds / gain, gain), (stock, milliseconds, 1.0)):
        spread = 0.0 if ratio == 1.0 else 0.05 + 0.1 / (1 + milliseconds)
        ratios = {"over_stock": ratio, "over_stock_q20": ratio * (1 - spread), "over_stock_q80": ratio * (1 + spread)}
        times = {"median_ms": time, "q20_ms": time * 0.97, "q80_ms": time * 1.06}
        yield record(**{**times, **ratios, "fastest_stock": stock, "provider": provider, **changes})


def chip(is_gpu: bool, seed: int = 0) -> list[Record]:
    """All suites of one chip."""
    draw = random.Random(seed)
    dtypes = ("tf32", "float32_ieee", "bfloat16", "float16") if is_gpu else ("float32", "float32_ieee", "bfloat16")
    # Products (GFLOP/s) and copies (GB/s) that a dtype reaches.
    rates = (
        {"tf32": 4e5, "float32_ieee": 5e4, "bfloat16": 7e5, "float16": 7e5} if is_gpu else {"bfloat16": 900, "float32": 480}
    )
    copy = 2800.0 if is_gpu else 40.0
    found: list[Record] = []
    for dtype in dtypes:
        rate, size = rates.get(dtype, 480), 2 if "16" in dtype else 4
        machine = {**(GPU if is_gpu else CPU), "dtype": dtype, "copy_gb_per_s": copy, "matmul_tflop_per_s": rate / 1e3}

        def layer(
            suite: str, case: str, flops: float, moved: float, machine: Any = machine, rate: float = rate, size: int = size
        ) -> None:
            for direction, times, gain in (("forward", 1, 1.5), ("both", 3 if not case.startswith("3-") else 2, 1.3)):
                stock_ms = 1e3 * times**1.2 * (flops / (rate * 0.7e9) + moved / copy / 1e9 + (4e-6 if is_gpu else 1e-5))
                counts = {"flops": int(flops * times) or None, "bytes": int(moved * times * 0.8)}
                errors = {
                    "rms_error": draw.uniform(1, 3) * (2e-7 if size == 4 else 2e-3),
                    "max_error": draw.uniform(1e-5, 1e-4),
                }
                what = {"suite": suite, "case": case, "direction": direction, **counts, **errors, **machine}
                found.extend(pair(gain * draw.uniform(0.75, 1.25), stock_ms, **what))

        def convolution(suite: str, inside: int, outside: int, side: int, window: str, batch: int, size: int = size) -> None:
            kernel, stride = int(window[0]), int(window.partition("/")[2][0])
            pixels = batch * (side // stride) ** 2
            moved = size * (
                batch * inside * side**2 + outside * pixels / (4 if "pool" in window else 1) + inside * outside * kernel**2
            )
            layer(
                suite, f"{inside}-{outside}@{side} {window} batch {batch}", 2 * pixels * inside * outside * kernel**2, moved
            )

        for batch in (1, 32):
            for inside, outside, side, window in LAYERS:
                convolution("layers", inside, outside, side, window, batch)
            for case in POOLS:
                channels, _, side = case.rpartition(" ")[2].partition("@")
                layer("pools", f"{case} batch {batch}", 0, 1.3 * size * batch * int(channels) * int(side) ** 2)
        for case in GROWING:
            channels, side = case.partition(" ")[0].split("-")[1].split("@")
            convolution("scaling", int(channels), int(channels), int(side), "3x3/1", int(case.rpartition(" ")[2]))
        whole = {**machine, "bytes": None, "roofline_percent": None}
        for suite, direction in (("models", "forward"), ("training", "step")):
            for case in NETS:
                stock = "compile_default" if "recipe" in case else "eager_channels_last"
                what = {"suite": suite, "direction": direction, "case": case, **whole}
                found.extend(pair(draw.uniform(0.9, 2.4), draw.uniform(50, 900), stock, **what))
        for case in ("conv2d_relu, no gradient", "conv2d_relu, recorded for backward"):
            found.extend(pair(draw.uniform(0.3, 0.6), 0.005, suite="overhead", case=case, **{**whole, "flops": None}))
    return found
