"""The model directory on disk: `config.json`, `preprocessor_config.json` and `flax_model.safetensors`."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from . import hub, modeling, surgery
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


def from_pretrained(
    source: str | Path,
    *,
    dtype: Any = None,
    image_size: int | tuple[int, int] | None = None,
    num_labels: int | None = None,
    key: jax.Array | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[LevitBase, Variables]:
    """Load a model from a directory or a Hub repository; PyTorch weights are converted on the way.

    Args:
        source: a directory, a Hub id such as "facebook/levit-128S", or "cifar10", the small model inside the package.
        dtype: type of the floating-point arrays; None keeps the file's.
        image_size: size of the images in pixels, a side or (height, width), if not the checkpoint's; see
            `resize_image`.
        num_labels: number of classes, if not the checkpoint's: then the heads are fresh, which a warning says; see
            `replace_head`.
        key: random key for fresh heads; None for `jax.random.key(0)`.
        revision: branch, tag or commit of a Hub repository.
        token: access token for the Hub.
        cache_dir: where downloads are kept; None for huggingface_hub's own cache.
        local_files_only: do not touch the network.

    Returns:
        The module and its variables, {"params": ..., "batch_stats": ...}, as JAX arrays.

    Raises:
        ValueError: the files do not hold what they should; `ConversionError` for PyTorch weights.
        OSError: there is no such source, or it cannot be read or fetched.

    Example:
        >>> model, variables = from_pretrained("cifar10", dtype="float32", image_size=96)
        >>> type(model).__name__, model.config.image_size
        ('LevitForImageClassificationWithTeacher', 96)
    """
    resolved = resolve(source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    assert resolved.weights is not None  # resolve raises where there are none
    if resolved.weights.name != WEIGHTS_FILE:
        from levit_flax import convert  # only whoever brings PyTorch weights pays for it

        model, variables = convert.from_torch(resolved.weights, dtype)
    else:
        model, variables = read_directory(resolved.directory)
        if dtype is not None:
            model, variables = cast(model, variables, dtype)
        variables = to_device(variables, str(resolved.weights))
    if image_size is not None:
        model, variables = surgery.resize_image(model, variables, image_size)
    if num_labels is not None and num_labels != model.config.num_labels:
        warnings.warn(
            f"The checkpoint has {model.config.num_labels} classes: the heads for {num_labels} are fresh, and the model"
            " has to be trained before it is of use.",
            stacklevel=2,
        )
        model, variables = surgery.replace_head(model, variables, num_labels, jax.random.key(0) if key is None else key)
    return model, variables


def resolve(
    source: str | Path, *, weights: Sequence[str] = (WEIGHTS_FILE, *TORCH_WEIGHT_FILES), **options: Any
) -> hub.Resolved:
    """Find the files of a model: the package's own, a directory's or a Hub repository's.

    Args:
        source: as in `from_pretrained`.
        weights: the weight files to look for, in order; ours and then PyTorch's.
        **options: revision, token, cache_dir and local_files_only, as in `from_pretrained`.

    Raises:
        OSError: there is no such source, or it cannot be read or fetched.
    """
    return hub.resolve(source, weights=weights, files=(CONFIG_FILE, PROCESSOR_FILE), **options)


def load_processor(directory: Path | None, config: LevitConfig) -> LevitImageProcessor:
    """Return the processor that a model's directory describes, or the usual one for the model's image size."""
    if directory is not None and (directory / PROCESSOR_FILE).is_file():
        return LevitImageProcessor.from_pretrained(directory)
    if directory is not None and (directory / CONFIG_FILE).is_file():
        values = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        if "architecture" in values:  # timm's, which has no file of its own for this
            from levit_flax.convert.timm_files import read_timm_processor

            return read_timm_processor(values, str(directory / CONFIG_FILE))
    height, width = config.image_height_width
    return LevitImageProcessor(size=max(height, width), crop_size=(height, width))


def resize_processor(processor: LevitImageProcessor, config: LevitConfig) -> LevitImageProcessor:
    """Return a processor that makes images for a config, with as much around the crop as the given one leaves."""
    height, width = config.image_height_width
    old = processor.crop_size["height"], processor.crop_size["width"]
    if old == (height, width):
        return processor
    size: Any = (height, width)
    if "shortest_edge" in processor.size:
        size = round(processor.size["shortest_edge"] * max(height, width) / max(old))
    return LevitImageProcessor(**{**vars(processor), "size": size, "crop_size": (height, width)})


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
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(f"{folder}/levit", *from_pretrained("cifar10"))
        ...     from_pretrained(f"{folder}/levit")[0].config.num_labels
        10
    """
    with staged_directory(Path(directory), overwrite) as staging:
        write_model(staging, model, variables, processor, provenance)


def push_to_hub(
    repo_id: str,
    model: LevitBase,
    variables: Mapping[str, Any],
    processor: LevitImageProcessor | None = None,
    **options: Any,
) -> str:
    """Upload a model to the Hub, creating the repository where it does not exist.

    Args:
        repo_id: the repository as "owner/name"; without an owner it is the token's.
        model: the module.
        variables: its variables.
        processor: uploaded with it where given.
        **options: token, private, revision and commit_message, as in `levit_flax.hub.push`.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the variables do not fit the model.
        HubError: the Hub did not take the files.

    Example:
        >>> model, variables = from_pretrained("cifar10")
        >>> address = push_to_hub("someone/levit", model, variables)  # with the token of `hf auth login` or HF_TOKEN
        >>> address.endswith("/someone/levit")
        True
    """
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), model, variables, processor, None)
        return hub.push(folder, repo_id, files=OWN_FILES, **options)


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


def check_free(directory: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless a model may be written to this directory."""
    directory = directory.expanduser()
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file: expected a directory to write, or a name that is free.")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{directory} exists and is not empty: choose another name, or replace the model in it with --force"
            " (overwrite=True)."
        )


@contextlib.contextmanager
def staged_directory(directory: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary sibling to fill, and put it in the place of `directory` once the block has ended well.

    Raises:
        FileExistsError: the directory has content and `overwrite` is False.
        OSError: the directory cannot be written.
    """
    check_free(directory, overwrite)
    directory = directory.expanduser().resolve()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise cannot_write(directory, error) from None
    try:
        staging.chmod(0o755)  # mkdtemp keeps others out
        with explain_full_disk(directory):
            yield staging
        replace_directory(directory, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> OSError:
    """Return the error to raise when a place cannot be written to."""
    where = f" ({error.filename})" if error.filename else ""
    return OSError(f"Cannot write {path}: {error.strerror}{where}. Choose a place that you may write to.")


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn the bare error of a full disk into one that names the place that was written to."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise cannot_write(path, error) from None
        raise


def make_directory(directory: Path) -> None:
    """Make a directory, or raise an OSError that says why it cannot be made."""
    try:
        directory.expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(directory, error) from None


def replace_directory(directory: Path, staging: Path) -> None:
    """Rename `staging` to `directory`, and take along what is not a model's from the directory that was there."""
    if not directory.exists():
        os.rename(staging, directory)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    os.rename(directory, retired)
    os.rename(staging, directory)
    for entry in retired.iterdir():
        if entry.name not in OWN_FILES and not (directory / entry.name).exists():
            os.rename(entry, directory / entry.name)
    shutil.rmtree(retired)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary sibling of a file, and rename it once that has ended well."""
    path = path.expanduser().resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    os.close(handle)
    staging = Path(name)
    try:
        with explain_full_disk(path):
            write(staging)
        staging.chmod(0o644)  # mkstemp keeps others out
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
