"""SIGINT and SIGTERM, kept until a step is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A training that ended early, its checkpoint written. `signal` is the number of the signal that asked for it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class Request:
    """`number` is that of the signal that came, 0 for none."""

    def __init__(self) -> None:
        self.number = 0


@contextmanager
def requests() -> Iterator[Request]:
    """Within the block a first signal is noted, and a second does what it did before; in other threads than the main one
    signals are left alone, as Python demands, and so are signals that are ignored."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    now = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in now.items() if handler not in (None, signal.SIG_IGN)}

    def note(number: int, frame: FrameType | None) -> None:
        request.number = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
