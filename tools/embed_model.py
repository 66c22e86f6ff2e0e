r"""Install a trained model as the embedded model `cifar10`, with its metrics.

The model is trained by `levit-flax finetune` and exported as a PyTorch checkpoint, which transformers loads, measures
and stores as float16. The reports and metrics of the training runs are written to `benchmarks/results/cifar10.json`,
from which `benchmarks/plot.py` draws the curves.

    levit-flax finetune cifar10 --recipe small_images --output 1
    levit-flax finetune cifar10 --recipe small_images_finish --model 1/model --output 2
    levit-flax finetune cifar10 --recipe small_images_finish --model 2/model --output 3 --set image_size=144 \
        --set epochs=1 --set warmup_epochs=0.1 --set learning_rate=4e-4 --export-torch hf
    python tools/embed_model.py cifar10 1 2 3
    python benchmarks/plot.py

The directory `cifar10` contains `train` and `test` with one folder per class. Requires `pip install -e '.[test]'`
(torch, transformers).
"""

import argparse
import csv
import json
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
    """Return the embedded model's top-1 accuracy in transformers and the image count."""
    model, processor = load(OUT), LevitImageProcessorPil.from_pretrained(OUT)
    files = sorted((data / "test").glob("*/*.jpg"))
    hits = 0
    with torch.inference_mode():
        for i in range(0, len(files), BATCH):
            images = [Image.open(path).convert("RGB") for path in files[i : i + BATCH]]
            predicted = model(**processor(images, return_tensors="pt")).logits.argmax(1).tolist()
            expected = [model.config.label2id[path.parent.name] for path in files[i : i + BATCH]]
            hits += sum(map(int.__eq__, predicted, expected))
    return hits / len(files), len(files)


def write_probe() -> None:
    """Write random images and PyTorch's float32 logits for the demo to compare with."""
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


def write_results(runs: list[Path]) -> None:
    """Write the report of each run together with the rows of its metrics.csv."""
    reports = []
    for run in runs:
        report = json.loads((run / "report.json").read_text())
        del report["output"], report["model"]  # paths on this machine
        with (run / "metrics.csv").open(newline="") as file:
            report["history"] = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        reports.append(report)
    (RESULTS / "cifar10.json").write_text(json.dumps(reports, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", help="outputs of `levit-flax finetune`; the last one is embedded")
    arguments = parser.parse_args()

    trained = arguments.runs[-1] / "torch"
    model = load(trained)
    model.half().save_pretrained(OUT)
    LevitImageProcessorPil.from_pretrained(trained).save_pretrained(OUT)
    write_probe()
    accuracy, images = measure(arguments.data)
    result = {
        "data": "CIFAR-10, half of the test split",
        "images": images,
        "top1": round(accuracy, 4),
        "parameters": model.num_parameters(),
        "bytes": (OUT / "model.safetensors").stat().st_size,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    (OUT / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    write_results(arguments.runs)


if __name__ == "__main__":
    main()
