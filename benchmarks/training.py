"""Measure a training step against transformers' model, and the input pipeline.

Step: both libraries train the same model on the same batch with AdamW, without augmentation. The losses of the first
steps must agree. Input pipeline: 500-pixel JPEGs are decoded, augmented and batched as in training, first without a
model and then in a training run.

    python benchmarks/training.py [--variants levit-128S] [--batch 32] [--steps 10] [--rounds 5] [--out FILE]

Requires `pip install -e '.[bench]'` (torch, transformers).
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import turns
from forward import VARIANTS
from machine import describe_machine
from peers import TINY

COMPARED = 3  # number of first steps whose losses are compared
TOLERANCE = 1e-3  # relative; if a gradient is only rounding noise, AdamW takes a full step in its direction
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.025
EDGE = 500  # pixels of the JPEGs


def make_batch(batch: int, size: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random pixel values [B H W C] and labels [B]."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, size, size, 3)).astype(np.float32), rng.integers(0, labels, batch)


def time_ours(arguments: argparse.Namespace) -> dict:
    """Time the step that `finetune` takes."""
    import jax

    import levit_flax as lf
    from levit_flax.memory import keep_freed_memory
    from levit_flax.training.recipe import Recipe
    from levit_flax.training.state import _Batch, _Task

    keep_freed_memory()  # as `levit-flax finetune` does
    model, variables = lf.from_pretrained(arguments.model)
    recipe = Recipe(
        batch_size=arguments.batch,
        epochs=1000,
        learning_rate=LEARNING_RATE,
        warmup_epochs=0,
        weight_decay=WEIGHT_DECAY,
        adaptive_clip=0.0,
        label_smoothing=0.0,
    )
    task = _Task(model, recipe, lf.LevitImageProcessor(), variables["params"], steps_per_epoch=1000)
    pixels, labels = make_batch(arguments.batch, model.config.image_height_width[0], model.config.num_labels)
    batch = _Batch(*jax.device_put((pixels[None], labels[None].astype(np.int32))))
    state = task.init(variables)
    begin = time.perf_counter()
    step = jax.jit(task.train_step, donate_argnums=0).lower(state, None, batch).compile()
    compiled = time.perf_counter() - begin
    losses, seconds = [], []
    for _ in range(COMPARED + arguments.steps):
        begin = time.perf_counter()
        state, metrics = step(state, None, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
        losses.append(float(metrics.loss))
    return {"seconds": seconds[COMPARED:], "losses": losses[:COMPARED], "compile_seconds": compiled}


def time_torch(arguments: argparse.Namespace) -> dict:
    """Time a plain PyTorch step with transformers' model."""
    import torch
    from transformers import LevitForImageClassification

    model = LevitForImageClassification.from_pretrained(arguments.model).train()
    plain = [p for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("attention_biases")]
    decayed = [p for n, p in model.named_parameters() if not (p.ndim == 1 or n.endswith("attention_biases"))]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    pixels, labels = make_batch(arguments.batch, model.config.image_size, model.config.num_labels)
    pixel_values, targets = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
    losses, seconds = [], []
    for _ in range(COMPARED + arguments.steps):
        begin = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(model(pixel_values).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
    return {"seconds": seconds[COMPARED:], "losses": losses[:COMPARED]}


def time_data(arguments: argparse.Namespace) -> dict:
    """Measure the input pipeline and the fraction of a run spent waiting for it."""
    from PIL import Image

    import levit_flax as lf
    from levit_flax.training import finetune, read_images, read_recipe
    from levit_flax.training.data import _training_batches, _TrainingRows

    model, _ = lf.from_pretrained(arguments.model)
    rng = np.random.default_rng(0)
    result: dict = {"images": arguments.images, "edge": EDGE, "ceiling_images_per_second": {}}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(arguments.images):
            path = Path(folder, "data", "ab"[i % 2], f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (EDGE // 8, EDGE // 8, 3), np.uint8))
            coarse.resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(path, quality=90)
        recipe = read_recipe("finetune", batch_size=arguments.batch, epochs=3, warmup_epochs=0)
        train, _ = read_images(Path(folder, "data"), recipe)
        height, width = model.config.image_height_width
        rows = _TrainingRows(train, recipe, lf.LevitImageProcessor(size=height, crop_size=(height, width)))
        for threads, processes in ((1, 0), (2, 0), (1, 2)):
            batches = _training_batches(rows, threads, processes)
            next(batches)
            count = min(8, recipe.epochs * rows.steps_per_epoch - 1)
            begin = time.perf_counter()
            for _ in range(count):
                next(batches)
            rate = count * arguments.batch / (time.perf_counter() - begin)
            result["ceiling_images_per_second"][f"{threads} threads, {processes} processes"] = rate
        report = finetune(Path(folder, "data"), Path(folder, "out"), model=arguments.model, recipe=recipe)
    result["training_images_per_second"] = report["images_per_second"]
    result["share_waiting_for_data"] = report["share_waiting_for_data"]
    return result


WORKERS = {"levit-flax": time_ours, "transformers": time_torch, "data": time_data}


def write_model(directory: Path, variant: str) -> None:
    """Write a newly initialized model as directories that both libraries load."""
    import jax

    import levit_flax as lf
    from levit_flax.convert.workflow import _convert_to_directory

    config = lf.LevitConfig(**TINY) if variant == "tiny" else lf.VARIANTS[variant]
    model = lf.LevitForImageClassification(config)
    height, width = config.image_height_width
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, height, width, 3), np.float32))
    lf.save_pretrained(directory / "flax", model, variables)
    _convert_to_directory(str(directory / "flax"), directory / "torch", layout="hf", verify=False)


