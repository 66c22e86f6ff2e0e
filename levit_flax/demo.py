"""Demonstrate the library on the embedded model: convert, verify, classify, time."""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from .checkpoint import save_pretrained
from .classifier import ImageClassifier
from .hub import _EMBEDDED_DIRECTORY
from .loading import _load_processor

# Photographs in scikit-image with their class, or None if the model has no such class.
_PHOTOGRAPHS = (
    ("chelsea", "cat"),
    ("rocket", None),
    ("coffee", None),
    ("astronaut", None),
)
_SPEED_BATCH = 32
_SPEED_SECONDS = 3.0


def _run_demo() -> None:
    """Convert, verify, save, load and time the model in the package, classify photographs, and print each step."""
    try:
        from skimage import data
    except ImportError:
        raise ImportError(
            "The demo requires scikit-image, which is not installed. Run: pip install 'levit-flax[demo]'"
        ) from None
    from levit_flax.convert import conversion, sources, verification

    print(f"1. Convert the PyTorch checkpoint {_EMBEDDED_DIRECTORY / 'model.safetensors'}")
    start = time.perf_counter()
    converted = conversion._convert(sources._open_source(_EMBEDDED_DIRECTORY))
    print(
        f"   {type(converted.model).__name__}: {len(converted.rows)} tensors mapped,"
        f" {converted.num_parameters:,} parameters, {time.perf_counter() - start:.2f} s"
    )

    print("2. Compare with the logits that PyTorch computed")
    with np.load(_EMBEDDED_DIRECTORY / "probe.npz") as probe:
        comparison = verification._compare(
            verification._forward(converted.model, converted.variables, probe["pixel_values"]), probe["logits"]
        )
    if not comparison.passed:
        raise ValueError(
            f"The conversion is wrong: expected the logits of PyTorch, found a difference of {comparison.relative:.1e}"
            " of the largest logit."
        )
    print(f"   largest difference {comparison.absolute:.1e}, {comparison.relative:.1e} of the largest logit")

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "levit"
        processor = _load_processor(_EMBEDDED_DIRECTORY, converted.model.config)
        save_pretrained(directory, converted.model, converted.variables, processor, provenance=converted.provenance)
        classifier = ImageClassifier.from_pretrained(directory, batch_size=_SPEED_BATCH)
    print(f"3. Save, load and classify photographs. The classes are {', '.join(classifier.model.config.id2label)}")
    for name, expected in _PHOTOGRAPHS:
        first, second, *_ = classifier(getattr(data, name)())
        if expected is None:
            verdict = "not one of its classes"
        else:
            verdict = "correct" if first["label"] == expected else f"WRONG, expected {expected}"
        prediction = f"{first['label']} {first['score']:.0%}, then {second['label']} {second['score']:.0%}"
        print(f"   {name:10} {prediction}  ({verdict})")

    print("4. Measure the speed")
    print(f"   {_measure(classifier):.0f} images/s in batches of {_SPEED_BATCH} on {jax.devices()[0].device_kind}")


def _measure(classifier: ImageClassifier) -> float:
    """Return the number of images classified per second, excluding preprocessing and compilation."""
    config = classifier.model.config
    pixels = np.zeros((_SPEED_BATCH, *config.image_height_width, config.num_channels), np.uint8)
    classifier.logits(pixels)
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < _SPEED_SECONDS:
        classifier.logits(pixels)
        calls += 1
    return calls * _SPEED_BATCH / elapsed
