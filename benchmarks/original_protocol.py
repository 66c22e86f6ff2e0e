"""Measure speed by the protocol of the paper.

As in `speed_test.py` of the original repository: one thread, batches of 16 images, 10 seconds of warm-up and 60
measured seconds, with fused batch norms. levit-flax and timm are fused too; transformers has no fused model. The
published numbers are those of Graham et al. 2021 on an Intel Xeon Gold 6138.

    python benchmarks/original_protocol.py [--variants levit-128S ...] [--peers "timm fused"] [--out FILE]

Requires `pip install -e '.[bench]'`. Peers that are not installed are skipped.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from latency import measure

import turns
from forward import TOLERANCE, VARIANTS, difference, logits_file
from machine import describe_machine
from peers import OURS, PEERS, Case, load_config, write_models

BATCH = 16
PUBLISHED = {"levit-128S": 131.1, "levit-128": 94.0, "levit-192": 65.0, "levit-256": 42.5, "levit-384": 23.1}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def work(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one peer on one core in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    case = Case(arguments.directory, "float32", "cpu")
    height, width = load_config(case).image_height_width
    runner = PEERS[arguments.worker](case)
    inputs = runner.put(np.random.default_rng(0).standard_normal((BATCH, height, width, 3), np.float32))
    measure(runner, inputs, arguments.warm_up)
    milliseconds = measure(runner, inputs, arguments.seconds)
    np.save(logits_file(arguments.directory, arguments.worker, BATCH), runner.fetch(runner.call(inputs)))
    return {"images_per_second": 1000 * BATCH * len(milliseconds) / sum(milliseconds), "calls": len(milliseconds)}


def main() -> None:
    """Measure, then print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="published variants, or tiny")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=["timm fused", "transformers"])
    parser.add_argument("--warm-up", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "original_protocol.json")
    parser.add_argument("--worker", choices=list(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        turns.answer(lambda: work(arguments))
        return

    names = [OURS, *(name for name in arguments.peers if name != OURS)]
    rows: dict[str, Any] = {}
    print(f"{'images per second, one thread':32}{'published':>10}", *(f"{name:>16}" for name in names))
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory() as folder:
            write_models(Path(folder), variant)
            options = ["--directory", folder, "--warm-up", arguments.warm_up, "--seconds", arguments.seconds]
            commands = {name: ["--worker", name, *options] for name in names}
            found = turns.in_turns(__file__, commands, 1, **ONE_THREAD)
            turns.require(found, OURS)
            for name in found:
                if not difference(Path(folder), name, BATCH) < TOLERANCE["float32"]:
                    raise SystemExit(f"The logits of {name} differ from those of {OURS}.")
        speeds = {name: runs[0]["images_per_second"] for name, runs in found.items()}
        rows[variant] = {"published": PUBLISHED.get(variant), **speeds}
        columns = (f"{speeds.get(name, float('nan')):16.1f}" for name in names)
        print(f"{variant:32}{PUBLISHED.get(variant, float('nan')):10.1f}", *columns, flush=True)
    turns.write(
        arguments.out,
        {
            "description": "images per second by the protocol of the paper: one thread, batches of 16, float32",
            "machine": describe_machine(("torch", "timm", "transformers")),
            "warm_up_seconds": arguments.warm_up,
            "seconds": arguments.seconds,
            "published_on": "Intel Xeon Gold 6138",
            "variants": rows,
        },
    )


if __name__ == "__main__":
    main()
