"""Read and write model directories.

A directory contains `config.json`, `preprocessor_config.json` and `flax_model.safetensors`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from . import files, modeling
from .arguments import _check_types
from .configuration import _CONFIG_FILE, _OWN_BLOCK, LevitConfig
from .image_processing import _PROCESSOR_FILE, LevitImageProcessor
from .modeling import LevitBase, Variables
from .modeling_variables import _differences

_WEIGHTS_FILE = "flax_model.safetensors"  # transformers would load model.safetensors as PyTorch weights

# The report of a conversion, as JSON and as Markdown.
_REPORT_FILE = "conversion_report.json"
_READABLE_REPORT_FILE = "conversion_report.md"

_OWN_FILES = (_CONFIG_FILE, _PROCESSOR_FILE, _WEIGHTS_FILE, _REPORT_FILE, _READABLE_REPORT_FILE)

_BLOCK = re.compile(r"params/stage_(\d{1,18})/block_(\d{1,18})/")

_FLOATING = ("float16", "bfloat16", "float32", "float64")

# The faults of values that need no details.
_NOT_FINITE = "expected finite values, found NaN or infinity"
_NEGATIVE = "expected variances of at least 0, found negative ones"

# The names of PyTorch weight files, in order of preference.
_TORCH_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _read_directory(directory: Path) -> tuple[LevitBase, Variables]:
    """Return the module and the variables, as NumPy arrays, of a directory written by `save_pretrained`."""
    path = directory / _CONFIG_FILE
    values = files._read_json(path)
    try:
        block, architecture = values.get(_OWN_BLOCK, {}), values["architectures"][0]
        model_class = {model.__name__: model for model in modeling._MODEL_CLASSES}[architecture]
        config, folded = LevitConfig.from_dict(values), bool(block.get("folded", False))
    except ValueError as error:
        raise ValueError(f"{path} is not the config of a LeViT model: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{path} is not the config of a LeViT model: expected a file written by save_pretrained, found {error!r}."
        ) from None
    weights = directory / _WEIGHTS_FILE
    files._check_header(weights)
    try:
        with safe_open(weights, framework="np") as file:
            _check_depths(config, file.keys(), str(weights))  # before a deep model is traced
        flat = load_file(weights)
    # Dtypes unknown to NumPy raise TypeError or AttributeError, and false sizes MemoryError.
    except (SafetensorError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(
            f"{weights} is not a complete safetensors file with dtypes of NumPy ({error!r}). Copy or download it again."
        ) from None
    param_dtype = next((leaf.dtype for leaf in flat.values() if jnp.issubdtype(leaf.dtype, jnp.floating)), jnp.float32)
    model = model_class(config, folded=folded, param_dtype=jnp.dtype(param_dtype))
    _check_variables(model, flat, str(weights))
    faults = [f"{path} ({fault})" for path, leaf in flat.items() if (fault := _find_fault(path, leaf))]
    if faults:
        raise ValueError(
            f"{weights} holds invalid values: {', '.join(faults[:8])}{' and more' if len(faults) > 8 else ''}. Save or"
            " convert the model again."
        )
    return model, unflatten_dict(flat, sep="/")


def _check_depths(config: LevitConfig, names: Iterable[str], where: str) -> None:
    """Raise ValueError unless the names of the arrays have as many blocks per stage as the config."""
    blocks = {tuple(map(int, match.groups())) for match in map(_BLOCK.match, names) if match}
    depths = tuple(sum(stage == i for stage, _ in blocks) for i in range(config.num_stages))
    if depths != config.depths:
        raise ValueError(
            f"{where} does not fit the config: expected depths of {list(config.depths)}, found {list(depths)}. Use the"
            " config and the weights of the same model."
        )


def _find_fault(path: str, array: np.ndarray) -> str | None:
    """Return why an array cannot be the variable at `path`, or None."""
    if path.endswith("/count"):
        if array.dtype.kind in "iu" and 0 <= int(array) < 2**31:
            return None
        return f"expected an integer from 0 to 2^31 - 1, found {array} of {array.dtype}"
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"expected floating point, found {array.dtype}"
    if not np.isfinite(array).all():
        return _NOT_FINITE
    return _NEGATIVE if path.endswith("/var") and (array < 0).any() else None


def _read_provenance(directory: Path) -> dict[str, Any]:
    """Return the origin of the weights recorded in a model directory, or an empty dictionary."""
    values = files._read_json(directory / _CONFIG_FILE)
    provenance: dict[str, Any] = values.get(_OWN_BLOCK, {}).get("provenance", {})
    return provenance


def _floating(dtype: Any) -> Any:
    """Return a floating-point dtype of NumPy from its name, or from a dtype of NumPy, JAX or PyTorch.

    None and "auto", which keep the dtype of a checkpoint, return None.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    try:
        found = jnp.dtype(str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _FLOATING:
        raise ValueError(f'dtype must be one of {", ".join(_FLOATING)}, "auto" or None, found {dtype!r}.')
    return found


def _cast(model: LevitBase, variables: Variables, dtype: Any) -> tuple[LevitBase, Variables]:
    """Return the model and its variables with all floating-point arrays converted to `dtype`."""
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype != np.int32 else leaf, variables)
    return model.clone(param_dtype=jnp.dtype(dtype)), variables


