"""How many pictures a second pass, ours against what runs LeViT elsewhere.

Calls are begun while the one before is still computed, as in a service that always has the next batch at hand.

    python benchmarks/throughput.py [--variants levit-128S ...] [--batches 16 64] [--device cuda] [--out FILE]

Needs `pip install -e '.[bench]'`; what is missing is named and left out.
"""

import time
from collections import deque
from typing import Any

import forward
from peers import Runner

IN_FLIGHT = 2
PARTS = 5  # which give a spread


def measure(runner: Runner, given: Any, seconds: float) -> list[float]:
    """Return the milliseconds a batch in each part of the time."""
    found: list[float] = []
    for _ in range(PARTS):
        pending: deque[Any] = deque()
        calls, begin = 0, time.perf_counter()
        while not calls or time.perf_counter() < begin + seconds / PARTS:
            pending.append(runner.call(given))
            calls += 1
            if len(pending) == IN_FLIGHT:
                runner.fetch(pending.popleft())
        while pending:
            runner.fetch(pending.popleft())
        found.append(1000 * (time.perf_counter() - begin) / calls)
    return found


if __name__ == "__main__":
    forward.main(__file__, "milliseconds a batch, the next call begun before the last has ended", measure)
