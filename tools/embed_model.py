"""Put a trained model into the package as the one that ships with it, and write everything that ships beside it.

The model is trained by this package's own recipe and exported through its own converter; from there on it is a PyTorch
checkpoint like any other, which transformers opens, measures, and stores as float16. What the training reported goes to
`benchmarks/results/cifar10.json` and its curves beside it.

    levit-flax finetune cifar10 --recipe small_images --output run --export-torch hf
    python tools/embed_model.py run cifar10

`cifar10` holds `train` and `test` with a folder for each class. Needs `pip install -e '.[test]'` (torch, transformers).
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import LevitForImageClassificationWithTeacher, LevitImageProcessorPil

REPOSITORY = Path(__file__).parent.parent
OUT = REPOSITORY / "levit_flax" / "embedded"
RESULTS = REPOSITORY / "benchmarks" / "results"
PROBES = 4
BATCH = 250


def load(directory: Path) -> LevitForImageClassificationWithTeacher:
    return LevitForImageClassificationWithTeacher.from_pretrained(directory, dtype=torch.float32).eval()


def measure(data: Path) -> tuple[float, int]:
    """Return the shipped model's top-1 in [0, 1] on the test pictures by transformers alone, and their number."""
    model, processor = load(OUT), LevitImageProcessorPil.from_pretrained(OUT)
    files = sorted((data / "test").glob("*/*.jpg"))
    hits = 0
    with torch.inference_mode():
        for i in range(0, len(files), BATCH):
            pictures = [Image.open(path).convert("RGB") for path in files[i : i + BATCH]]
            named = model(**processor(pictures, return_tensors="pt")).logits.argmax(1).tolist()
            right = [model.config.label2id[path.parent.name] for path in files[i : i + BATCH]]
            hits += sum(map(int.__eq__, named, right))
    return hits / len(files), len(files)


def write_probe() -> None:
    """Store seeded pictures and PyTorch's logits for them, in float32, as the demo's proof of a right conversion."""
    model, processor = load(OUT), LevitImageProcessorPil.from_pretrained(OUT)
    size = model.config.image_size
    levels = np.random.default_rng(0).integers(0, 256, (PROBES, size, size, 3), dtype=np.uint8)
    inputs = processor(list(levels), return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    with torch.inference_mode():
        outputs = model(inputs)
    np.savez_compressed(
        OUT / "probe.npz",
        pixel_values=inputs.permute(0, 2, 3, 1).numpy().astype(np.float32),
        logits=outputs.logits.numpy(),
        cls_logits=outputs.cls_logits.numpy(),
        distillation_logits=outputs.distillation_logits.numpy(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output of `levit-flax finetune --export-torch hf`")
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()

    trained = arguments.run / "torch"
    model = load(trained)
    model.half().save_pretrained(OUT)
    LevitImageProcessorPil.from_pretrained(trained).save_pretrained(OUT)
    write_probe()
    accuracy, pictures = measure(arguments.data)
    result = {
        "data": "CIFAR-10, half of the test split",
        "pictures": pictures,
        "top1": round(accuracy, 4),
        "parameters": model.num_parameters(),
        "bytes": (OUT / "model.safetensors").stat().st_size,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    (OUT / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    shutil.copy(arguments.run / "report.json", RESULTS / "cifar10.json")
    shutil.copy(arguments.run / "curves.png", RESULTS / "cifar10.png")


if __name__ == "__main__":
    main()
