"""Measure a model's fraction of the peak speed and the time spent in its parts.

The peak is the rate of a large matrix product. The operations of a model are those of its matrix products and
convolutions, counting a multiplication and its addition as two. The profiler assigns the time to the parts of the
model.

    python benchmarks/roofline.py [--variants levit-128S ...] [--batches 1 16] [--out FILE]
"""

import argparse
import collections
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import levit_flax as lf
import turns
from forward import VARIANTS
from levit_flax.inference import _prepare
from machine import describe_machine
from peers import TINY

SIDE = 2048  # rows and columns of the matrices
PARTS = {
    "stem": r"/stem/",
    "heads": r"/head",
    "linear layers": r"/(qkv|kv|q|proj|up|down|linear)/",
    "attention products, softmax": r"/attention/",
}
LAYER = re.compile(r"/((?:stage_\d+|downsample_\d+|stem|head\w*)(?:/\w+)?)/")
REST = "activations, copies and the rest"


def seconds_per_call(call: Any, seconds: float) -> list[float]:
    """Return the time of each call."""
    jax.block_until_ready(call())
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        begin = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - begin)
    return found


def measure_machine(seconds: float) -> float:
    """Return the operations per second of a large float32 matrix product."""
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32))
    multiply = jax.jit(lambda x: jnp.matmul(x, x))
    return 2 * SIDE**3 / float(np.median(seconds_per_call(lambda: multiply(matrix), seconds)))


def count_operations(jaxpr: Any) -> int:
    """Count the operations of all matrix products and convolutions in a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        total += sum(count_operations(inner) for inner in inner_jaxprs(equation))
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = np.prod([shape[axis] for axis in contracted])
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            depth = np.prod(kernel) / kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        else:
            continue
        total += int(2 * depth * np.prod(equation.outvars[0].aval.shape))
    return total


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """Yield the jaxprs that an equation calls."""
    for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def profile(call: Any, program: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return the fraction of time, in [0, 1], by kind of operation and by layer.

    Args:
        call: runs the model once.
        program: text of the compiled program, which names the module of each operation.
    """
    origin = dict(re.findall(r'%?([\w.-]+) = [^\n]*op_name="([^"]*)"', program))
    by_part: collections.Counter[str] = collections.Counter()
    by_layer: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(5):
                jax.block_until_ready(call())
        [file] = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in origin:
                    path = origin[event.name]
                    part = next((part for part, pattern in PARTS.items() if re.search(pattern, path)), REST)
                    layer = LAYER.search(path)
                    by_part[part] += event.duration_ns
                    by_layer[layer[1] if layer else REST] += event.duration_ns
    parts, layers = (
        {name: nanoseconds / spent.total() for name, nanoseconds in spent.most_common()}
        for spent in (by_part, by_layer)
    )
    return parts, layers


def main() -> None:
    """Measure, then print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="published variants, or tiny")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "roofline.json")
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    print(f"{'variant':12}{'batch':>6}{'GFLOP':>8}{'ms':>9}{'GFLOP/s':>9}{'peak':>9}{'share':>8}")
    for variant in arguments.variants:
        config = lf.LevitConfig(**TINY) if variant == "tiny" else lf.VARIANTS[variant]
        model = lf.LevitForImageClassificationWithTeacher(config)
        shape = (*config.image_height_width, config.num_channels)
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))
        model, variables = _prepare(model, variables)
        for batch in arguments.batches:
            pixels = jnp.asarray(np.random.default_rng(0).standard_normal((batch, *shape), np.float32))
            apply = jax.jit(lambda variables, pixels, model=model: model.apply(variables, pixels).logits)
            operations = count_operations(jax.make_jaxpr(apply)(variables, pixels).jaxpr)
            compiled = apply.lower(variables, pixels).compile()

            def call(compiled: Any = compiled, variables: Any = variables, pixels: Any = pixels) -> Any:
                return compiled(variables, pixels)

            rates, peaks, times = [], [], []
            for _ in range(arguments.rounds):  # the peak of a shared machine changes
                peaks.append(measure_machine(arguments.seconds))
                times.append(float(np.median(seconds_per_call(call, arguments.seconds))))
                rates.append(operations / times[-1])
            parts, layers = profile(call, compiled.as_text())
            shares = [rate / peak for rate, peak in zip(rates, peaks, strict=True)]
            rows.setdefault(variant, {})[batch] = {
                "operations": operations,
                "milliseconds": turns.spread([1000 * t for t in times]),
                "operations_per_second": turns.spread(rates),
                "of_the_machine": turns.spread(shares),
                "machine_operations_per_second": turns.spread(peaks),
                "time_by_part": parts,
                "time_by_layer": layers,
            }
            seconds, rate, peak, share = (float(np.median(x)) for x in (times, rates, peaks, shares))
            print(
                f"{variant:12}{batch:6}{operations / 1e9:8.2f}{1000 * seconds:9.1f}"
                f"{rate / 1e9:9.1f}{peak / 1e9:9.1f}{share:8.1%}",
                flush=True,
            )
            for part, share in parts.items():
                print(f"{'':18}{part:36}{share:7.1%}", flush=True)
    turns.write(
        arguments.out,
        {
            "description": "speed of the folded, merged model relative to a large float32 matrix product",
            "machine": describe_machine(),
            "device": jax.devices()[0].device_kind,
            "rounds": arguments.rounds,
            "variants": rows,
        },
    )


if __name__ == "__main__":
    main()
