"""Convert a PyTorch state dict to Flax variables.

Every tensor is mapped, ignored by name, or reported.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from levit_flax.arguments import _check_types
from levit_flax.checkpoint import _floating, _to_device
from levit_flax.configuration import LevitConfig
from levit_flax.hub import _HubOptions
from levit_flax.modeling import LevitBase, Variables
from levit_flax.surgery import resize_image

from .architecture import _choose_architecture
from .checks import _check_names, _check_tables, _check_values, _Problem, _Problems
from .layouts import _CheckpointLayout, _detect_layout, _Row
from .sources import _open_source, _Source, _Tensors


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """A converted checkpoint, and how it was converted.

    Attributes:
        model: the module.
        variables: its variables as NumPy arrays.
        layout: the checkpoint's layout.
        rows: the mapped tensors.
        ignored: names of the ignored tensors, by reason.
        reordered: for each table of attention biases that the checkpoint stores in another order (by its path), the
            checkpoint's row of each of our rows.
        dtype: the requested dtype of floating-point arrays; None if the checkpoint's was kept.
        inferred: whether the architecture was inferred from the shapes instead of read from a config.
        notes: assumptions and warnings, as sentences for the report.
        provenance: where the tensors were loaded from, JSON-ready.
    """

    model: LevitBase
    variables: Variables
    layout: _CheckpointLayout
    rows: tuple[_Row, ...]
    ignored: dict[str, tuple[str, ...]]
    reordered: dict[str, np.ndarray]
    dtype: Any
    inferred: bool
    notes: tuple[str, ...]
    provenance: dict[str, Any]

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))


@_check_types
def from_torch(
    source: str | Path | Mapping[str, Any],
    dtype: Any = None,
    *,
    config: LevitConfig | None = None,
    source_image_size: int | tuple[int, int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    ema: bool = False,
    prefix: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[LevitBase, Variables]:
    """Convert a PyTorch LeViT checkpoint to a model and its variables.

    The checkpoint can be in the layout of transformers, of timm (linear or convolutional) or of the original
    repository, with batch norms or fused.

    Args:
        source: a weight file (safetensors, or a pickle written by `torch.save`), a directory, a Hub id, or a mapping
            from names to arrays or tensors.
        dtype: dtype of the floating-point arrays; None or "auto" keeps the checkpoint's.
        config: the architecture; None for the config.json next to the weights or, if there is none, the architecture
            inferred from the tensor shapes.
        source_image_size: the checkpoint's input size in pixels, one side or (height, width), if it has no config and
            its attention biases fit several sizes; None for the config's or, without a config, the square multiple of
            16 that fits.
        image_size: input size of the result in pixels; None keeps the checkpoint's. See `levit_flax.resize_image`.
        ema: load the averaged weights (`model_ema`) of a training checkpoint instead of the last ones (`model`).
        prefix: prefix of the model's tensor names, such as "student", if the checkpoint contains several models; None
            finds the only one. Entries that do not belong to the model are left out.
        revision: branch, tag or commit of a Hub repository; None for its main branch.
        token: access token for the Hub; None for the one stored by `hf auth login` or in HF_TOKEN.
        cache_dir: directory for downloads; None for huggingface_hub's own cache.
        local_files_only: do not access the network.

    Returns:
        The module, with the checkpoint's heads (two, one or none) and folded if the checkpoint is fused, and its
        variables, {"params": ..., "batch_stats": ...}, as JAX arrays. A folded model has no "batch_stats".

    Raises:
        ConversionError: tensors are missing, unexpected, of the wrong shape or not finite; the message lists all.
        OSError: the source does not exist, or cannot be read or downloaded.

    Examples:
        >>> from levit_flax import convert, from_pretrained
        >>> tensors = convert.to_torch(*from_pretrained("cifar10"), layout="timm")
        >>> model, variables = convert.from_torch(tensors)
        >>> type(model).__name__, model.config.image_size, model.config.depths
        ('LevitForImageClassificationWithTeacher', 144, (2, 3, 1))
    """
    options = _HubOptions(revision, token, cache_dir, local_files_only)
    opened = _open_source(source, ema=ema, prefix=prefix, options=options)
    conversion = _convert(opened, _floating(dtype), config=config, source_image_size=source_image_size)
    model, variables = conversion.model, conversion.variables
    if image_size is not None:
        model, variables = resize_image(model, variables, image_size)
    return model, _to_device(variables, opened.where)


def _convert(
    source: _Source,
    dtype: Any = None,
    *,
    config: LevitConfig | None = None,
    source_image_size: int | tuple[int, int] | None = None,
) -> _Conversion:
    """Convert an opened source; the arguments are those of `from_torch`."""
    problems = _Problems()
    layout = _detect_layout(source.shapes, source.where)
    architecture = _choose_architecture(source, layout, config, source_image_size)
    mapped = _check_names(source.shapes, architecture, problems)
    for row in mapped.rows:
        if row.torch in source.others:
            problems.add(_Problem.NO_TENSOR, f"{row.torch} (found an object of type {source.others[row.torch]})")
    orders = _check_tables(source.tensors, architecture, problems)
    leaves = _read_leaves(source.tensors, mapped.readable, dtype, problems)
    name = type(architecture.model).__name__
    problems.raise_if_any(f"{source.where} cannot be converted as {name} in the {layout.name} layout")
    leaves |= {path: leaves[path][order] for path, order in orders.items()}
    notes = source.notes + architecture.notes
    if orders:
        notes += (f"{len(orders)} tables of attention biases were stored in another order and have been permuted.",)
    param_dtype = jnp.dtype(leaves["params/stem/conv_0/conv/kernel"].dtype)
    return _Conversion(
        model=architecture.model.clone(param_dtype=param_dtype),
        variables=unflatten_dict(leaves, sep="/"),
        layout=layout,
        rows=mapped.rows,
        ignored=mapped.ignored,
        reordered=orders,
        dtype=dtype,
        inferred=architecture.inferred,
        notes=notes,
        provenance={**source.provenance, "layout": layout.name},
    )


def _read_leaves(tensors: _Tensors, rows: Iterable[_Row], dtype: Any, problems: _Problems) -> dict[str, np.ndarray]:
    """Read each tensor once, check its values, and return the leaves of the Flax tree by path."""
    leaves = {}
    for row in rows:
        tensor = tensors[row.torch]
        if not _check_values(row, tensor, problems):
            continue
        if row.flax.endswith("/count"):
            leaves[row.flax] = np.array(tensor, np.int32)
            continue
        with np.errstate(over="ignore"):
            leaf = np.array(row.permutation.to_flax(tensor), dtype, order="C")  # not a view of the file or mapping
        if dtype is not None and not np.isfinite(leaf).all():
            problems.add(_Problem.OVERFLOW, row.torch)
        leaves[row.flax] = leaf
    return leaves
