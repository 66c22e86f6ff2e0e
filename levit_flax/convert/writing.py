"""Write Flax variables as a PyTorch state dict."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from levit_flax.arguments import _check_types
from levit_flax.checkpoint import _check_variables, _find_fault, _save_tensors
from levit_flax.choices import WRITTEN_LAYOUTS, _suggest
from levit_flax.configuration import LevitConfig
from levit_flax.files import _write_atomically
from levit_flax.modeling import LevitBase

from .errors import ConversionError
from .layouts import _LAYOUTS, _index_table, _Row, _Structure

# Files with these suffixes are pickles, which only PyTorch writes.
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
_LISTED = 8  # maximum number of arrays in an error message


@_check_types
def to_torch(model: LevitBase, variables: Mapping[str, Any], layout: str = "hf") -> dict[str, np.ndarray]:
    """Convert a model and its variables to a PyTorch state dict.

    Args:
        model: one of the three models, folded or not.
        variables: its variables.
        layout: the names of the tensors: "hf" for transformers, "timm", "timm_conv" (timm with linear layers as 1x1
            convolutions), or "facebook" for the original repository. A folded model is written fused; transformers has
            no fused layout.

    Returns:
        NumPy arrays by PyTorch's names; `torch.from_numpy` makes tensors of them. Converting the result of
        `from_torch` back reproduces every tensor bit for bit, including `num_batches_tracked`.

    Raises:
        ValueError: the layout is unknown or cannot represent the model, or the variables do not fit the model.

    Examples:
        >>> from levit_flax import convert, from_pretrained
        >>> convert.to_torch(*from_pretrained("cifar10"), layout="facebook")["head.l.weight"].shape
        (10, 160)
    """
    # Copies, because the arrays of `_state_dict` may be views of the variables.
    return {name: np.array(array) for name, array in _state_dict(model, variables, layout).items()}


def _check_values(variables: Mapping[str, Any]) -> None:
    """Raise ValueError unless all variables have values that can be read back."""
    faults = []
    for path, leaf in flatten_dict(variables, sep="/").items():
        if isinstance(leaf, jax.core.Tracer) or (isinstance(leaf, jax.Array) and leaf.is_deleted()):
            faults.append(f"{path} (expected values, found a tracer or a deleted array)")
        elif fault := _find_fault(path, np.asarray(leaf)):
            faults.append(f"{path} ({fault})")
    if faults:
        more = " and more" if len(faults) > _LISTED else ""
        raise ValueError(f"The variables cannot be converted: {', '.join(faults[:_LISTED])}{more}.")


def _state_dict(model: LevitBase, variables: Mapping[str, Any], layout: str) -> dict[str, np.ndarray]:
    """Return the state dict; arrays whose axes are not permuted are views of the variables."""
    _check_layout(model, layout)
    _check_variables(model, variables, "The given tree")
    _check_values(variables)
    structure = _Structure.of(model.config, model.head_names, model.folded)
    tensors = dict(_torch_tensors(_LAYOUTS[layout].rows(structure), variables))
    if _LAYOUTS[layout].index_tables:
        for name, path in _LAYOUTS[layout].tables(structure).items():
            tensors[name] = _index_table(model.config, path).astype(np.int64)
    return tensors


def _check_layout(model: LevitBase, layout: str) -> None:
    """Raise ValueError unless a layout can be written and can represent the model."""
    if layout not in WRITTEN_LAYOUTS:
        raise ValueError(
            f"Unknown layout: expected one of {', '.join(WRITTEN_LAYOUTS)}, found"
            f" {layout!r}.{_suggest(str(layout), WRITTEN_LAYOUTS)}"
        )
    if model.folded and _LAYOUTS[layout].folded_marker is None:
        fused = ", ".join(name for name in WRITTEN_LAYOUTS if _LAYOUTS[name].folded_marker)
        raise ValueError(
            "transformers has no layout for folded models: expected a model with batch norms, found a folded one."
            f" Export the original model, or write the layout {fused}."
        )


def _check_transformers_size(config: LevitConfig) -> None:
    """Raise ConversionError unless transformers' model has the same token grid for the config's image size.

    transformers assumes square images and `image_size // patch_size` tokens per side, but its stem rounds up.

    Source: `LevitEncoder` in transformers modeling_levit.py.
    """
    height, width = config.image_height_width
    if height != width or config.grids[0] != (height // config.patch_size, width // config.patch_size):
        raise ConversionError(
            f"transformers' LeViT does not support this image size: expected a square multiple of {config.patch_size},"
            f" found {height}x{width}. Change the model's image_size."
        )


def _torch_tensors(rows: Iterable[_Row], variables: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the array of each row's tensor in a PyTorch state dict."""
    flat = flatten_dict(variables, sep="/")
    for row in rows:
        array = np.asarray(flat[row.flax])
        if row.flax.endswith("/count"):
            yield row.torch, np.asarray(array, np.int64)
        else:
            yield row.torch, np.asarray(row.permutation.to_torch(array), order="C")


@_check_types
def save_torch(
    path: str | Path, model: LevitBase, variables: Mapping[str, Any], layout: str = "hf", overwrite: bool = False
) -> None:
    """Save a model as a PyTorch weight file.

    Args:
        path: the file to write: `model.safetensors` for transformers and timm. Files ending in .pth, .pt or .bin are
            pickles and require PyTorch. In the "facebook" layout the tensors of a pickle are under the key "model",
            as the original code expects.
        model: as in `to_torch`.
        variables: as in `to_torch`.
        layout: as in `to_torch`.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: the file exists and `overwrite` is False.
        ImportError: the file is a pickle and PyTorch is not installed.
        OSError: the file cannot be written.
        ValueError: as in `to_torch`.

    Examples:
        >>> import tempfile
        >>> from levit_flax import convert, from_pretrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     convert.save_torch(f"{folder}/model.safetensors", *from_pretrained("cifar10"), layout="timm")
        ...     convert.from_torch(f"{folder}/model.safetensors")[0].config.hidden_sizes
        (96, 128, 160)
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *_PICKLE_SUFFIXES):
        raise ValueError(
            f"{path} has an unknown suffix: expected .safetensors, {', '.join(_PICKLE_SUFFIXES)}, found"
            f" {path.suffix or 'none'}."
        )
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} already exists. Pass overwrite=True to replace it, or choose another name.")
    tensors = _state_dict(model, variables, layout)
    if path.suffix in _PICKLE_SUFFIXES:
        _write_atomically(path, lambda file: _save_pickle(file, tensors, layout))
    else:
        _write_atomically(path, lambda file: _save_tensors(file, tensors, "pt"))


def _save_pickle(path: Path, tensors: dict[str, np.ndarray], layout: str) -> None:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"Writing {', '.join(_PICKLE_SUFFIXES)} files requires PyTorch, which is not installed. Write a"
            " .safetensors file, or run: pip install 'levit-flax[torch]'"
        ) from None

    def tensor(array: np.ndarray) -> torch.Tensor:
        if array.dtype == jnp.bfloat16:  # torch.from_numpy does not accept it
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    state_dict = {name: tensor(np.array(array)) for name, array in tensors.items()}
    try:
        torch.save({"model": state_dict} if layout == "facebook" else state_dict, path)
    except RuntimeError as error:  # torch's exception for a full disk, too
        raise OSError(f"Cannot write {path}: {error}. Choose a disk with enough free space.") from None
