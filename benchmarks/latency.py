"""How long a batch takes from call to logits, ours against what runs LeViT elsewhere.

One call at a time: the next begins when the logits of the last are there.

    python benchmarks/latency.py [--variants levit-128S ...] [--batches 1 16] [--device cuda] [--out FILE]

Needs `pip install -e '.[bench]'`; what is missing is named and left out.
"""

import time
from typing import Any

import forward
from peers import Runner


def measure(runner: Runner, given: Any, seconds: float) -> list[float]:
    """Return the milliseconds of each call."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        begin = time.perf_counter()
        runner.fetch(runner.call(given))
        found.append(1000 * (time.perf_counter() - begin))
    return found


if __name__ == "__main__":
    forward.main(__file__, "milliseconds from call to logits, one call at a time", measure)
