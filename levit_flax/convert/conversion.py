"""Between PyTorch state dicts and Flax variables, strictly: every tensor is mapped, ignored by name, or an error."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from levit_flax.attention import offset_index
from levit_flax.checkpoint import check_variables, save_tensors, to_device
from levit_flax.configuration import LevitConfig, imagenet_labels
from levit_flax.files import write_atomically
from levit_flax.hub import HubOptions
from levit_flax.modeling import MODEL_CLASSES, LevitBase, Variables, abstract_variables

from .errors import ConversionError, understanding
from .inference import INFERRED_FIELDS, infer_config
from .layouts import IGNORED, LAYOUTS, WRITTEN_LAYOUTS, CheckpointLayout, Row, Shape, Structure, detect_layout
from .sources import Source, Tensors, open_source
from .timm_files import is_timm_config, read_timm_config

LISTED = 8  # how many names of one kind an error message spells out

# Files with these endings are pickles, which PyTorch itself must write.
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted checkpoint and how it came about.

    Attributes:
        model: the module.
        variables: its variables as NumPy arrays.
        layout: the checkpoint's layout.
        rows: the tensors mapped.
        ignored: names of the tensors that were read past, by reason.
        reordered: for each table of attention biases (by its path) that the checkpoint stores in another order, the
            row in the checkpoint of each of our rows.
        dtype: what the floating-point tensors were turned into; None where they were kept.
        inferred: whether the architecture was read from the shapes, for lack of a config.json.
        notes: sentences that whoever reads a report should see.
        provenance: where the tensors came from, JSON-ready.
        directory: where the checkpoint lies; None for a mapping.
    """

    model: LevitBase
    variables: Variables
    layout: CheckpointLayout
    rows: tuple[Row, ...]
    ignored: dict[str, tuple[str, ...]]
    reordered: dict[str, np.ndarray]
    dtype: Any
    inferred: bool
    notes: tuple[str, ...]
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
    ema: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[LevitBase, Variables]:
    """Turn a PyTorch LeViT checkpoint into a model and its variables.

    Args:
        source: a weight file (safetensors, or a zip pickle as `torch.save` writes it), a directory, a Hub id, or a
            mapping from names to arrays or tensors; in the layout of transformers, of timm (linear or convolutional)
            or of the original repository, with batch norms or fused.
        dtype: type of the floating-point arrays; None keeps the file's.
        config: the architecture; None for the config.json beside the weights or, where there is none, what the shapes
            say.
        image_size: input size in pixels; it wins over a config's. None for the config's or, where there is none, the
            square multiple of 16 that fits the tables of attention biases.
        ema: of a training checkpoint, take the averaged weights (`model_ema`) instead of the last ones (`model`).
        revision: branch, tag or commit of a Hub repository.
        token: access token for the Hub.
        cache_dir: where downloads are kept.
        local_files_only: do not touch the network.

    Returns:
        The module (with one head, two or none, folded or not, as in the checkpoint) and {"params": ...,
        "batch_stats": ...}, without "batch_stats" where the batch norms are fused.

    Raises:
        ConversionError: tensors are missing, unexpected, of the wrong shape or not finite; everything found is listed.
        OSError: there is no such source, or it cannot be read or fetched.

    Example:
        >>> from levit_flax import from_pretrained
        >>> tensors = to_torch(*from_pretrained("cifar10"), layout="timm")
        >>> model, variables = from_torch(tensors)
        >>> type(model).__name__, model.config.image_size, model.config.depths
        ('LevitForImageClassificationWithTeacher', 144, (2, 3, 1))
    """
    opened = open_source(source, ema=ema, options=HubOptions(revision, token, cache_dir, local_files_only))
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
    layout = detect_layout(source.shapes, source.where)
    structure = layout.structure(source.shapes)
    model_class = {model.head_names: model for model in MODEL_CLASSES}.get(structure.heads)
    if model_class is None:
        raise ConversionError(
            f"{source.where} has a distillation head and no first head: expected both, or the first alone."
        )
    architecture, notes = find_config(source, layout, structure, config, image_size)
    model = model_class(architecture, folded=structure.folded)
    rows = tuple(layout.rows(Structure.of(architecture, structure.heads, structure.folded)))
    ignored = find_ignored(source.shapes, {row.torch for row in rows})
    places = abstract_variables(model)
    expected = {row.torch: row.permutation.torch_shape(places[row.flax].shape) for row in rows}
    flat, wrong_values = read_tensors(
        source.tensors, [row for row in rows if source.shapes.get(row.torch) == expected[row.torch]], dtype
    )
    reordered, wrong_tables = compare_tables(source.tensors, layout, structure, architecture)
    problems = report_problems(find_misfits(source.shapes, expected, ignored) | wrong_values | wrong_tables)
    if problems:
        raise ConversionError(
            f"{source.where} cannot be converted as {model_class.__name__} in the {layout.name} layout:\n"
            + "\n".join(problems)
        )
    for path, order in reordered.items():
        flat[path] = flat[path][order]
    if reordered:
        notes += (f"{len(reordered)} tables of attention biases are stored in another order, and were put into ours.",)
    param_dtype = flat["params/stem/conv_0/conv/kernel"].dtype
    return Conversion(
        model=model.clone(param_dtype=jnp.dtype(param_dtype)),
        variables=unflatten_dict(flat, sep="/"),
        layout=layout,
        rows=rows,
        ignored=ignored,
        reordered=reordered,
        dtype=dtype,
        inferred=config is None and source.config is None,
        notes=source.notes + notes,
        provenance={**source.provenance, "layout": layout.name},
        directory=source.directory,
    )


