"""The command line: `fastconv info`, `train`, `predict`, `convert`, `explain`, `bench`, `tune`, `inspect`; a file each."""

from __future__ import annotations

import argparse
import io
import logging
import signal
import sys
from collections.abc import Sequence

from fastconv.cli import bench, convert, explain, info, inspect, predict, train, tune

_COMMANDS = (info, train, predict, convert, explain, bench, tune, inspect)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, or 1 after an error that the user can do something about, told in one line; a command may have
        others.
    """
    parser = argparse.ArgumentParser(
        prog="fastconv", description="Fused convolution, bias, ReLU and pooling for PyTorch, forward and backward."
    )
    parser.add_argument("--verbose", action="store_true", help="log which backend serves which operator")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A locale without × or ± must not end a training, and a pipe gets each line at once.
            stream.reconfigure(errors="replace", line_buffering=True)
    if options.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        status: int | None = options.run(options)
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        if options.verbose:
            raise
        print(f"fastconv {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:  # a training tells where it stopped, and the signal
        print(f"fastconv {options.command}: {error or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    return status or 0
