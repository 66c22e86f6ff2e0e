"""What `levit-flax demo` shows: the whole way from a PyTorch checkpoint to a named photograph, on this machine."""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from .checkpoint import save_pretrained
from .classifier import ImageClassifier
from .hub import EMBEDDED_DIRECTORY
from .loading import load_processor

# Photographs that come with scikit-image, and the class that each belongs to; None where the model knows none for it.
PHOTOGRAPHS = (
    ("chelsea", "cat"),
    ("rocket", None),
    ("coffee", None),
    ("astronaut", None),
)
SPEED_BATCH = 32
SPEED_SECONDS = 3.0


def run_demo() -> None:
    """Convert, verify, save, load, classify and time the embedded model, printing each step.

    Raises:
        ImportError: scikit-image, which brings the photographs, is not installed.
        ValueError: the converted model does not compute what PyTorch computed.
    """
    try:
        from skimage import data
    except ImportError:
        raise ImportError("The demo needs scikit-image's photographs: pip install 'levit-flax[demo]'.") from None
    from levit_flax.convert import conversion, sources, verification

    print(f"1. Convert the PyTorch checkpoint {EMBEDDED_DIRECTORY / 'model.safetensors'}")
    start = time.perf_counter()
    converted = conversion.convert(sources.open_source(EMBEDDED_DIRECTORY))
    print(
        f"   {type(converted.model).__name__}: {len(converted.rows)} tensors mapped,"
        f" {converted.num_parameters:,} parameters, {time.perf_counter() - start:.2f} s"
    )

    print("2. Verify it against the logits that PyTorch computed")
    with np.load(EMBEDDED_DIRECTORY / "probe.npz") as probe:
        comparison = verification.compare(
            verification.forward(converted.model, converted.variables, probe["pixel_values"]), probe["logits"]
        )
    if not comparison.passed:
        raise ValueError(
            f"The logits differ by {comparison.relative:.1e} of the largest: the conversion is wrong here."
        )
    print(f"   largest difference {comparison.absolute:.1e}, {comparison.relative:.1e} of the largest logit")

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "levit"
        processor = load_processor(EMBEDDED_DIRECTORY, converted.model.config)
        save_pretrained(directory, converted.model, converted.variables, processor, provenance=converted.provenance)
        classifier = ImageClassifier.from_pretrained(directory, batch_size=SPEED_BATCH)
    print(f"3. Save it, load it again, and name photographs; it knows {', '.join(classifier.model.config.id2label)}")
    for name, expected in PHOTOGRAPHS:
        [[first, second, *_]] = classifier(getattr(data, name)())
        if expected is None:
            verdict = "none of its classes"
        else:
            verdict = "right" if first["label"] == expected else f"WRONG, it is a {expected}"
        named = f"{first['label']} {first['score']:.0%}, then {second['label']} {second['score']:.0%}"
        print(f"   {name:10} {named}  ({verdict})")

    print("4. Measure it")
    print(f"   {measure(classifier):.0f} images a second in batches of {SPEED_BATCH} on {jax.devices()[0].device_kind}")


def measure(classifier: ImageClassifier) -> float:
    """Return prepared images classified a second, after a first call that compiles."""
    config = classifier.model.config
    pixels = np.zeros((SPEED_BATCH, *config.image_height_width, config.num_channels), np.uint8)
    classifier.logits(pixels)
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < SPEED_SECONDS:
        classifier.logits(pixels)
        calls += 1
    return calls * SPEED_BATCH / elapsed