@_check_types
def save_pretrained(
    directory: str | Path,
    model: LevitBase,
    variables: Mapping[str, Any],
    processor: LevitImageProcessor | None = None,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Save a model to a directory.

    The write is atomic: if it fails, an existing directory is unchanged.

    Args:
        directory: the directory to write; created if it does not exist.
        model: the module.
        variables: its variables.
        processor: image processor to save with the model; None for none.
        overwrite: replace the model in a directory that is not empty; other files in it are kept.
        provenance: JSON values that describe the origin of the weights, stored in `config.json`; None for none.

    Raises:
        FileExistsError: the directory is not empty and `overwrite` is False.
        ValueError: the variables do not fit the model.
        OSError: the directory cannot be written.

    Examples:
        >>> import tempfile
        >>> from levit_flax import from_pretrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(f"{folder}/levit", *from_pretrained("cifar10"))
        ...     from_pretrained(f"{folder}/levit")[0].config.num_labels
        10
    """
    with files._staged_directory(Path(directory), overwrite, _OWN_FILES, _CONFIG_FILE) as staging:
        _write_model(staging, model, variables, processor, provenance)


def _write_model(
    directory: Path,
    model: LevitBase,
    variables: Mapping[str, Any],
    processor: LevitImageProcessor | None,
    provenance: Mapping[str, Any] | None,
) -> None:
    """Write the files of a model to an existing directory; the arguments are those of `save_pretrained`."""
    _check_variables(model, variables, "The tree of variables")
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config[_OWN_BLOCK] = {
        **config.get(_OWN_BLOCK, {}),
        "version": version("levit-flax"),
        "folded": model.folded,
        "provenance": dict(provenance or {}),
    }
    (directory / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    flat = {path: np.asarray(leaf, order="C") for path, leaf in flatten_dict(variables, sep="/").items()}
    _save_tensors(directory / _WEIGHTS_FILE, flat, "flax")
    if processor is not None:
        processor.save_pretrained(directory)


def _save_tensors(path: Path, tensors: Mapping[str, np.ndarray], format: str) -> None:
    """Write a safetensors file with `format`, "flax" or "pt", in its metadata."""
    try:
        save_file(dict(tensors), path, metadata={"format": format})
    except SafetensorError as error:  # also raised if the disk is full
        raise OSError(f"Cannot write {path}: {error}. Choose a writable location with enough space.") from None
    path.chmod(files._permissions(0o666))  # safetensors creates it with mode 0600


def _check_variables(model: LevitBase, variables: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless the tree called `name` has the paths and shapes of the model's variables."""
    differing, count = _differences(model, variables)
    if differing:
        hint = ""
        if any(re.search(r"/count \(.*float", line) for line in differing):
            hint = " Counters of batches stay integers: average only floating-point arrays."
        raise ValueError(
            f"{name} does not fit {type(model).__name__}: {len(differing)} of {count} arrays differ,"
            f" {', '.join(differing[:8])}.{hint}"
        )


def _to_device(variables: Variables, name: str) -> Variables:
    """Return the variables as JAX arrays, or raise ValueError if JAX would truncate float64 to float32."""
    if not jax.config.jax_enable_x64 and any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(variables)):
        raise ValueError(
            f"{name} contains float64 arrays, which JAX would truncate to float32. Choose float32 with dtype=..., or"
            " call jax.config.update('jax_enable_x64', True)."
        )
    arrays: Variables = jax.device_put(variables)
    return arrays
