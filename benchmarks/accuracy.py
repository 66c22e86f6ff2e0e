"""Measure the embedded model's accuracy at other image sizes and dtypes.

The model is evaluated at 75% and 125% of the image size that it was trained at: once after `resize_image`, and
once after an epoch of fine-tuning at the new size. It is also evaluated in bfloat16 and float16 and compared with
float32. The images are the half of CIFAR-10's test split that the model card describes.

    python benchmarks/accuracy.py DATA [--out FILE]     # DATA/train and DATA/test have one folder per class

Requires `pip install -e '.[train]'`.
"""

import argparse
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import levit_flax as lf
import turns
from levit_flax.evaluation import evaluate, read_data
from levit_flax.training import finetune, read_recipe
from machine import describe_machine

SHARES = (0.75, 1.0, 1.25)  # of the image size that the model was trained at
DTYPES = ("float32", "bfloat16", "float16")
BATCH = 64
WARM_UP, LEARNING_RATE = 0.1, 3e-4  # low, because the model only has to adapt to other token distances


def main() -> None:
    """Evaluate, then print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy.json")
    parser.add_argument(
        "--epochs", type=int, default=1, help="epochs of fine-tuning at the other image sizes; 0 skips it"
    )
    arguments = parser.parse_args()
    loaded = lf.ImageClassifier.from_pretrained("cifar10")
    data = read_data(arguments.data / "test", loaded.model.config.id2label)
    own = loaded.model.config.image_size
    result = {
        "description": "accuracy of the embedded model at other image sizes and in other dtypes",
        "images": len(data),
        "machine": describe_machine(("optax", "grain")),
        "image_size": own,
        "image_sizes": {},
        "types": {},
    }
    for share in SHARES:
        size = round(own * share)
        classifier = lf.ImageClassifier.from_pretrained("cifar10", image_size=size, batch_size=BATCH)
        evaluation = evaluate(classifier, data)
        row = {"top1": evaluation.top1, "top5": evaluation.top5, "loss": evaluation.loss}
        print(f"{size:4} pixels  top-1 {evaluation.top1:.2%}", flush=True)
        if size != own and arguments.epochs:
            recipe = read_recipe(
                "small_images_finish",
                image_size=size,
                epochs=arguments.epochs,
                warmup_epochs=WARM_UP * arguments.epochs,
                learning_rate=LEARNING_RATE,
            )
            with tempfile.TemporaryDirectory() as run:
                report = finetune(arguments.data, run, model="cifar10", recipe=recipe)
            row["fine_tuned"] = {"epochs": arguments.epochs, "top1": report["last"]["validation_accuracy"]}
            print(f"{'':13}fine-tuned at this size {row['fine_tuned']['top1']:.2%}", flush=True)
        result["image_sizes"][size] = row
    reference = None
    for name in DTYPES:
        model = loaded.model.clone(dtype=jnp.dtype(name))
        classifier = lf.ImageClassifier(model, loaded.variables, loaded.processor, BATCH)
        predicted = np.array([logits.argmax() for logits in classifier.stream_logits(data.images)])
        reference = predicted if reference is None else reference
        agreement = float((predicted == reference).mean())
        result["types"][name] = {
            "top1": float((predicted == data.targets).mean()),
            "agreement_with_float32": agreement,
        }
        print(f"{name:9}  top-1 {result['types'][name]['top1']:.2%}  agrees with float32 on {agreement:.2%}")
    turns.write(arguments.out, result)


if __name__ == "__main__":
    main()
