"""Measure the memory and the operations of a training step with and without rematerialization.

The step is the one of `finetune`, with AdamW and one head. It is compiled and not run: XLA reports the memory that it
reserves for activations and other intermediate results, and the operations of the compiled program.

    python benchmarks/training_memory.py [--variants levit-128S levit-256] [--batches 32 128] [--out FILE]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

import levit_flax as lf
import turns
from forward import VARIANTS
from levit_flax.training.recipe import Recipe
from levit_flax.training.state import _Batch, _Task
from machine import describe_machine
from peers import TINY

MIB = 2**20


def measure(config: lf.LevitConfig, batch: int, dtype: str, remat: bool) -> dict[str, float]:
    """Compile a training step and return its memory in MiB and its operations."""
    model = lf.LevitForImageClassification(config, dtype=jnp.dtype(dtype), remat=remat)
    shape = (*config.image_height_width, config.num_channels)
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    recipe = Recipe(batch_size=batch)
    task = _Task(model, recipe, lf.LevitImageProcessor(), variables["params"], steps_per_epoch=1000)
    images = _Batch(jax.ShapeDtypeStruct((1, batch, *shape), jnp.uint8), jax.ShapeDtypeStruct((1, batch), jnp.int32))
    state = jax.eval_shape(task.init, variables)
    compiled = jax.jit(task.train_step, donate_argnums=0).lower(state, None, images).compile()
    memory = compiled.memory_analysis()
    return {
        "intermediate_mib": memory.temp_size_in_bytes / MIB,
        "argument_mib": memory.argument_size_in_bytes / MIB,
        "operations": compiled.cost_analysis()["flops"],
    }


def compare(config: lf.LevitConfig, batch: int, dtype: str) -> dict[str, dict[str, float]]:
    """Return the measurements without and with rematerialization, and the ratios between them."""
    stored, remat = (measure(config, batch, dtype, remat) for remat in (False, True))
    return {"stored": stored, "remat": remat, "ratio": {name: remat[name] / stored[name] for name in stored}}


def main() -> None:
    """Measure, then print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--variants", nargs="+", choices=[*VARIANTS, "tiny"], default=["levit-128S", "levit-256"], metavar="VARIANT"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_memory.json")
    arguments = parser.parse_args()

    found: dict = {}
    for variant in arguments.variants:
        config = lf.LevitConfig(**TINY) if variant == "tiny" else lf.VARIANTS[variant]
        for dtype in arguments.dtypes:
            for batch in arguments.batches:
                rows = compare(config, batch, dtype)
                found.setdefault(variant, {}).setdefault(dtype, {})[str(batch)] = rows
                before, after = (rows[name]["intermediate_mib"] for name in ("stored", "remat"))
                print(
                    f"{variant:10} {dtype:8} batch {batch:4}: {before:6.0f} MiB, with remat {after:6.0f} MiB,"
                    f" {rows['ratio']['operations']:.2f} times the operations"
                )
    result = {
        "description": "memory that XLA reserves for the intermediate results of a training step with AdamW",
        "machine": describe_machine(("optax",)),
        "device": jax.default_backend(),
        "variants": found,
    }
    turns.write(arguments.out, result)


if __name__ == "__main__":
    main()
