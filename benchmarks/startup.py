"""Measure the time from process start to the first prediction.

levit-flax is measured with and without the compilation cache that its command line uses. The scores of the predictions
are compared after the measurement.

    python benchmarks/startup.py [--variant levit-128S] [--rounds 5] [--out FILE]

Requires `pip install -e '.[bench]'` (torch, transformers).
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import turns
from machine import describe_machine
from peers import write_models

OURS, THEIRS = "levit-flax", "transformers"
PARTS = ("import", "load", "compile", "first answer", "second answer")
TO_THE_FIRST_ANSWER = PARTS[:4]
TOLERANCE = 1e-3  # relative, of the scores
TOP = 3


def work_ours(directory: Path) -> tuple[list[float], float, list[float]]:
    """Return the end time of each part, the compile time and the scores."""
    import jax
    from PIL import Image

    import levit_flax as lf

    compiling: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            compiling.append(seconds)

    moments = [time.perf_counter()]
    classifier = lf.ImageClassifier.from_pretrained(directory / "flax", fast_start=True)  # as `levit-flax classify`
    moments.append(time.perf_counter())
    size = classifier.model.config.image_height_width[0]
    jax.monitoring.register_event_duration_secs_listener(listen)
    answer = classifier(Image.new("RGB", (size, size)), top_k=TOP)
    moments.append(time.perf_counter())
    compiled = sum(compiling)
    classifier(Image.new("RGB", (size, size)))
    moments.append(time.perf_counter())
    return moments, compiled, [entry["score"] for entry in answer]


def work_theirs(directory: Path) -> tuple[list[float], float, list[float]]:
    """Return the end time of each part, a compile time of 0 and the scores."""
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
            scores = model(**processor(Image.new("RGB", (size, size)), return_tensors="pt")).logits.softmax(-1)
        moments.append(time.perf_counter())
    return moments, 0.0, scores[0].topk(TOP).values.tolist()


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one library in this process."""
    begin = time.perf_counter()
    moments, compiling, scores = (work_ours if arguments.worker == OURS else work_theirs)(arguments.directory)
    importing, loading, first, second = (b - a for a, b in pairwise([begin, *moments]))
    seconds = dict(zip(PARTS, (importing, loading, compiling, first - compiling, second), strict=True))
    return {"seconds": seconds, "scores": scores}


def main() -> None:
    """Measure, then print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="levit-128S", help="a published variant, or tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    parser.add_argument("--worker", choices=[OURS, THEIRS], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        turns.answer(lambda: work(arguments))
        return

    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), arguments.variant)
        cache = {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        ours, theirs = (["--worker", name, "--directory", folder] for name in (OURS, THEIRS))
        commands = {
            f"{OURS}, compiling": (ours, {}),
            f"{OURS}, from the cache": (ours, cache),
            THEIRS: (theirs, {}),
        }
        turns.run(__file__, *ours, **cache)  # fills the cache
        for _ in range(arguments.rounds):
            for name, (command, environment) in commands.items():
                for answered, runs in turns.in_turns(__file__, {name: command}, 1, **environment).items():
                    found.setdefault(answered, []).extend(runs)
        turns.require(found, *list(commands)[:2])
    for runs in found.values():
        np.testing.assert_allclose(runs[0]["scores"], found[f"{OURS}, compiling"][0]["scores"], rtol=TOLERANCE)
    rows = {
        name: {
            **{part: turns.spread([run["seconds"][part] for run in runs]) for part in PARTS},
            "to the first answer": turns.spread(
                [sum(run["seconds"][part] for part in TO_THE_FIRST_ANSWER) for run in runs]
            ),
        }
        for name, runs in found.items()
    }
    turns.write(
        arguments.out,
        {
            "description": "seconds from the first import to a prediction, in a new process",
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
