"""Measure image preprocessing against the two processors of transformers.

JPEG files of 640x480 pixels are decoded, resized, cropped and normalized one at a time, on one thread and on two. Our
pixel values must equal those of transformers' PIL processor bit for bit.

    python benchmarks/preprocessing.py [--images 64] [--rounds 5] [--out FILE]

Requires `pip install -e '.[bench]'` (transformers, torchvision).
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import turns
from machine import describe_machine

WIDTH, HEIGHT = 640, 480
OURS, PIL, TORCHVISION = "levit-flax", "transformers, PIL", "transformers, torchvision"


def make_processor(name: str) -> Callable[[Path], np.ndarray]:
    """Return a function from a file to channels-last pixel values [1 H W C]."""
    if name == OURS:
        from levit_flax import LevitImageProcessor

        ours = LevitImageProcessor()
        return lambda path: ours(path, return_tensors="np")["pixel_values"]
    import torch
    import transformers

    torch.set_num_threads(1)  # only the calling threads are compared
    classes = {PIL: "LevitImageProcessorPil", TORCHVISION: "LevitImageProcessor"}
    theirs = getattr(transformers, classes[name])()

    def process(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            values = theirs(image.convert("RGB"), return_tensors="np")["pixel_values"]
        return values.transpose(0, 2, 3, 1)

    return process


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one processor in this process."""
    process = make_processor(arguments.worker)
    files = sorted(arguments.directory.glob("*.jpg"))
    np.save(arguments.directory / f"{arguments.worker}.npy", process(files[0]))
    rates = {}
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(process, files[: 2 * threads]))
            begin = time.perf_counter()
            list(pool.map(process, files))
            rates[threads] = len(files) / (time.perf_counter() - begin)
    return {"images_per_second": rates}


def write_images(directory: Path, count: int) -> None:
    """Write smooth, slightly noisy images, which compress like photographs."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8))
        levels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(levels + generator.integers(-8, 9, levels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(directory / f"{i:04}.jpg", quality=90)


def main() -> None:
    """Measure, then print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "preprocessing.json")
    parser.add_argument("--worker", choices=[OURS, PIL, TORCHVISION], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        turns.answer(lambda: work(arguments))
        return

    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), arguments.images)
        commands = {name: ["--worker", name, "--directory", folder] for name in (OURS, PIL, TORCHVISION)}
        found = turns.in_turns(__file__, commands, arguments.rounds)
        turns.require(found, OURS)
        differing = {
            name: int(np.sum(np.load(Path(folder, f"{name}.npy")) != np.load(Path(folder, f"{OURS}.npy"))))
            for name in found
        }
    if differing.get(PIL):
        raise SystemExit(f"{differing[PIL]} pixel values differ from those of transformers' PIL processor.")
    rates = {
        name: {threads: [run["images_per_second"][threads] for run in runs] for threads in ("1", "2")}
        for name, runs in found.items()
    }
    result: dict[str, Any] = {
        "description": f"JPEG files of {WIDTH}x{HEIGHT} to pixel values of 224x224",
        "machine": describe_machine(("pillow", "torch", "torchvision", "transformers")),
        "images": arguments.images,
        "rounds": arguments.rounds,
        "processors": {
            name: {
                "images_per_second": {threads: turns.spread(values) for threads, values in by_threads.items()},
                "ours_times_as_fast": {
                    threads: turns.spread(
                        [a / b for a, b in zip(rates[OURS][threads], by_threads[threads], strict=True)]
                    )
                    for threads in by_threads
                },
                "values_that_differ_from_ours": differing[name],
            }
            for name, by_threads in rates.items()
        },
        "two_threads_over_one": turns.spread([b / a for a, b in zip(*rates[OURS].values(), strict=True)]),
    }
    turns.write(arguments.out, result)
    print(f"{'images per second':28}{'one thread':>12}{'two':>8}{'speed of ours':>20}")
    for name, row in result["processors"].items():
        one, two = (row["images_per_second"][threads]["median"] for threads in ("1", "2"))
        print(f"{name:28}{one:12.0f}{two:8.0f}{row['ours_times_as_fast']['1']['median']:20.2f}")


if __name__ == "__main__":
    main()
