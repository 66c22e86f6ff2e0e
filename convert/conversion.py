"""Between PyTorch state dicts and Flax variables, strictly: every tensor is mapped, ignored by name, or an error."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from levit_flax.attention import offset_index
from levit_flax.checkpoint import check_variables, to_device, write_atomically
from levit_flax.configuration import LevitConfig
from levit_flax.modeling import MODEL_CLASSES, LevitBase, Variables, abstract_variables

from .errors import ConversionError
from .inference import INFERRED_FIELDS, infer_config
from .layouts import IGNORED, LAYOUTS, CheckpointLayout, Row, Structure, detect_layout
from .sources import Source, Tensors, open_source

LISTED = 8  # how many names of one kind an error message spells out


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted checkpoint and how it came about.

    Attributes:
        model: the module.
        variables: its variables as NumPy arrays.
        layout: name of the checkpoint's layout.
        mapped: number of tensors mapped.
        ignored: names of the tensors that were read past, by reason.
        inferred: whether the architecture was read from the shapes, for lack of a config.json.
        provenance: where the tensors came from, JSON-ready.
        directory: where the checkpoint lies; None for a mapping.
    """

    model: LevitBase
    variables: Variables
    layout: str
    mapped: int
    ignored: dict[str, tuple[str, ...]]
    inferred: bool
    provenance: dict[str, Any]
    directory: Path | None

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))


