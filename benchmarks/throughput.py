"""How many images a second pass, ours against what runs LeViT elsewhere.

Two calls are under way at any time, as in a service that always has the next batch at hand: where a call returns before
its computation ends, the next one is begun then; where it does not, two threads call.

    python benchmarks/throughput.py [--variants levit-128S ...] [--batches 16 64] [--device cuda] [--out FILE]

Needs `pip install -e '.[bench]'`; what is missing is named and left out.
"""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import forward
from peers import Runner

IN_FLIGHT = 2
PARTS = 5  # which give a spread


def measure(runner: Runner, given: Any, seconds: float) -> list[float]:
    """Return the milliseconds a batch in each part of the time."""
    found: list[float] = []
    with ThreadPoolExecutor(IN_FLIGHT) as pool:

        def begin_call() -> Any:
            if runner.returns_early:
                return runner.call(given)
            return pool.submit(lambda: runner.fetch(runner.call(given)))

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
    forward.main(__file__, "milliseconds a batch, two calls under way at any time", measure)