def find_config(
    source: Source,
    layout: CheckpointLayout,
    structure: Structure,
    config: LevitConfig | None,
    image_size: int | tuple[int, int] | None,
) -> tuple[LevitConfig, tuple[str, ...]]:
    """Return the config that was given or lies beside the weights, checked against the shapes, or what these tell.

    Returns:
        The config, and sentences on what it assumes.
    """
    given = config
    if given is None and source.config is not None:
        read = read_timm_config if is_timm_config(source.config) else LevitConfig.from_dict
        with understanding(f"The config.json of {source.where}"):
            given = read(source.config)
        check_heads(source.config.get("architectures"), given, structure, source.where)
    if given is not None and image_size is not None:
        given = dataclasses.replace(given, image_size=image_size)
    notes: tuple[str, ...] = ()
    try:
        inferred = infer_config(
            inferable_shapes(source.shapes, layout, structure),
            {row.flax: row.torch for row in layout.rows(structure)},
            structure,
            image_size if given is None else 16,  # no shape depends on it, and one token is always legal
        )
    except ConversionError:
        if given is None:
            raise
        architecture = given  # what is wrong with the tensors will be said
    else:
        if given is None:
            architecture = inferred
            if image_size is None:
                notes += (
                    f"The image size is not stored: {architecture.image_size} is the square multiple of 16 that fits"
                    " the tables of attention biases; --image-size (image_size=) sets another.",
                )
        else:
            check_agreement(given, inferred, structure, source.where)
            architecture = given
    names = imagenet_labels()
    if config is None and structure.heads and architecture.num_labels == len(names) and not has_labels(architecture):
        architecture = dataclasses.replace(architecture, id2label=names)
        notes += ("The checkpoint names no classes: its 1000 got ImageNet's names.",)
    return architecture, notes


def check_heads(architectures: Any, config: LevitConfig, structure: Structure, where: str) -> None:
    """Raise ConversionError where transformers' config names a class with other heads than the checkpoint has."""
    for model_class in MODEL_CLASSES:
        heads = Structure.of(config, model_class.head_names).heads
        if architectures == [model_class.__name__] and structure.heads != heads:
            raise ConversionError(
                f"The config of {where} names {model_class.__name__} with {config.num_labels} classes, which has the"
                f" heads {', '.join(heads) or 'none'}; the tensors have {', '.join(structure.heads) or 'none'}. Take"
                " the config and the weights of the same model, or leave the config away."
            )


def has_labels(config: LevitConfig) -> bool:
    """Return whether the classes have names, and not only numbers."""
    return config.id2label != tuple(f"LABEL_{i}" for i in range(config.num_labels))


