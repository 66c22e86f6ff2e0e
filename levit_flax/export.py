"""Export models to StableHLO or ONNX, to run without this library."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .arguments import _check_types
from .choices import _KNOWN_PLATFORMS
from .datasets import LabeledImages
from .files import _check_free, _staged_directory
from .image_processing import LevitImageProcessor
from .inference import _prepare
from .modeling import LevitBase, Variables
from .onnx_export import to_onnx
from .quantization import _quantize_and_measure
from .runtimes import _RUNTIMES, _import

_STABLEHLO_FILE = "model.stablehlo"
_ONNX_FILE = "model.onnx"
_OPENVINO_FILE = "model.xml"
_OPENVINO_WEIGHTS_FILE = "model.bin"
_ABOUT_FILE = "model.json"
_README_FILE = "README.md"
_OWN_FILES = (
    *(_STABLEHLO_FILE, _ONNX_FILE, _OPENVINO_FILE, _OPENVINO_WEIGHTS_FILE),
    *(_ABOUT_FILE, _README_FILE),
)

_RUN_STABLEHLO = """\
# {name}

A LeViT classifier as StableHLO, for {platforms}. It requires only `jax` and `flatbuffers`:

```python
from pathlib import Path

import jax.export

model = jax.export.deserialize(bytearray(Path("{file}").read_bytes()))
logits = model.call(pixel_values)  # float32 {shape} -> float32 [B {classes}]
```

`{about}` contains the class names (`labels`) and the preprocessing of images (`preprocessing`, as in transformers).
"""

_RUN_ONNX = """\
# {name}

A LeViT classifier as ONNX. It requires only `onnxruntime`:

```python
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
[logits] = session.run(None, {{"pixel_values": pixel_values}})  # float32 {shape} -> float32 [B {classes}]
```

`{about}` contains the class names (`labels`) and the preprocessing of images (`preprocessing`, as in transformers).
"""

_RUN_OPENVINO = """\
# {name}

A LeViT classifier for OpenVINO. It requires only `openvino`:

```python
import openvino

model = openvino.Core().compile_model("{file}", "CPU")
logits = model(pixel_values)[0]  # float32 {shape} -> float32 [B {classes}]
```

