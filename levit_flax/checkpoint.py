"""The model directory on disk: `config.json`, `preprocessor_config.json` and `flax_model.safetensors`."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from . import files, modeling
from .configuration import OWN_BLOCK, LevitConfig
from .image_processing import PROCESSOR_FILE, LevitImageProcessor
from .modeling import LevitBase, Variables

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "flax_model.safetensors"  # never model.safetensors, which transformers would open as PyTorch's

# What a conversion says of itself, for programs and for people.
REPORT_FILE = "conversion_report.json"
READABLE_REPORT_FILE = "conversion_report.md"

OWN_FILES = (CONFIG_FILE, PROCESSOR_FILE, WEIGHTS_FILE, REPORT_FILE, READABLE_REPORT_FILE)

# The weights that PyTorch writes, in the order in which they are looked for.
TORCH_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_directory(directory: Path) -> tuple[LevitBase, Variables]:
    """Read a model directory of ours into a module and NumPy arrays."""
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        block, architecture = values.get(OWN_BLOCK, {}), values["architectures"][0]
        model_class = {model.__name__: model for model in modeling.MODEL_CLASSES}[architecture]
        config, folded = LevitConfig.from_dict(values), bool(block.get("folded", False))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} is not the config of a saved LeViT model ({error!r}).") from None
    try:
        flat = load_file(directory / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} is not a whole safetensors file ({error}): copy or download it again."
        ) from None
    param_dtype = next((leaf.dtype for leaf in flat.values() if jnp.issubdtype(leaf.dtype, jnp.floating)), jnp.float32)
    model = model_class(config, folded=folded, param_dtype=jnp.dtype(param_dtype))
    variables = unflatten_dict(flat, sep="/")
    check_variables(model, variables, str(directory / WEIGHTS_FILE))
    return model, variables


def read_provenance(directory: Path) -> dict[str, Any]:
    """Return what a model directory of ours says of where it came from."""
    values = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    provenance: dict[str, Any] = values.get(OWN_BLOCK, {}).get("provenance", {})
    return provenance


def cast(model: LevitBase, variables: Variables, dtype: Any) -> tuple[LevitBase, Variables]:
    """Return the model and its variables with all floating-point arrays in another type."""
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype != np.int32 else leaf, variables)
    return model.clone(param_dtype=jnp.dtype(dtype)), variables


def save_pretrained(
    directory: str | Path,
    model: LevitBase,
    variables: Mapping[str, Any],
    processor: LevitImageProcessor | None = None,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory, whole or not at all.

    Args:
        directory: where to; made if it does not exist.
        model: the module.
        variables: its variables.
        processor: written beside the model where given.
        overwrite: replace the model that is there; files that are not a model's stay.
        provenance: JSON-ready values that tell where the weights came from, kept in config.json.

    Raises:
        FileExistsError: the directory has content and `overwrite` is False.
        ValueError: the variables do not fit the model.
        OSError: the directory cannot be written.

    Example:
        >>> import tempfile
        >>> from levit_flax import from_pretrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(f"{folder}/levit", *from_pretrained("cifar10"))
        ...     from_pretrained(f"{folder}/levit")[0].config.num_labels
        10
    """
    with files.staged_directory(Path(directory), overwrite, OWN_FILES) as staging:
        write_model(staging, model, variables, processor, provenance)


def write_model(
    directory: Path,
    model: LevitBase,
    variables: Mapping[str, Any],
    processor: LevitImageProcessor | None,
    provenance: Mapping[str, Any] | None,
) -> None:
    """Write the files of a model into a directory that is there; the arguments are those of `save_pretrained`."""
    check_variables(model, variables, "The given tree")
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config[OWN_BLOCK] = {
        **config.get(OWN_BLOCK, {}),
        "version": version("levit-flax"),
        "folded": model.folded,
        "provenance": dict(provenance or {}),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    flat = {path: np.asarray(leaf, order="C") for path, leaf in flatten_dict(variables, sep="/").items()}
    save_tensors(directory / WEIGHTS_FILE, flat, "flax")
    if processor is not None:
        processor.save_pretrained(directory)


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], format: str) -> None:
    """Write a safetensors file; `format` says whose names and axes it holds.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": format})
    except SafetensorError as error:  # of a full disk too
        raise OSError(f"Cannot write {path}: {error}. Choose a place with room for it.") from None
    path.chmod(0o644)  # safetensors keeps others out


def check_variables(model: LevitBase, variables: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless names and shapes are those of the model's own variables."""
    expected = {path: leaf.shape for path, leaf in modeling.abstract_variables(model).items()}
    found = {path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()}
    differing = [
        f"{path} (expected {expected.get(path, 'nothing')}, found {found.get(path, 'nothing')})"
        for path in sorted(expected.keys() | found.keys())
        if expected.get(path) != found.get(path)
    ]
    if differing:
        raise ValueError(
            f"{where} does not fit {type(model).__name__} in {len(differing)} places: {', '.join(differing[:8])}."
        )


def to_device(variables: Variables, where: str) -> Variables:
    """Return the variables as JAX arrays, refusing to lose float64 in silence."""
    if not jax.config.jax_enable_x64 and any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(variables)):
        raise ValueError(
            f"{where} holds float64, which JAX would cut to float32: pass dtype='float32', or call"
            " jax.config.update('jax_enable_x64', True)."
        )
    return jax.device_put(variables)
