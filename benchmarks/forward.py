"""Run every peer on the same weights and images.

`latency.py` and `throughput.py` share this module. Each measurement is a separate process. For each batch size, it
times the first call, which compiles, then warms up, then measures. After all rounds, the logits of each peer are
compared with those of levit-flax.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import turns
from machine import describe_machine
from peers import OURS, PACKAGES, PEERS, Case, Runner, load_config, write_models

VARIANTS = ("levit-128S", "levit-128", "levit-192", "levit-256", "levit-384")
BATCHES = {"cpu": (1, 4, 16, 64), "cuda": (1, 64, 256, 1024, 2048)}
WARM_UP = 0.25  # relative to the measured time
TOLERANCE = {
    "float32": 2e-3,
    "bfloat16": 0.1,
}  # relative to the largest logit; by default, GPUs multiply float32 in TF32

Measure = Callable[[Runner, Any, float], list[float]]  # (runner, inputs, seconds) -> milliseconds per batch


def work(arguments: argparse.Namespace, measure: Measure) -> dict[str, Any]:
    """Measure one peer on one variant in this process."""
    begin = time.perf_counter()
    case = Case(arguments.directory, arguments.dtype, arguments.device)
    runner = PEERS[arguments.worker](case)
    built = time.perf_counter() - begin
    (height, width), found = load_config(case).image_height_width, {}
    for batch in arguments.batches:
        pixels = np.random.default_rng(batch).standard_normal((batch, height, width, 3), np.float32)
        begin = time.perf_counter()
        inputs = runner.put(pixels)
        logits = runner.fetch(runner.call(inputs))
        first = time.perf_counter() - begin
        measure(runner, inputs, WARM_UP * arguments.seconds)
        milliseconds = measure(runner, inputs, arguments.seconds)
        found[batch] = {"milliseconds": milliseconds, "first_call_seconds": first}
        np.save(logits_file(arguments.directory, arguments.worker, batch), logits)
    return {"build_seconds": built, "batches": found}


def logits_file(directory: Path, peer: str, batch: int) -> Path:
    """Return the path of a peer's logits."""
    return directory / f"{peer} {batch}.npy"


def difference(directory: Path, peer: str, batch: int) -> float:
    """Return the largest difference from our logits, relative to our largest logit."""
    theirs, ours = (np.load(logits_file(directory, name, batch)) for name in (peer, OURS))
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())


def compare(found: dict[str, list[Any]], batch: int, dtype: str, directory: Path) -> dict[str, Any]:
    """Return one row per peer: its time per batch, and the time relative to ours."""
    rows: dict[str, Any] = {}
    medians = {
        name: [float(np.median(run["batches"][str(batch)]["milliseconds"])) for run in runs]
        for name, runs in found.items()
    }
    for name, runs in found.items():
        measured = [run["batches"][str(batch)] for run in runs]
        error = difference(directory, name, batch)
        if not error < TOLERANCE[dtype]:
            raise SystemExit(
                f"The logits of {name} at batch size {batch} differ by {error:.1e} of the largest: expected less than"
                f" {TOLERANCE[dtype]:.0e}."
            )
        ratios = [theirs / ours for theirs, ours in zip(medians[name], medians[OURS], strict=False)]
        rows[name] = {
            "milliseconds": turns.spread(medians[name]),
            "milliseconds_p90": float(np.median([np.percentile(run["milliseconds"], 90) for run in measured])),
            "images_per_second": 1000 * batch / float(np.median(medians[name])),
            "times_ours": turns.spread(ratios),
            "build_seconds": turns.spread([run["build_seconds"] for run in runs]),
            "first_call_seconds": turns.spread([run["first_call_seconds"] for run in measured]),
            "difference": error,
        }
    return rows


def show(title: str, rows: dict[str, Any]) -> None:
    """Print a table."""
    columns = f"{'ms/batch':>12}{'(range)':>20}{'images/s':>12}{'time/ours':>12}{'first call s':>14}"
    print(f"\n{title}\n{'':32}{columns}")
    for name, row in rows.items():
        times = row["milliseconds"]
        reach = f"{times['least']:.1f} to {times['most']:.1f}"
        print(
            f"{name:32}{times['median']:12.1f}{reach:>20}{row['images_per_second']:12.0f}"
            f"{row['times_ours']['median']:12.2f}{row['first_call_seconds']['most']:14.1f}",
            flush=True,
        )


def main(script: str, description: str, measure: Measure) -> None:
    """Measure, then print and write the results.

    Args:
        script: path of the calling script, which is started once per measurement.
        description: description of the measured quantity.
        measure: returns milliseconds per batch.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="published variants, or tiny")
    parser.add_argument("--device", choices=list(BATCHES), default="cpu")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=list(TOLERANCE), default=["float32"])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time per batch size and round")
    parser.add_argument("--out", type=Path, help="JSON file to write, by default in benchmarks/results/")
    parser.add_argument("--worker", choices=list(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.batches = arguments.batches or BATCHES[arguments.device]
    if arguments.worker:
        turns.answer(lambda: work(arguments, measure))
        return

    suffix = "" if arguments.device == "cpu" else f"-{arguments.device}"
    out = arguments.out or Path(script).parent / "results" / f"{Path(script).stem}{suffix}.json"
    names = [OURS, *(name for name in arguments.peers if name != OURS)]
    result: dict[str, Any] = {
        "description": description,
        "machine": describe_machine(PACKAGES),
        "device": arguments.device,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "variants": {},
    }
    for variant in arguments.variants:
        by_dtype = result["variants"][variant] = {}
        for dtype in arguments.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                write_models(Path(folder), variant)
                options = ["--directory", folder, "--dtype", dtype, "--device", arguments.device]
                options += ["--seconds", arguments.seconds, "--batches", *arguments.batches]
                commands = {name: ["--worker", name, *options] for name in names}
                compiled = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}  # empty, so that the first call compiles
                found = turns.in_turns(script, commands, arguments.rounds, **compiled)
                turns.require(found, OURS)
                by_dtype[dtype] = {batch: compare(found, batch, dtype, Path(folder)) for batch in arguments.batches}
            for batch, rows in by_dtype[dtype].items():
                show(f"{variant}, {dtype}, batch size {batch}", rows)
        turns.write(out, result)