def from_torch(
    source: str | Path | Mapping[str, Any],
    dtype: Any = None,
    *,
    config: LevitConfig | None = None,
    image_size: int | tuple[int, int] | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
) -> tuple[LevitBase, Variables]:
    """Turn a PyTorch LeViT checkpoint into a model and its variables.

    Args:
        source: a weight file (safetensors, or a zip pickle as `torch.save` writes it), a directory, a Hub id, or a
            mapping from names to arrays or tensors.
        dtype: type of the floating-point arrays; None keeps the file's.
        config: the architecture; None for the config.json beside the weights or, where there is none, what the shapes
            say.
        image_size: input size in pixels, where no config says it and the shapes leave it open.
        revision: branch, tag or commit of a Hub repository.
        token: access token for the Hub.
        cache_dir: where downloads are kept.
        local_files_only: do not touch the network.

    Returns:
        The module (with one head, two or none, as in the checkpoint) and {"params": ..., "batch_stats": ...}.

    Raises:
        ConversionError: tensors are missing, unexpected, of the wrong shape or not finite; everything found is listed.
        OSError: there is no such source, or it cannot be read or fetched.
    """
    opened = open_source(source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    conversion = convert(opened, dtype, config=config, image_size=image_size)
    return conversion.model, to_device(conversion.variables, opened.where)


def convert(
    source: Source,
    dtype: Any = None,
    *,
    config: LevitConfig | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Conversion:
    """Do the work of `from_torch` on an opened source, and keep the account of it."""
    tensors, where = source.tensors, source.where
    layout = detect_layout(tensors, where)
    structure = layout.structure(tensors)
    given = config or (None if source.config is None else LevitConfig.from_dict(source.config))
    try:
        names = {row.flax: row.torch for row in layout.rows(structure)}
        inferred = infer_config(inferable_shapes(tensors, layout, structure), names, structure, image_size)
    except ConversionError:
        if given is None:
            raise
        inferred = None  # the difference below says what is wrong
    if given is not None and inferred is not None:
        check_agreement(given, inferred, structure, where)
    model_class = {model.head_names: model for model in MODEL_CLASSES}.get(structure.heads)
    if model_class is None:
        raise ConversionError(f"{where} has a distillation head and no first head: expected both, or the first alone.")
    architecture = given or inferred
    assert architecture is not None  # without a config, a failed inference was raised above
    model = model_class(architecture)
    rows = tuple(layout.rows(Structure.of(model.config, structure.heads)))
    ignored = find_ignored(tensors, {row.torch for row in rows})
    problems = find_problems(tensors, rows, model, ignored)
    if problems:
        raise ConversionError(
            f"{where} cannot be converted as {type(model).__name__} in the {layout.name} layout:\n"
            + "\n".join(problems)
        )
    flat = {row.flax: to_flax(tensors[row.torch], row, dtype) for row in rows}
    param_dtype = flat["params/stem/conv_0/conv/kernel"].dtype
    return Conversion(
        model=model.clone(param_dtype=jnp.dtype(param_dtype)),
        variables=unflatten_dict(flat, sep="/"),
        layout=layout.name,
        mapped=len(rows),
        ignored=ignored,
        inferred=given is None,
        provenance={**source.provenance, "layout": layout.name},
        directory=source.directory,
    )


def to_flax(tensor: np.ndarray, row: Row, dtype: Any) -> np.ndarray:
    """Return one tensor as it stands in the Flax tree."""
    if row.flax.endswith("/count"):
        return np.asarray(tensor, np.int32)
    array = row.permutation.to_flax(tensor)
    return np.asarray(array, dtype, order="C")


def inferable_shapes(tensors: Tensors, layout: CheckpointLayout, structure: Structure) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that a checkpoint has, by their path and with the axes of the Flax tree."""
    shapes = {}
    for row in layout.rows(structure):
        if row.torch in tensors and row.flax.startswith("params/"):
            shape, axes = tensors[row.torch].shape, row.permutation.value
            fits = axes is not None and len(shape) == len(axes)
            shapes[row.flax] = tuple(shape[axis] for axis in axes) if fits else shape
    return shapes


def check_agreement(given: LevitConfig, inferred: LevitConfig, structure: Structure, where: str) -> None:
    """Raise ConversionError where the config and the tensors tell of different models."""
    fields = INFERRED_FIELDS + (("num_labels",) if structure.heads else ())
    pairs = {name: (getattr(given, name), getattr(inferred, name)) for name in fields}
    # Shapes do not tell the stride of a downsampling.
    as_strided = [op._replace(stride=g.stride) for op, g in zip(inferred.down_ops, given.down_ops, strict=False)]
    pairs["down_ops"] = (given.down_ops, tuple(as_strided))
    differing = [f"{name} is {a} in the config and {b} in the tensors" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise ConversionError(f"The config of {where} is not that of its tensors: {'; '.join(differing)}.")


def find_ignored(tensors: Tensors, mapped: set[str]) -> dict[str, tuple[str, ...]]:
    """Return the unmapped tensors that are ignored on purpose, by reason."""
    ignored: dict[str, list[str]] = {}
    for name in tensors:
        reason = IGNORED.get(name.rpartition(".")[2])
        if reason and name not in mapped:
            ignored.setdefault(reason, []).append(name)
    return {reason: tuple(names) for reason, names in ignored.items()}


def find_problems(
    tensors: Tensors, rows: tuple[Row, ...], model: LevitBase, ignored: dict[str, tuple[str, ...]]
) -> list[str]:
    """Return a line for each kind of difference between a checkpoint and a model; none means that they fit."""
    expected = abstract_variables(model)
    by_torch = {row.torch: row for row in rows}
    known = set(by_torch).union(*ignored.values())
    missing = [row.torch for row in rows if row.torch not in tensors]
    unexpected = [name for name in tensors if name not in known]
    misshapen, not_finite, not_numbers = [], [], []
    for name, row in by_torch.items():
        if name in missing:
            continue
        tensor, wanted = tensors[name], expected[row.flax].shape
        if row.permutation.value is not None:
            wanted = row.permutation.to_torch(np.empty(wanted, np.bool_)).shape
        if tensor.shape != wanted:
            misshapen.append(f"{name} (expected {wanted}, found {tensor.shape})")
        elif row.flax.endswith("/count"):
            if tensor.dtype.kind not in "iu" or not 0 <= int(tensor) < 2**31:
                not_numbers.append(f"{name} (expected a whole number below 2^31, found {tensor} of {tensor.dtype})")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            not_numbers.append(f"{name} (expected floating point, found {tensor.dtype})")
        elif not np.isfinite(tensor).all():
            not_finite.append(name)
    wrong_tables = [] if misshapen or missing else find_wrong_tables(tensors, by_torch, model, ignored)
    return [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", misshapen),
            ("of the wrong type", not_numbers),
            ("not finite", not_finite),
            ("index tables that disagree with the image size", wrong_tables),
        )
        if names
    ]


def find_wrong_tables(
    tensors: Tensors, by_torch: dict[str, Row], model: LevitBase, ignored: dict[str, tuple[str, ...]]
) -> list[str]:
    """Return the index tables that are not what their place in the model asks for, each with its first difference."""
    wrong = []
    for name in (name for names in ignored.values() for name in names):
        biases = by_torch.get(name.removesuffix("attention_bias_idxs") + "attention_biases")
        if biases is None:
            wrong.append(f"{name} (there is no attention of that name)")
            continue
        place, _, index = biases.flax.split("/")[1].rpartition("_")
        stride = model.config.down_ops[int(index)].stride if place == "downsample" else 1
        table, found = offset_index(model.config.grids[int(index)], stride), tensors[name]
        if found.shape != table.shape:
            wrong.append(f"{name} (expected {table.shape}, found {found.shape})")
        elif (found != table).any():
            query, key = np.argwhere(found != table)[0]
            wrong.append(
                f"{name} (first at query {query}, key {key}: expected {table[query, key]}, found {found[query, key]})"
            )
    return wrong


def listed(names: Iterable[str]) -> str:
    """Return names as one string, cut after a few."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def to_torch(model: LevitBase, variables: Mapping[str, Any], layout: str = "hf") -> dict[str, np.ndarray]:
    """Turn a model and its variables into a PyTorch state dict.

    Args:
        model: one of the three models, not folded.
        variables: its variables.
        layout: how to name the tensors: "hf" as transformers does.

    Returns:
        NumPy arrays by PyTorch's names; `torch.from_numpy` makes tensors of them. What `from_torch` read comes out
        again bit for bit.

    Raises:
        ValueError: the layout is unknown or cannot hold the model, or the variables do not fit it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"There is no layout {layout!r}: the layouts are {', '.join(LAYOUTS)}.")
    if model.folded:
        raise ValueError(
            f"The {layout} layout has no place for folded batch norms: export the model as it was before folding."
        )
    check_variables(model, variables, "The given tree")
    flat = flatten_dict(variables, sep="/")
    rows = LAYOUTS[layout].rows(Structure.of(model.config, model.head_names))
    return {row.torch: from_flax(np.asarray(flat[row.flax]), row) for row in rows}


def from_flax(array: np.ndarray, row: Row) -> np.ndarray:
    """Return one array of the Flax tree as it stands in a PyTorch state dict."""
    if row.flax.endswith("/count"):
        return np.asarray(array, np.int64)
    return np.asarray(row.permutation.to_torch(array), order="C")


def save_torch(
    path: str | Path, model: LevitBase, variables: Mapping[str, Any], layout: str = "hf", overwrite: bool = False
) -> None:
    """Write a model as a safetensors file with PyTorch's names.

    Args:
        path: the file to write, `model.safetensors` for transformers.
        model: as in `to_torch`.
        variables: as in `to_torch`.
        layout: as in `to_torch`.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: the file is there and `overwrite` is False.
        ValueError: as in `to_torch`.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: pass overwrite=True to replace it, or choose another name.")
    tensors = to_torch(model, variables, layout)
    write_atomically(path, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
