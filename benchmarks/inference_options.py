"""Measure the ways to compile a model for inference, from which `levit_flax.inference_options` chooses.

    python benchmarks/inference_options.py [--variants levit-128S ...] [--batches 1 16] [--rounds 40] [--out FILE]

All programs run in one process, in turns, on the same random weights. Their logits are compared after the measurement.
The ratio is the time of a program divided by that of a program with the weights as arguments and without options.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import turns
from forward import VARIANTS
from machine import describe_machine
from peers import use_jax_on, write_models

REFERENCE = "arguments"
TOLERANCE = 1e-5  # relative to the largest logit


def compile_all(directory: Path, batch: int) -> tuple[dict[str, Callable[[Any], Any]], dict[str, float], Any]:
    """Return a program for each set of options, the seconds that its compilation took, and its input."""
    import jax
    import jax.numpy as jnp

    import levit_flax as lf
    from levit_flax import inference, inference_options

    function = inference._InferenceFunction(*lf.from_pretrained(directory / "flax"), None, None, jax.devices(), False)
    config = function.model.config
    shape = (batch, *config.image_height_width, config.num_channels)
    pixels = jax.device_put(np.random.default_rng(0).standard_normal(shape, np.float32))
    programs, seconds = {}, {}
    for name, options in inference_options._ALL_OPTIONS.items():
        begin = time.perf_counter()
        programs[name] = inference_options._compile_with(
            function._apply, function.variables, jax.ShapeDtypeStruct(shape, jnp.float32), options
        )
        seconds[name] = time.perf_counter() - begin
    return programs, seconds, pixels


def measure(directory: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Return the times of all programs at one batch size."""
    programs, compiling, pixels = compile_all(directory, batch)
    logits = {name: np.asarray(program(pixels)) for name, program in programs.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            program(pixels).block_until_ready()  # its weights and working memory into the caches
            begin = time.perf_counter()
            program(pixels).block_until_ready()
            milliseconds[name].append(1000 * (time.perf_counter() - begin))
    rows = {}
    for name, times in milliseconds.items():
        error = float(np.abs(logits[name] - logits[REFERENCE]).max() / np.abs(logits[REFERENCE]).max())
        if not error < TOLERANCE:
            raise SystemExit(f"The logits of {name} differ by {error:.1e} of the largest: expected {TOLERANCE:.0e}.")
        ratios = [own / reference for own, reference in zip(times, milliseconds[REFERENCE], strict=True)]
        rows[name] = {
            "milliseconds": turns.spread(times),
            "ratio": turns.spread(ratios),
            "compile_seconds": compiling[name],
            "difference": error,
        }
    return rows


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "inference_options.json")
    arguments = parser.parse_args()
    use_jax_on(arguments.device)
    result: dict[str, Any] = {"machine": describe_machine(), "variants": {}}
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory() as folder:
            write_models(Path(folder), variant)
            use_jax_on(arguments.device)
            rows = {batch: measure(Path(folder), batch, arguments.rounds) for batch in arguments.batches}
        result["variants"][variant] = rows
        for batch, names in rows.items():
            print(
                f"{variant}, batch size {batch}: "
                + ", ".join(f"{n} {r['ratio']['median']:.2f}" for n, r in names.items())
            )
    result["geometric_means"] = {
        batch: {
            name: math.exp(
                np.mean([np.log(rows[batch][name]["ratio"]["median"]) for rows in result["variants"].values()])
            )
            for name in next(iter(result["variants"].values()))[batch]
        }
        for batch in arguments.batches
    }
    turns.write(arguments.out, result)


if __name__ == "__main__":
    main()
