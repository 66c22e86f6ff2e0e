"""Measure int8 artifacts: their speed in OpenVINO and onnxruntime, and the accuracy of the embedded model.

    python benchmarks/int8.py [--data DIR] [--variants levit-128S ...] [--batches 1 16] [--rounds 30] [--out FILE]

DIR contains one folder of CIFAR-10 images per class; without it, only the speed is measured, with random weights. The
float32 and the int8 model run in turns in one process. The ratio is the time of int8 divided by that of float32.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import turns
from forward import VARIANTS
from machine import describe_machine
from peers import use_jax_on, write_models

RUNTIMES = ("openvino", "onnxruntime")


def quantize(directory: Path) -> tuple[bytes, bytes, tuple[int, ...]]:
    """Return a variant as ONNX in float32 and in int8, and the shape of an image."""
    import jax

    import levit_flax as lf
    from levit_flax.datasets import LabeledImages
    from levit_flax.inference import _prepare
    from levit_flax.onnx_export import to_onnx
    from levit_flax.quantization import _quantize

    model, variables = _prepare(*lf.from_pretrained(directory / "flax"))
    variables = jax.device_get(variables)
    height, width = model.config.image_height_width
    artifact = to_onnx(lambda pixels: model.apply(variables, pixels).logits, (height, width, 3))
    noise = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), np.uint8)
    data = LabeledImages(list(noise), np.zeros(len(noise), np.int32))
    return artifact, _quantize(artifact, data, lf.LevitImageProcessor(crop_size=(height, width))), (height, width, 3)


def measure(programs: dict[str, Callable[[Any], Any]], pixels: np.ndarray, rounds: int) -> dict[str, Any]:
    """Return the times of the float32 and the int8 model, in turns."""
    milliseconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            program(pixels)  # its weights and working memory into the caches
            begin = time.perf_counter()
            program(pixels)
            milliseconds[name].append(1000 * (time.perf_counter() - begin))
    ratios = [int8 / float32 for float32, int8 in zip(*milliseconds.values(), strict=True)]
    return {**{name: turns.spread(times) for name, times in milliseconds.items()}, "ratio": turns.spread(ratios)}


def speed(variant: str, batches: list[int], rounds: int) -> dict[str, Any]:
    """Return the times of a variant by runtime and batch size."""
    from levit_flax.runtimes import _RUNTIMES, _import

    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), variant)
        *artifacts, shape = quantize(Path(folder))
    found: dict[str, Any] = {}
    for runtime in RUNTIMES:
        build = [_RUNTIMES[runtime](_import(runtime), artifact) for artifact in artifacts]
        found[runtime] = {}
        for batch in batches:
            pixels = np.random.default_rng(1).standard_normal((batch, *shape), np.float32)
            programs = {name: each(pixels.shape) for name, each in zip(("float32", "int8"), build, strict=True)}
            found[runtime][batch] = measure(programs, pixels, rounds)
            print(
                f"{variant}, {runtime}, batch size {batch}: {found[runtime][batch]['ratio']['median']:.2f}", flush=True
            )
    return found


def accuracy(data: Path) -> dict[str, Any]:
    """Return what the embedded model loses, by runtime."""
    import json

    import levit_flax as lf
    from levit_flax.evaluation import read_data
    from levit_flax.export import export_model

    model, variables = lf.from_pretrained("cifar10")
    images = read_data(data, model.config.id2label)
    processor = lf.LevitImageProcessor.from_pretrained("cifar10")
    found = {}
    for runtime, format in (("openvino", "openvino"), ("onnxruntime", "onnx")):
        with tempfile.TemporaryDirectory() as folder:
            export_model(f"{folder}/out", model, variables, processor, format=format, calibration=images)
            about = json.loads(Path(folder, "out", "model.json").read_text(encoding="utf-8"))
        found[runtime] = about["quantization"]
        print(f"embedded model in {runtime}: {found[runtime]}")
    return found


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "int8.json")
    arguments = parser.parse_args()
    use_jax_on("cpu")
    warnings.simplefilter("ignore")  # the exporters' own
    turns.write(
        arguments.out,
        {
            "machine": describe_machine(RUNTIMES),
            "accuracy": accuracy(arguments.data) if arguments.data else None,
            "speed": {variant: speed(variant, arguments.batches, arguments.rounds) for variant in arguments.variants},
        },
    )


if __name__ == "__main__":
    main()
