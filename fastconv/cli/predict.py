"""`fastconv predict`: what a trained net says of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastconv import backends
from fastconv.cli import arguments
from fastconv.train.predict import Predictor


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "predict",
        help="what a trained net says of images",
        description=(
            "Print the likeliest classes of images, by a net that `fastconv train` has trained. An image's smaller side is "
            "resized to the net's resolution and its centre taken, as in the training's test."
        ),
    )
    option = parser.add_argument
    option("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    option("--checkpoint", type=Path, required=True, help="runs/NAME/fastconv-seed0.pt, say")
    option("--top", type=arguments.positive, default=5, help="how many classes to print (default: 5)")
    option("--tta", action="store_true", help="average five crops and their reflections")
    option(
        "--json", action="store_true", help='a line for each image: {"image": ..., "top": [{"class": ..., "score": ...}]}'
    )
    option("--model", help="the net's path/to/file.py:callable, where it is one of your own: its code is run")
    option("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ... (default: auto)")
    option("--backend", choices=backends.REQUESTS, default=backends.requested(), help="fastconv's backend")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    torch.set_flush_denormal(True)
    try:
        predictor = Predictor(
            options.checkpoint, device=arguments.device(options.device), tta=options.tta, model=options.model
        )
        with backends.use_backend(options.backend):
            for file, scores in zip(options.images, predictor.scores(options.images), strict=True):
                _tell(file, predictor.top(scores, options.top), as_json=options.json)
    finally:
        torch.set_flush_denormal(False)


def _tell(file: Path, top: list[tuple[str, float]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"image": str(file), "top": [{"class": name, "score": score} for name, score in top]}))
        return
    print(file)
    for name, score in top:
        print(f"{100 * score:8.2f} %  {name}")
