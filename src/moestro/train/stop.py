"""Asking a training to stop: SIGTERM and SIGINT let the running step finish."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["Stop", "listening"]


class Stop:
    """A flag. `requested` is read after every step; over ranks it counts as soon as one has it."""

    def __init__(self) -> None:
        self.requested = False
        self.signal, self.since = 0, 0.0


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """While inside, SIGTERM and SIGINT set the flag. A second SIGINT, a second later or more, interrupts as usual.

    Further SIGTERMs change nothing: torchrun and job schedulers send several. In other threads than the main one
    signals cannot be caught, and nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {}

    def heard(number: int, frame: Any) -> None:
        if number == signal.SIGINT and stop.requested and time.monotonic() - stop.since > 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        if not stop.requested:
            stop.requested, stop.signal, stop.since = True, number, time.monotonic()

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.getsignal(number)
        signal.signal(number, heard)
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
