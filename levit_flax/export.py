"""Models that run without this library: StableHLO through `jax.export`, or ONNX."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .choices import PLATFORMS, ExportFormat
from .files import staged_directory
from .image_processing import LevitImageProcessor
from .inference import prepare
from .modeling import LevitBase, Variables

STABLEHLO_FILE = "model.stablehlo"
ONNX_FILE = "model.onnx"
ABOUT_FILE = "model.json"
README_FILE = "README.md"
OWN_FILES = (STABLEHLO_FILE, ONNX_FILE, ABOUT_FILE, README_FILE)

KNOWN_PLATFORMS = (*PLATFORMS, "rocm")

RUN_STABLEHLO = """\
# {name}

A LeViT classifier as StableHLO, for {platforms}. It needs `jax` and `flatbuffers`, and nothing else:

```python
from pathlib import Path

import jax.export

model = jax.export.deserialize(bytearray(Path("{file}").read_bytes()))
logits = model.call(pixel_values)  # float32 {shape} -> float32 [B {classes}]
```

`{about}` holds the class names (`labels`) and how images become pixel values (`preprocessing`, as in transformers).
"""

RUN_ONNX = """\
# {name}

A LeViT classifier as ONNX. It needs `onnxruntime`, and nothing else:

```python
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
[logits] = session.run(None, {{"pixel_values": pixel_values}})  # float32 {shape} -> float32 [B {classes}]
```

`{about}` holds the class names (`labels`) and how images become pixel values (`preprocessing`, as in transformers).
"""


# The name of the artifact, and the README beside it.
FORMATS: dict[ExportFormat, tuple[str, str]] = {
    "stablehlo": (STABLEHLO_FILE, RUN_STABLEHLO),
    "onnx": (ONNX_FILE, RUN_ONNX),
}


def export_model(
    directory: str | Path,
    model: LevitBase,
    variables: Variables,
    processor: LevitImageProcessor,
    *,
    format: str = "stablehlo",
    platforms: Sequence[str] = PLATFORMS,
    overwrite: bool = False,
) -> None:
    """Write a classifier as an artifact that runs without this library.

    Heads are merged and batch norms folded first. The artifact maps pixel values, float32 [B H W C] with any B, to
    logits, float32 [B num_labels]; class names and preprocessing lie beside it.

    Args:
        directory: where to; made if it does not exist.
        model: a model with a classifier.
        variables: its variables, which become constants of the artifact.
        processor: its settings are written beside the artifact.
        format: "stablehlo", or "onnx" (needs the extra of that name).
        platforms: where a StableHLO artifact shall run, from "cpu", "cuda", "rocm" and "tpu".
        overwrite: replace the content of a directory that is there.

    Raises:
        ValueError: the model has no classifier, or there is no such format or platform.
        ImportError: the format's package is not installed.
        FileExistsError: the directory has content and `overwrite` is False.

    Example:
        >>> import tempfile
        >>> from levit_flax import from_pretrained
        >>> processor = LevitImageProcessor.from_pretrained("cifar10")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_model(f"{folder}/out", *from_pretrained("cifar10"), processor, platforms=["cpu"])
        ...     sorted(path.name for path in Path(folder, "out").iterdir())
        ['README.md', 'model.json', 'model.stablehlo']
    """
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}: the formats are {', '.join(FORMATS)}.")
    foreign = [platform for platform in platforms if platform not in KNOWN_PLATFORMS]
    if foreign or not platforms:
        raise ValueError(f"There is no platform {foreign}: expected some of {', '.join(KNOWN_PLATFORMS)}.")
    model, variables = prepare(model, variables)
    variables = jax.device_get(variables)  # constants of the artifact, bound to no device
    config = model.config
    shape = [*config.image_height_width, config.num_channels]

    def classify(pixel_values: jax.Array) -> jax.Array:
        output: Any = model.apply(variables, pixel_values)
        return output.logits.astype(jnp.float32)

    artifact = to_stablehlo(classify, shape, platforms) if format == "stablehlo" else to_onnx(classify, shape)
    file, text = FORMATS[format]
    about = {
        "model": type(model).__name__,
        "inputs": {"pixel_values": {"dtype": "float32", "shape": ["B", *shape]}},
        "outputs": {"logits": {"dtype": "float32", "shape": ["B", config.num_labels]}},
        "labels": list(config.id2label),
        "problem_type": config.problem_type,
        "preprocessing": processor.to_dict(),
        "platforms": list(platforms) if format == "stablehlo" else None,
        "versions": {name: version(name) for name in ("levit-flax", "jax")},
    }
    with staged_directory(Path(directory), overwrite, OWN_FILES) as staging:
        (staging / file).write_bytes(artifact)
        (staging / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (staging / README_FILE).write_text(
            text.format(
                name=Path(directory).name,
                platforms=", ".join(platforms),
                file=file,
                shape=f"[B {' '.join(map(str, shape))}]",
                classes=config.num_labels,
                about=ABOUT_FILE,
            ),
            encoding="utf-8",
        )


def to_stablehlo(classify: Any, shape: Sequence[int], platforms: Sequence[str]) -> bytes:
    """Return a function of pixel values as a serialized `jax.export` artifact with a symbolic batch.

    Args:
        classify: maps float32 [B H W C] to an array; JAX must be able to trace it.
        shape: (H, W, C).
        platforms: as in `export_model`.

    Raises:
        ImportError: flatbuffers is not installed.

    Example:
        >>> from jax import export
        >>> artifact = to_stablehlo(lambda pixel_values: pixel_values.mean((1, 2)), shape=(8, 8, 3), platforms=["cpu"])
        >>> export.deserialize(bytearray(artifact)).call(jnp.ones((5, 8, 8, 3))).shape
        (5, 3)
    """
    try:
        import flatbuffers  # noqa: F401  # which jax.export imports only at the end
    except ImportError:
        raise ImportError("Exporting StableHLO needs flatbuffers: pip install 'levit-flax[export]'.") from None
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    exported = export.export(jax.jit(classify), platforms=tuple(platforms))(
        jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    )
    return bytes(exported.serialize())


def to_onnx(classify: Any, shape: Sequence[int]) -> bytes:
    """Return a function of pixel values as a serialized ONNX model with a symbolic batch.

    Args:
        classify: maps float32 [B H W C] to an array; JAX must be able to trace it.
        shape: (H, W, C).

    Raises:
        ImportError: jax2onnx is not installed.

    Example:
        >>> import onnxruntime
        >>> artifact = to_onnx(lambda pixel_values: pixel_values.mean((1, 2)), shape=(8, 8, 3))
        >>> session = onnxruntime.InferenceSession(artifact)
        >>> [means] = session.run(None, {"pixel_values": jax.device_get(jnp.ones((5, 8, 8, 3)))})
        >>> means.shape
        (5, 3)
    """
    try:
        import jax2onnx
    except ImportError:
        raise ImportError("Exporting ONNX needs jax2onnx: pip install 'levit-flax[onnx]'.") from None
    exported = jax2onnx.to_onnx(
        classify, [("B", *shape)], model_name="levit", input_names=["pixel_values"], output_names=["logits"]
    )
    return bytes(exported.SerializeToString())
