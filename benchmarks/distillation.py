"""What a teacher is worth to a small student on a short budget.

A student with two heads is trained from scratch on a share of CIFAR-10's training images, three times without a
teacher (both heads learn the labels) and three times with one, each with the same seeds, images, steps and
augmentation. What is compared is the accuracy on the test half after the last epoch.

    python benchmarks/distillation.py DATA --teacher DIR [--kind hard] [--epochs 8] [--share 0.2] [--out FILE]

DATA holds `train` and `test` with a folder for each class; DIR is a model directory, such as `levit-flax finetune DATA
--recipe small_images` makes.
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
    """Train the students, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", choices=list(STUDENTS), default="small")
    parser.add_argument("--kind", choices=("hard", "soft"), default="hard")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.2, help="of the training images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "distillation.json")
    arguments = parser.parse_args()

    every = round(1 / arguments.share)
    files = sorted((arguments.data / "train").glob("*/*"))
    skip = {path.relative_to(arguments.data).as_posix() for i, path in enumerate(files) if i % every}
    teacher = lf.ImageClassifier.from_pretrained(arguments.teacher, batch_size=64)
    taught_by = evaluate(teacher, read_data(arguments.data / "test", teacher.model.config.id2label)).top1
    print(f"teacher: top-1 {taught_by:.2%}")

    accuracies: dict[str, list[float]] = {"none": [], arguments.kind: []}
    for seed in range(arguments.seeds):
        for kind, found in accuracies.items():
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
            found.append(report["last"]["validation_accuracy"])
            print(f"seed {seed}  {kind:5} top-1 {found[-1]:.2%}", flush=True)
    alone, taught = accuracies.values()
    gains = [with_teacher - without for without, with_teacher in zip(alone, taught, strict=True)]
    result = {
        "what": "top-1 on CIFAR-10's test half of a student trained from scratch, without a teacher and with one",
        "machine": describe_machine(("optax", "grain")),
        "teacher_top1": taught_by,
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
