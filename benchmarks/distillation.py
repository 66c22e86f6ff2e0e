"""Measure how much a teacher improves a small student on a small training budget.

A student with two heads is trained from scratch on a subset of CIFAR-10, with and without a teacher. Without a
teacher, both heads learn the labels. Each pair of runs has the same seed, images, steps and augmentation. The
accuracies on the test half after the last epoch are compared.

    python benchmarks/distillation.py DATA --teacher DIR [--kind hard] [--epochs 8] [--share 0.2] [--out FILE]

DATA contains `train` and `test` with one folder per class. DIR is a model directory, such as the output of `levit-flax
finetune DATA --recipe small_images`.
"""

import argparse
import tempfile
from pathlib import Path

import levit_flax as lf
import turns
from levit_flax.evaluation import evaluate, read_data
from levit_flax.training import finetune, read_recipe
from machine import describe_machine
from peers import TINY

STUDENTS = {
    "small": {
        "image_size": 64,
        "hidden_sizes": [32, 64, 96],
        "num_attention_heads": [2, 4, 6],
        "depths": [2, 2, 2],
        "key_dim": [16, 16, 16],
    },
    "tiny": {key: value for key, value in TINY.items() if key != "num_labels"},
}


def main() -> None:
    """Train the students, then print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", choices=list(STUDENTS), default="small")
    parser.add_argument("--kind", choices=("hard", "soft"), default="hard")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.2, help="fraction of the training images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "distillation.json")
    arguments = parser.parse_args()

    every = round(1 / arguments.share)
    files = sorted((arguments.data / "train").glob("*/*"))
    skip = {path.relative_to(arguments.data).as_posix() for i, path in enumerate(files) if i % every}
    teacher = lf.ImageClassifier.from_pretrained(arguments.teacher, batch_size=64)
    teacher_top1 = evaluate(teacher, read_data(arguments.data / "test", teacher.model.config.id2label)).top1
    print(f"teacher: top-1 {teacher_top1:.2%}")

    accuracies: dict[str, list[float]] = {"none": [], arguments.kind: []}
    for seed in range(arguments.seeds):
        for kind, top1 in accuracies.items():
            recipe = read_recipe(
                "small_images",
                architecture=STUDENTS[arguments.student],
                epochs=arguments.epochs,
                warmup_epochs=arguments.epochs / 8,
                seed=seed,
                distillation=kind,
                checkpoint_every=arguments.epochs,
            )
            with tempfile.TemporaryDirectory() as run:
                report = finetune(
                    arguments.data,
                    run,
                    recipe=recipe,
                    teacher=None if kind == "none" else arguments.teacher,
                    skip=skip,
                )
            top1.append(report["last"]["validation_accuracy"])
            print(f"seed {seed}  {kind:5} top-1 {top1[-1]:.2%}", flush=True)
    alone, taught = accuracies.values()
    gains = [with_teacher - without for without, with_teacher in zip(alone, taught, strict=True)]
    result = {
        "description": "top-1 accuracy on CIFAR-10 of a student trained from scratch, without and with a teacher",
        "machine": describe_machine(("optax", "grain")),
        "teacher_top1": teacher_top1,
        "student": STUDENTS[arguments.student],
        "training_images": len(files) - len(skip),
        "epochs": arguments.epochs,
        "top1": accuracies,
        "gain": turns.spread(gains),
    }
    turns.write(arguments.out, result)
    gain = result["gain"]
    print(f"gain: {gain['median']:+.2%} ({gain['least']:+.2%} to {gain['most']:+.2%})")


if __name__ == "__main__":
    main()
