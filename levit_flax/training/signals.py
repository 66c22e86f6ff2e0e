"""Record SIGTERM and SIGINT, so that training saves its state before it stops."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class _StopSignal:
    """The number of the signal received, or None."""

    received: int | None = None


@contextmanager
def _stop_signals(several_hosts: bool) -> Iterator[_StopSignal]:
    """Record the first SIGTERM or SIGINT instead of exiting; the second one has its usual effect.

    With several hosts, JAX handles SIGTERM and makes all hosts agree on a step. SIGINT is forwarded as SIGTERM.
    """
    stop = _StopSignal()
    previous: dict[int, Any] = {}

    def record(number: int, frame: Any) -> None:
        stop.received = number
        signal.signal(number, previous[number])
        if several_hosts:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        for number in map(int, (signal.SIGINT,) if several_hosts else (signal.SIGTERM, signal.SIGINT)):
            previous[number] = signal.signal(number, record)
    except ValueError:  # Python allows signal handlers in the main thread only
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
