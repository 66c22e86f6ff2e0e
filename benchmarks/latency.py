"""Measure the time from call to logits against other ways to run LeViT.

Each call starts after the logits of the previous call have arrived.

    python benchmarks/latency.py [--variants levit-128S ...] [--batches 1 16] [--device cuda] [--out FILE]

Requires `pip install -e '.[bench]'`. Peers that are not installed are skipped.
"""

import time
from typing import Any

import forward
from peers import Runner


def measure(runner: Runner, inputs: Any, seconds: float) -> list[float]:
    """Return the milliseconds of each call."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        begin = time.perf_counter()
        runner.fetch(runner.call(inputs))
        found.append(1000 * (time.perf_counter() - begin))
    return found


if __name__ == "__main__":
    forward.main(__file__, "milliseconds from call to logits, one call at a time", measure)
