"""How long it takes from nothing to the first answer, by part, with and without a compilation cache.

    python benchmarks/startup.py [--variant levit-128S] [--rounds 5] [--out FILE]

Needs `pip install -e '.[bench]'` (torch, transformers).
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import turns
from machine import describe_machine
from peers import write_models

OURS, THEIRS = "levit-flax", "transformers"
PARTS = ("import", "load", "first answer", "second answer")


def work_ours(directory: Path) -> list[float]:
    """Return the time at the end of each part."""
    from PIL import Image

    import levit_flax as lf

    moments = [time.perf_counter()]
    classifier = lf.ImageClassifier.from_pretrained(directory / "flax")
    moments.append(time.perf_counter())
    size = classifier.model.config.image_height_width[0]
    for _ in range(2):
        classifier(Image.new("RGB", (size, size)))
        moments.append(time.perf_counter())
    return moments


def work_theirs(directory: Path) -> list[float]:
    """Return the time at the end of each part."""
    import torch
    from PIL import Image
    from transformers import LevitForImageClassificationWithTeacher, LevitImageProcessor

    moments = [time.perf_counter()]
    model = LevitForImageClassificationWithTeacher.from_pretrained(directory / "hf").eval()
    processor = LevitImageProcessor.from_pretrained(directory / "hf")
    moments.append(time.perf_counter())
    size = model.config.image_size
    for _ in range(2):
        with torch.inference_mode():
            model(**processor(Image.new("RGB", (size, size)), return_tensors="pt")).logits.softmax(-1)
        moments.append(time.perf_counter())
    return moments


def main() -> None:
    """Measure, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="levit-128S", help="a published one, or tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    parser.add_argument("--worker", choices=[OURS, THEIRS], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        begin = time.perf_counter()
        work = work_ours if arguments.worker == OURS else work_theirs
        moments = [begin, *work(arguments.directory)]
        turns.answer(dict(zip(PARTS, (b - a for a, b in pairwise(moments)), strict=True)))
        return

    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), arguments.variant)
        cache = {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        ours, theirs = (["--worker", name, "--directory", folder] for name in (OURS, THEIRS))
        turns.run(__file__, *ours, **cache)  # fills the cache
        for _ in range(arguments.rounds):
            found.setdefault(f"{OURS}, compiling", []).append(turns.run(__file__, *ours))
            found.setdefault(f"{OURS}, from the cache", []).append(turns.run(__file__, *ours, **cache))
            result = turns.run(__file__, *theirs)
            if "missing" not in result:
                found.setdefault(THEIRS, []).append(result)
    rows = {
        name: {
            **{part: turns.spread([run[part] for run in runs]) for part in PARTS},
            "to the first answer": turns.spread([sum(run[part] for part in PARTS[:3]) for run in runs]),
        }
        for name, runs in found.items()
    }
    turns.write(
        arguments.out,
        {
            "what": "seconds from the start of the script to an answer, in a new process",
            "machine": describe_machine(("torch", "transformers")),
            "variant": arguments.variant,
            "rounds": arguments.rounds,
            "seconds": rows,
        },
    )
    columns = (*PARTS, "to the first answer")
    print(f"{'seconds':28}", *(f"{column:>20}" for column in columns))
    for name, row in rows.items():
        print(f"{name:28}", *(f"{row[column]['median']:20.2f}" for column in columns))


if __name__ == "__main__":
    main()