def read_tensors(
    tensors: Tensors, rows: Iterable[Row], dtype: Any
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Read every tensor once, as it stands in the Flax tree, and say which hold what they must not, by kind."""
    flat, not_numbers, not_finite, negative, overflowing = {}, [], [], [], []
    for row in rows:
        tensor = tensors[row.torch]
        if row.flax.endswith("/count"):
            if tensor.dtype.kind not in "iu" or not 0 <= int(tensor) < 2**31:
                found = f"{tensor} of {tensor.dtype}"
                not_numbers.append(f"{row.torch} (expected a whole number below 2^31, found {found})")
            else:
                flat[row.flax] = np.asarray(tensor, np.int32)
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            not_numbers.append(f"{row.torch} (expected floating point, found {tensor.dtype})")
        elif not np.isfinite(tensor).all():
            not_finite.append(row.torch)
        elif row.flax.endswith("/var") and (tensor < 0).any():
            negative.append(row.torch)
        else:
            with np.errstate(over="ignore"):
                flat[row.flax] = np.asarray(row.permutation.to_flax(tensor), dtype, order="C")
            if dtype is not None and not np.isfinite(flat[row.flax]).all():
                overflowing.append(row.torch)
    return flat, {
        "of the wrong type": not_numbers,
        "not finite": not_finite,
        "negative variances": negative,
        f"out of the range of {dtype}": overflowing,
    }


def inferable_shapes(shapes: Mapping[str, Shape], layout: CheckpointLayout, structure: Structure) -> dict[str, Shape]:
    """Return the shapes of the parameters that a checkpoint has, by their path and with the axes of the Flax tree."""
    found = {}
    for row in layout.rows(structure):
        if row.torch in shapes and row.flax.startswith("params/"):
            shape = shapes[row.torch]
            found[row.flax] = row.permutation.flax_shape(shape) or shape
    return found


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


def find_ignored(names: Iterable[str], mapped: set[str]) -> dict[str, tuple[str, ...]]:
    """Return the unmapped tensors that are ignored on purpose, by reason."""
    ignored: dict[str, list[str]] = {}
    for name in names:
        reason = IGNORED.get(name.rpartition(".")[2])
        if reason and name not in mapped:
            ignored.setdefault(reason, []).append(name)
    return {reason: tuple(names) for reason, names in ignored.items()}


def find_misfits(
    shapes: Mapping[str, Shape], expected: Mapping[str, Shape], ignored: dict[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """Return the differences between the names and shapes of a checkpoint and those expected, by kind."""
    known = expected.keys() | set().union(*ignored.values())
    return {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": [name for name in shapes if name not in known],
        "of the wrong shape": [
            f"{name} (expected {shape}, found {shapes[name]})"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }


def compare_tables(
    tensors: Tensors, layout: CheckpointLayout, structure: Structure, config: LevitConfig
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Compare the stored tables of indices with those that the image size leads to.

    A table that gives every offset one row of its own, but not our row, tells how the biases are ordered.

    Returns:
        For each table of biases in another order (by its path) the row in the checkpoint of each of our rows; and what
        is wrong with the tables of indices, each with its first difference, under its kind.
    """
    reordered, wrong = {}, []
    homes = layout.tables(structure)
    for name in tensors:
        if name.rpartition(".")[2] not in IGNORED:
            continue
        if name not in homes:
            wrong.append(f"{name} (there is no attention of that name)")
            continue
        table, found = index_table(config, homes[name]), tensors[name]
        if found.shape != table.shape or found.dtype.kind not in "iu":
            wrong.append(f"{name} (expected integers {table.shape}, found {found.dtype} {found.shape})")
        elif (found != table).any():
            order = np.empty(table.max() + 1, np.int64)
            order[table] = found  # any pair of an offset tells its row; that all agree is checked next
            if (order[table] == found).all() and np.array_equal(np.sort(order), np.arange(len(order))):
                reordered[homes[name]] = order
            else:
                query, key = np.argwhere(found != table)[0]
                wrong.append(
                    f"{name} (first at query {query}, key {key}: expected {table[query, key]}, found"
                    f" {found[query, key]})"
                )
    return reordered, {"index tables that disagree with the image size": wrong}


def index_table(config: LevitConfig, path: str) -> np.ndarray:
    """Return the table of indices [Q K] that goes with the attention biases of this path."""
    place, _, index = path.split("/")[1].rpartition("_")
    stride = config.down_ops[int(index)].stride if place == "downsample" else 1
    return offset_index(config.grids[int(index)], stride)


def report_problems(problems: Mapping[str, list[str]]) -> list[str]:
    """Return a line for each kind of problem that there is, with the first names."""
    return [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]


def listed(names: Iterable[str]) -> str:
    """Return names as one string, cut after a few."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def to_torch(model: LevitBase, variables: Mapping[str, Any], layout: str = "hf") -> dict[str, np.ndarray]:
    """Turn a model and its variables into a PyTorch state dict.

    Args:
        model: one of the three models, folded or not.
        variables: its variables.
        layout: how to name the tensors: "hf" as transformers does, "timm", "timm_conv" (timm with linear layers as 1x1
            convolutions) or "facebook", as the original repository does. A folded model comes out fused, which
            transformers has no layout for.

    Returns:
        NumPy arrays by PyTorch's names; `torch.from_numpy` makes tensors of them. What `from_torch` read comes out
        again bit for bit.

    Raises:
        ValueError: the layout is unknown or cannot hold the model, or the variables do not fit it.

    Example:
        >>> from levit_flax import from_pretrained
        >>> to_torch(*from_pretrained("cifar10"), layout="facebook")["head.l.weight"].shape
        (10, 160)
    """
    check_layout(model, layout)
    check_variables(model, variables, "The given tree")
    structure = Structure.of(model.config, model.head_names, model.folded)
    tensors = dict(torch_tensors(LAYOUTS[layout].rows(structure), variables))
    if LAYOUTS[layout].index_tables:
        for name, path in LAYOUTS[layout].tables(structure).items():
            tensors[name] = index_table(model.config, path).astype(np.int64)
    return tensors


def check_layout(model: LevitBase, layout: str) -> None:
    """Raise ValueError unless the layout is one that is written and has a place for the model."""
    if layout not in WRITTEN_LAYOUTS:
        raise ValueError(f"There is no layout {layout!r} to write: the layouts are {', '.join(WRITTEN_LAYOUTS)}.")
    if model.folded and LAYOUTS[layout].folded_marker is None:
        raise ValueError(
            "transformers has no layout for a model whose batch norms are folded: export the model as it was before"
            " folding, or to timm, timm_conv or facebook."
        )


def check_transformers_size(config: LevitConfig) -> None:
    """Raise ConversionError unless transformers' model has as many tokens at the config's image size.

    Its tables of attention biases are for `image_size // patch_size` tokens a side, where its stem makes one more of
    what is left over, and for square images.

    Source: `LevitEncoder` in transformers modeling_levit.py.
    """
    height, width = config.image_height_width
    if height != width or config.grids[0] != (height // config.patch_size, width // config.patch_size):
        raise ConversionError(
            f"transformers' LeViT cannot take images of {height}x{width} pixels: give the model a square image_size"
            f" that is a multiple of {config.patch_size}."
        )


def torch_tensors(rows: Iterable[Row], variables: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and array of each row's tensor as it stands in a PyTorch state dict."""
    flat = flatten_dict(variables, sep="/")
    for row in rows:
        array = np.asarray(flat[row.flax])
        if row.flax.endswith("/count"):
            yield row.torch, np.asarray(array, np.int64)
        else:
            yield row.torch, np.asarray(row.permutation.to_torch(array), order="C")


def save_torch(
    path: str | Path, model: LevitBase, variables: Mapping[str, Any], layout: str = "hf", overwrite: bool = False
) -> None:
    """Write a model as a file with PyTorch's names.

    Args:
        path: the file to write: `model.safetensors` for transformers and timm; a name that ends in .pth, .pt or .bin
            is written by PyTorch. A pickle in the original repository's layout holds its tensors under "model", where
            that code looks for them.
        model: as in `to_torch`.
        variables: as in `to_torch`.
        layout: as in `to_torch`.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: the file is there and `overwrite` is False.
        ImportError: a pickle is asked for, and PyTorch is not installed.
        OSError: the file cannot be written.
        ValueError: as in `to_torch`.

    Example:
        >>> import tempfile
        >>> from levit_flax import from_pretrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_torch(f"{folder}/model.safetensors", *from_pretrained("cifar10"), layout="timm")
        ...     from_torch(f"{folder}/model.safetensors")[0].config.hidden_sizes
        (96, 128, 160)
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: pass overwrite=True to replace it, or choose another name.")
    tensors = to_torch(model, variables, layout)
    if path.suffix in PICKLE_SUFFIXES:
        write_atomically(path, lambda file: save_pickle(file, tensors, layout))
    else:
        write_atomically(path, lambda file: save_tensors(file, tensors, "pt"))


def save_pickle(path: Path, tensors: dict[str, np.ndarray], layout: str) -> None:
    """Write tensors with `torch.save`."""
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"Only PyTorch writes {', '.join(PICKLE_SUFFIXES)} files: pip install 'levit-flax[torch]', or write a"
            " .safetensors file."
        ) from None

    def tensor(array: np.ndarray) -> torch.Tensor:
        if array.dtype == jnp.bfloat16:  # which torch does not take from NumPy
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    state_dict = {name: tensor(np.array(array)) for name, array in tensors.items()}
    try:
        torch.save({"model": state_dict} if LAYOUTS[layout].name == "facebook" else state_dict, path)
    except RuntimeError as error:  # of a full disk too
        raise OSError(f"Cannot write {path}: {error}. Choose a place with room for it.") from None
