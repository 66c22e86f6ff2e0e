"""Load models from directories and the Hub, and upload them.

PyTorch weights are converted while loading. `levit_flax.convert` is imported only for these.
"""

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from . import checkpoint, hub, surgery
from .arguments import _check_types
from .checkpoint import _OWN_FILES, _TORCH_WEIGHT_FILES, _WEIGHTS_FILE
from .configuration import _CONFIG_FILE, LevitConfig
from .files import _read_json
from .hub import _HubOptions, _Resolved
from .image_processing import _PROCESSOR_FILE, LevitImageProcessor
from .modeling import LevitBase, Variables


class _LoadedModel(NamedTuple):
    """A model with the processor that prepares its images and the files that both were loaded from."""

    model: LevitBase
    variables: Variables
    processor: LevitImageProcessor
    files: _Resolved


@_check_types
def from_pretrained(
    source: str | Path,
    *,
    dtype: Any = None,
    torch_dtype: Any = None,
    image_size: int | tuple[int, int] | None = None,
    num_labels: int | None = None,
    num_channels: int | None = None,
    key: jax.Array | None = None,
    ignore_mismatched_sizes: bool = False,
    subfolder: str = "",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[LevitBase, Variables]:
    """Load a model from a directory or a Hub repository, converting PyTorch weights.

    Args:
        source: a directory, a Hub id such as "facebook/levit-128S", or "cifar10", the small model in the package.
        dtype: dtype of the floating-point arrays; "auto" keeps the checkpoint's. None does the same, but converts
            narrower dtypes than float32 to float32, because optimizers underflow in float16. PyTorch's dtypes are
            accepted too.
        torch_dtype: another name of `dtype`, as in transformers.
        image_size: input size in pixels, one side or (height, width); None keeps the checkpoint's. See `resize_image`.
        num_labels: number of classes; None keeps the checkpoint's. Heads for another number are newly initialized, and
            a warning is issued. 0 removes the heads. See `replace_head`.
        num_channels: channels of the input images; None keeps the checkpoint's. See `change_channels`.
        key: random key for newly initialized heads; None for `jax.random.key(0)`.
        ignore_mismatched_sizes: no effect; accepted because transformers requires it to change the number of classes.
        subfolder: folder of the directory or repository that contains the model.
        revision: branch, tag or commit of a Hub repository; None for its main branch.
        token: access token for the Hub; None for the one stored by `hf auth login` or in HF_TOKEN.
        cache_dir: directory for downloads; None for huggingface_hub's own cache.
        local_files_only: do not access the network.

    Returns:
        The module and its variables, {"params": ..., "batch_stats": ...}, as JAX arrays.

    Raises:
        ValueError: a file is malformed, or weights do not fit the config; `ConversionError` for PyTorch weights.
        OSError: the source does not exist, or cannot be read or downloaded; `HubError` for the Hub.

    Examples:
        >>> model, variables = from_pretrained("cifar10", dtype="float32", image_size=96)
        >>> type(model).__name__, model.config.image_size
        ('LevitForImageClassificationWithTeacher', 96)
    """
    if dtype is not None and torch_dtype is not None:
        raise ValueError(f"dtype and torch_dtype mean the same: expected one of them, found {dtype} and {torch_dtype}.")
    files = _resolve(source, _HubOptions(revision, token, cache_dir, local_files_only, subfolder))
    model, variables = _load_weights(files, torch_dtype if dtype is None else dtype)
    if num_channels is not None:
        model, variables = surgery.change_channels(model, variables, num_channels)
    if image_size is not None:
        model, variables = surgery.resize_image(model, variables, image_size)
    if num_labels is not None and num_labels != model.config.num_labels:
        if num_labels:
            warnings.warn(
                f"The checkpoint has {model.config.num_labels} classes: the heads for {num_labels} are newly"
                " initialized and must be trained before use.",
                stacklevel=2,
            )
        model, variables = surgery.replace_head(model, variables, num_labels, key)
    return model, variables


def _resolve(
    source: str | Path,
    options: _HubOptions = hub._DEFAULTS,
    weights: Sequence[str] = (_WEIGHTS_FILE, *_TORCH_WEIGHT_FILES),
) -> _Resolved:
    """Find a model's files in the package, a directory or a Hub repository; `weights` are in order of preference."""
    return hub._resolve(source, weights=weights, files=(_CONFIG_FILE, _PROCESSOR_FILE), options=options)


def _load_weights(files: _Resolved, dtype: Any = None) -> tuple[LevitBase, Variables]:
    """Return the module and its variables as JAX arrays; `dtype` is that of `from_pretrained`."""
    assert files.weights is not None  # _resolve raises if there are none
    requested = checkpoint._floating(dtype)
    if files.weights.name != _WEIGHTS_FILE:
        from levit_flax.convert import conversion, sources  # heavy imports that Flax weights do not need

        converted = conversion._convert(sources._open_resolved(files.weights, files), requested)
        model, variables = converted.model, converted.variables
    else:
        model, variables = checkpoint._read_directory(files.directory)
        if requested is not None:
            model, variables = checkpoint._cast(model, variables, requested)
    if dtype is None and jnp.dtype(model.param_dtype).itemsize < jnp.dtype(jnp.float32).itemsize:
        model, variables = checkpoint._cast(model, variables, jnp.float32)
    return model, checkpoint._to_device(variables, str(files.weights))


def _load_model(
    source: str | Path,
    options: _HubOptions = hub._DEFAULTS,
    *,
    dtype: Any = None,
    image_size: int | tuple[int, int] | None = None,
) -> _LoadedModel:
    """Load a model with its processor, both resized to `image_size` if it is given."""
    files = _resolve(source, options)
    model, variables = _load_weights(files, dtype)
    processor = _load_processor(files.directory, model.config)
    if image_size is not None:
        model, variables = surgery.resize_image(model, variables, image_size)
        processor = _resize_processor(processor, model.config)
    return _LoadedModel(model, variables, processor, files)


def _load_processor(directory: Path | None, config: LevitConfig) -> LevitImageProcessor:
    """Return the processor described in a model directory, or the default one for the model's image size."""
    if directory is not None and os.path.lexists(directory / _PROCESSOR_FILE):
        return LevitImageProcessor.from_pretrained(directory)
    if directory is not None and os.path.lexists(directory / _CONFIG_FILE):
        values = _read_json(directory / _CONFIG_FILE)
        if "architecture" in values:  # timm stores its preprocessing in config.json
            from levit_flax.convert.timm_files import _read_timm_processor

            return _read_timm_processor(values, str(directory / _CONFIG_FILE))
    height, width = config.image_height_width
    # A gray image gets the mean of ImageNet's channels.
    gray: dict[str, Any] = {"image_mean": (0.449,), "image_std": (0.226,)} if config.num_channels == 1 else {}
    return LevitImageProcessor(size=max(height, width), crop_size=(height, width), **gray)


def _resize_processor(processor: LevitImageProcessor, config: LevitConfig) -> LevitImageProcessor:
    """Return a processor for a config's image size that crops the same share of the resized image."""
    height, width = config.image_height_width
    old = processor.crop_size["height"], processor.crop_size["width"]
    if old == (height, width):
        return processor
    size: Any = (height, width)
    if "shortest_edge" in processor.size:
        size = round(processor.size["shortest_edge"] * max(height, width) / max(old))
    return LevitImageProcessor(**{**vars(processor), "size": size, "crop_size": (height, width)})


def _change_heads(
    model: LevitBase, variables: Mapping[str, Any], model_class: type[LevitBase], key: jax.Array | None = None
) -> tuple[LevitBase, Variables]:
    """Return the model as another class, with heads dropped and newly initialized as needed.

    `key` is the random key for new heads; None for `jax.random.key(0)`.
    """
    if type(model) is model_class:
        return model, dict(variables)
    dropped = set(model.head_names) - set(model_class.head_names)
    missing = set(model_class.head_names) - set(model.head_names)
    if dropped == {"head_dist"}:
        warnings.warn(
            "The second head of the checkpoint (head_dist) was dropped, but the published accuracy is that of the"
            " average of both heads. Load both with LevitForImageClassificationWithTeacher, or merge them with"
            " levit_flax.merge_heads.",
            stacklevel=3,
        )
    changed = surgery._as_class(model, model_class)
    flat = {path: leaf for path, leaf in flatten_dict(variables, sep="/").items() if path.split("/")[1] not in dropped}
    if missing and model.config.num_labels:
        warnings.warn(
            f"The checkpoint has no {' and no '.join(sorted(missing))}: these heads are newly initialized and must be"
            " trained before use.",
            stacklevel=3,
        )
        _, with_heads = surgery.replace_head(changed, variables, model.config.num_labels, key)
        flat |= {p: leaf for p, leaf in flatten_dict(with_heads, sep="/").items() if p.split("/")[1] in missing}
    return changed, unflatten_dict(flat, sep="/")


@_check_types
def push_to_hub(
    repo_id: str,
    model: LevitBase,
    variables: Mapping[str, Any],
    processor: LevitImageProcessor | None = None,
    *,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a model to the Hub, creating the repository if it does not exist.

    Args:
        repo_id: the repository as "owner/name"; without an owner, that of the token's user.
        model: the module.
        variables: its variables.
        processor: image processor to upload with the model; None for none.
        token: access token with write permission; None for the one stored by `hf auth login` or in HF_TOKEN.
        private: create the repository as private; no effect if it exists.
        revision: the branch to upload to, which must exist; None for the main branch.
        commit_message: first line of the commit message; None for "Upload LeViT model".

    Returns:
        The URL of the repository.

    Raises:
        ValueError: the variables do not fit the model.
        HubError: the upload failed.

    Examples:
        >>> model, variables = from_pretrained("cifar10")
        >>> url = push_to_hub("someone/levit", model, variables)  # with the token of `hf auth login` or HF_TOKEN
        >>> url.endswith("/someone/levit")
        True
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint._write_model(Path(folder), model, variables, processor, None)
        return hub._push(
            folder,
            repo_id,
            files=_OWN_FILES,
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message,
        )
