"""What another image size, and computing in a narrower type, cost the embedded model's accuracy.

The model was trained at 80 pixels. It is evaluated as it is at 25 % below and above (`resize_image`, no fine-tuning),
and in bfloat16 and float16 against float32. The pictures are the test half that its card speaks of.

    python benchmarks/accuracy.py DATA [--out FILE]     # DATA/test holds a folder for each class of CIFAR-10
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import levit_flax as lf
from levit_flax.evaluation import evaluate, read_data
from machine import describe_machine

SIZES = (60, 80, 100)
DTYPES = ("float32", "bfloat16", "float16")
BATCH = 64


def main() -> None:
    """Evaluate, print, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy.json")
    arguments = parser.parse_args()
    loaded = lf.ImageClassifier.from_pretrained("cifar10")
    data = read_data(arguments.data / "test", loaded.model.config.id2label)
    result = {
        "what": "the embedded model at other image sizes and in other types",
        "pictures": len(data.labels),
        "machine": describe_machine(),
        "image_sizes": {},
        "types": {},
    }
    for size in SIZES:
        classifier = lf.ImageClassifier.from_pretrained("cifar10", image_size=size, batch_size=BATCH)
        found = evaluate(classifier, data)
        result["image_sizes"][size] = {"top1": found.top1, "top5": found.top5, "loss": found.loss}
        print(f"{size:4} pixels  top-1 {found.top1:.2%}")
    reference = None
    for name in DTYPES:
        model = loaded.model.clone(dtype=jnp.dtype(name))
        classifier = lf.ImageClassifier(model, loaded.variables, loaded.processor, BATCH)
        named = np.array([logits.argmax() for logits in classifier.stream_logits(data.images)])
        reference = named if reference is None else reference
        agreement = float((named == reference).mean())
        result["types"][name] = {
            "top1": float((named == np.array(data.labels)).mean()),
            "agreement_with_float32": agreement,
        }
        print(f"{name:9}  top-1 {result['types'][name]['top1']:.2%}  agrees with float32 on {agreement:.2%}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
