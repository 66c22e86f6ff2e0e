"""Measure throughput against other ways to run LeViT.

Two calls are in flight at any time, as in a service that always has a next batch. If a peer's call returns before the
computation ends, one thread makes both calls; otherwise two threads do.

    python benchmarks/throughput.py [--variants levit-128S ...] [--batches 16 64] [--device cuda] [--out FILE]

Requires `pip install -e '.[bench]'`. Peers that are not installed are skipped.
"""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import forward
from peers import Runner

IN_FLIGHT = 2
PARTS = 5  # of the measured time, each with its own result


def measure(runner: Runner, inputs: Any, seconds: float) -> list[float]:
    """Return the milliseconds per batch in each part of the time."""
    found: list[float] = []
    with ThreadPoolExecutor(IN_FLIGHT) as pool:

        def begin_call() -> Any:
            if runner.returns_early:
                return runner.call(inputs)
            return pool.submit(lambda: runner.fetch(runner.call(inputs)))

        def end_call(pending: Any) -> None:
            runner.fetch(pending) if runner.returns_early else pending.result()

        for _ in range(PARTS):
            pending: deque[Any] = deque()
            calls, begin = 0, time.perf_counter()
            while not calls or time.perf_counter() < begin + seconds / PARTS:
                pending.append(begin_call())
                calls += 1
                if len(pending) == IN_FLIGHT:
                    end_call(pending.popleft())
            while pending:
                end_call(pending.popleft())
            found.append(1000 * (time.perf_counter() - begin) / calls)
    return found


if __name__ == "__main__":
    forward.main(__file__, "milliseconds per batch, two calls in flight", measure)