OpenVINO is faster if it is compiled for one batch size: read the model with `openvino.Core().read_model`, call its
`reshape` and compile the result. `{about}` contains the class names (`labels`) and the preprocessing of images
(`preprocessing`, as in transformers).
"""

_ABOUT_INT8 = """
The weights and most activations are int8, calibrated with {calibration_images} images. On {held_out_images} other
images, the top-1 accuracy is {top1_int8:.2%}; before quantization it was {top1_float32:.2%}. int8 is meant for CPUs
that multiply it natively (AVX-512 VNNI, AVX-VNNI or AMX).
"""

# For each format, the name of the artifact and the text of its README.
_FORMATS = {
    "stablehlo": (_STABLEHLO_FILE, _RUN_STABLEHLO),
    "onnx": (_ONNX_FILE, _RUN_ONNX),
    "openvino": (_OPENVINO_FILE, _RUN_OPENVINO),
}


@_check_types
def export_model(
    directory: str | Path,
    model: LevitBase,
    variables: Variables,
    processor: LevitImageProcessor,
    *,
    format: str = "stablehlo",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    overwrite: bool = False,
    calibration: LabeledImages | None = None,
    max_drop: float = 1.0,
) -> None:
    """Write a classifier as an artifact that runs without this library.

    The artifact maps pixel values, float32 [B H W C] with any batch size B, to logits, float32 [B num_labels]. Heads
    are merged and batch norms are folded. `model.json` contains the class names and the preprocessing.

    Args:
        directory: the directory to write; it is created if it does not exist.
        model: a model with a classifier.
        variables: the variables of the model, which become constants of the artifact.
        processor: the processor whose settings are written to `model.json`.
        format: "stablehlo" (requires the extra `export`), "onnx" (requires the extra `onnx`) or "openvino" (requires
            the extra `openvino`).
        platforms: the platforms of a StableHLO artifact, from "cpu", "cuda", "tpu" and "rocm".
        overwrite: replace an artifact in a directory that is not empty.
        calibration: quantize an ONNX or OpenVINO artifact to int8 with these images, as returned by `read_data`; None
            keeps float32. At most half of them, and no more than 300, calibrate the ranges of activations. The accuracy
            before and after is measured on up to 2000 others.
        max_drop: largest accepted drop of the accuracy in percentage points.

    Raises:
        ValueError: the model has no classifier, the format or a platform is unknown, or the accuracy of the int8
            model drops by more than `max_drop`. Nothing is written.
        DataError: `calibration` has less than two images, or one cannot be used.
        ImportError: the package that the format requires is not installed.
        FileExistsError: the directory is not empty and `overwrite` is False.

    Examples:
        >>> import tempfile
        >>> from levit_flax import from_pretrained
        >>> processor = LevitImageProcessor.from_pretrained("cifar10")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_model(f"{folder}/out", *from_pretrained("cifar10"), processor, platforms=["cpu"])
        ...     sorted(path.name for path in Path(folder, "out").iterdir())
        ['README.md', 'model.json', 'model.stablehlo']
    """
    file, text = _check_format(format, platforms, calibration)
    _check_free(Path(directory), overwrite)
    model, variables = _prepare(model, variables)
    variables = jax.device_get(variables)  # the constants must not depend on a device
    config = model.config
    shape = [*config.image_height_width, config.num_channels]

    def classify(pixel_values: jax.Array) -> jax.Array:
        output: Any = model.apply(variables, pixel_values, return_dict=True)
        logits: jax.Array = output.logits.astype(jnp.float32)
        return logits

    runtime = {"onnx": "onnxruntime", "openvino": "openvino"}.get(format)
    # ONNX needs its runtime only for the measurement, and OpenVINO to write the artifact; found before the work.
    package = _import(runtime) if runtime and (format == "openvino" or calibration is not None) else None
    artifact = to_stablehlo(classify, shape, platforms) if runtime is None else to_onnx(classify, shape)
    quantization = None
    if calibration is not None and runtime is not None:
        build = partial(_RUNTIMES[runtime], package)
        artifact, quantization = _quantize_and_measure(artifact, calibration, processor, build, max_drop)
    about = {
        "model": type(model).__name__,
        "inputs": {"pixel_values": {"dtype": "float32", "shape": ["B", *shape]}},
        "outputs": {"logits": {"dtype": "float32", "shape": ["B", config.num_labels]}},
        "labels": list(config.id2label),
        "problem_type": config.problem_type,
        "preprocessing": processor.to_dict(),
        "quantization": quantization and asdict(quantization),
        "platforms": list(platforms) if format == "stablehlo" else None,
        "versions": {name: version(name) for name in ("levit-flax", "jax")},
    }
    facts = {
        "name": Path(directory).name,
        "platforms": ", ".join(platforms),
        "file": file,
        "shape": f"[B {' '.join(map(str, shape))}]",
        "classes": config.num_labels,
        "about": _ABOUT_FILE,
    }
    readme = text.format(**facts) + (_ABOUT_INT8.format(**asdict(quantization)) if quantization else "")
    with _staged_directory(Path(directory), overwrite, _OWN_FILES, _ABOUT_FILE) as staging:
        if format == "openvino":
            openvino: Any = package
            openvino.save_model(openvino.Core().read_model(artifact), staging / file, compress_to_fp16=False)
        else:
            (staging / file).write_bytes(artifact)
        (staging / _ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (staging / _README_FILE).write_text(readme, encoding="utf-8", errors="backslashreplace")


def _check_format(format: str, platforms: Sequence[str], calibration: LabeledImages | None) -> tuple[str, str]:
    """Return the entry of the format, or raise ValueError unless the arguments of `export_model` fit each other."""
    if format not in _FORMATS:
        raise ValueError(f"Unknown format: expected one of {', '.join(_FORMATS)}, found {format!r}.")
    unknown = [platform for platform in platforms if platform not in _KNOWN_PLATFORMS]
    if unknown or not platforms:
        raise ValueError(
            f"Unknown platforms: expected one or more of {', '.join(_KNOWN_PLATFORMS)}, found {unknown or 'none'}."
        )
    if calibration is not None and format == "stablehlo":
        raise ValueError("StableHLO artifacts cannot be quantized: expected the format onnx or openvino for int8.")
    return _FORMATS[format]


@_check_types
def to_stablehlo(classify: Any, shape: Sequence[int], platforms: Sequence[str]) -> bytes:
    """Serialize a function of pixel values with `jax.export`, for any batch size.

    Args:
        classify: a function of float32 [B H W C] that JAX can trace.
        shape: (H, W, C).
        platforms: as in `export_model`.

    Returns:
        The artifact, which `jax.export.deserialize` reads.

    Raises:
        ImportError: flatbuffers is not installed.

    Examples:
        >>> from jax import export
        >>> artifact = to_stablehlo(lambda pixel_values: pixel_values.mean((1, 2)), shape=(8, 8, 3), platforms=["cpu"])
        >>> export.deserialize(bytearray(artifact)).call(jnp.ones((5, 8, 8, 3))).shape
        (5, 3)
    """
    try:
        import flatbuffers  # noqa: F401  # jax.export imports it only after tracing
    except ImportError:
        raise ImportError(
            "Exporting StableHLO requires flatbuffers, which is not installed. Run: pip install 'levit-flax[export]'"
        ) from None
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    exported = export.export(jax.jit(classify), platforms=tuple(platforms))(
        jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    )
    return bytes(exported.serialize())