def compare(found: dict[str, list[dict]]) -> dict:
    """Return the speeds of both libraries on one model, after comparing their losses."""
    turns.require(found, "levit-flax", "transformers")
    ours, theirs = found["levit-flax"], found["transformers"]
    np.testing.assert_allclose(ours[0]["losses"], theirs[0]["losses"], rtol=TOLERANCE)
    medians = {name: [statistics.median(run["seconds"]) for run in runs] for name, runs in found.items()}
    ratios = [there / here for here, there in zip(medians["levit-flax"], medians["transformers"], strict=True)]
    return {
        "seconds_a_step": {name: turns.spread(times) for name, times in medians.items()},
        "times_as_fast": turns.spread(ratios),
        "compile_seconds": statistics.median(run["compile_seconds"] for run in ours),
    }


def print_speeds(variant: str, speeds: dict) -> None:
    """Print the time of a step in both libraries and their ratio."""
    print(variant)
    for name, times in speeds["seconds_a_step"].items():
        print(f"  {name:14} {times['median']:.3f} s per step ({times['least']:.3f} to {times['most']:.3f})")
    spread = speeds["times_as_fast"]
    print(f"  levit-flax is {spread['median']:.2f} times as fast ({spread['least']:.2f} to {spread['most']:.2f})")


def main() -> None:
    """Measure, then print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, help="published variants, or tiny; the first one trains on JPEGs"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=256, help="number of JPEGs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        turns.answer(lambda: WORKERS[arguments.worker](arguments))
        return

    options = ["--batch", arguments.batch, "--steps", arguments.steps, "--images", arguments.images]
    models: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in arguments.variants:
            write_model(Path(folder, variant), variant)
        command = ["--worker", "data", "--model", Path(folder, arguments.variants[0], "flax"), *options]
        found = turns.in_turns(__file__, {"data": command}, 1)
        turns.require(found, "data")
        (data,) = found["data"]
        print(
            f"training {arguments.variants[0]} on JPEGs waits for data {data['share_waiting_for_data']:.1%} of the time"
        )
        for variant in arguments.variants:
            commands = {
                name: ["--worker", name, "--model", Path(folder, variant, layout), *options]
                for name, layout in (("levit-flax", "flax"), ("transformers", "torch"))
            }
            models[variant] = compare(turns.in_turns(__file__, commands, arguments.rounds))
            print_speeds(variant, models[variant])
    result = {
        "description": "a float32 training step with AdamW, without augmentation; then a training run on JPEGs",
        "machine": describe_machine(("torch", "transformers", "optax", "grain")),
        "batch": arguments.batch,
        "models": models,
        "data": {"variant": arguments.variants[0], **data},
    }
    turns.write(arguments.out, result)


if __name__ == "__main__":
    main()
