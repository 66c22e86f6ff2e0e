"""Open PyTorch checkpoints as mappings whose tensors are read on access."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors looks up by name
import numpy as np
from safetensors import SafetensorError, safe_open

from levit_flax import files as local_files
from levit_flax import hub
from levit_flax.checkpoint import _TORCH_WEIGHT_FILES
from levit_flax.configuration import _CONFIG_FILE
from levit_flax.hub import _HubOptions, _Resolved
from levit_flax.image_processing import _PROCESSOR_FILE

from .errors import ConversionError
from .layouts import _Shape
from .location import _describe_left_out, _find_prefix
from .pickle_machine import _Inert
from .pickles import _as_numpy, _read_pickle

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".json")

# The keys under which training scripts save the weights and their moving average (EMA).
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "weights")
_EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema_state_dict")
# The prefix that transformers adds to every name outside the heads, which are all names if a classification model has
# no classes (num_labels=0).
_BACKBONE = "levit."

# torch.hub's convention: names of published files contain the first eight digits of their SHA-256.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.[a-z]+")

_MOST_TENSORS = 100_000  # LeViT-384 has 600
_LARGEST_AXIS = 2**31
_MOST_LEVELS = 4  # of mappings in which a model is looked for

_Tensors = Mapping[str, np.ndarray]


class _Source(NamedTuple):
    """An opened checkpoint.

    Attributes:
        where: its name in messages.
        tensors: arrays by name, read on access.
        shapes: shapes by name; accessing them reads no tensor.
        wrappers: the keys and name prefixes that were removed from around the tensors.
        notes: warnings and hints, as sentences for the report.
        others: the types of entries that are no tensors, by name.
        config: the parsed config.json next to the weights, or None.
        directory: the directory of the weights; None for a mapping.
        files: the files that contain the tensors; empty for a mapping.
        provenance: the source's name, revision and the like, JSON-ready.
    """

    where: str
    tensors: _Tensors
    shapes: Mapping[str, _Shape]
    wrappers: tuple[str, ...]
    notes: tuple[str, ...]
    others: Mapping[str, str]
    config: dict[str, Any] | None
    directory: Path | None
    files: tuple[Path, ...]
    provenance: dict[str, Any]


class _SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one safetensors file, each read on access.

    The file is not memory-mapped, because pages of a map stay resident until it is closed.

    Raises:
        ConversionError: the file is truncated, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            local_files._check_header(path)
            self.file = safe_open(path, framework="np", backend="pread")
            self.shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in self.file.keys()}  # noqa: SIM118
        except ValueError as error:
            raise ConversionError(str(error)) from None
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{path} is truncated or not a safetensors file ({error}): copy or download it again."
            ) from None
        for name, shape in self.shapes.items():
            if max(shape, default=0) > _LARGEST_AXIS:
                raise ConversionError(f"{path} is damaged: its tensor {name} claims the shape {shape}. Copy it again.")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        try:
            return np.asarray(self.file.get_tensor(name))
        except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two for unknown dtypes
            raise ConversionError(
                f"The tensor {name} of {self.path} cannot be read: {error}. Copy or download the file again."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Renamed(Mapping[str, np.ndarray]):
    """Tensors of one or several files under new names."""

    def __init__(self, origins: dict[str, tuple[_Tensors, str]]) -> None:
        self.origins = origins

    def __getitem__(self, name: str) -> np.ndarray:
        tensors, original_name = self.origins[name]
        return tensors[original_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.origins)

    def __len__(self) -> int:
        return len(self.origins)


def _open_source(
    source: str | Path | Mapping[str, Any],
    *,
    ema: bool = False,
    prefix: str | None = None,
    options: _HubOptions = hub._DEFAULTS,
) -> _Source:
    """Open a weight file, a directory, a Hub repository or a mapping from tensor names to arrays or tensors.

    With `ema`, open the averaged weights (`model_ema`) of a training checkpoint instead of the last ones (`model`).
    `prefix` chooses one of several models.
    """
    if isinstance(source, Mapping):
        weights = _check_tensors(source, "the mapping", ema)
        return _gather("the mapping", [(weights, None)], (), {"source": "a mapping of tensors"}, prefix)
    if not str(source):
        raise FileNotFoundError("The source is empty: expected a weight file, a directory or a Hub id.")
    path = Path(source).expanduser()
    if not os.path.lexists(path) and path.suffix in _WEIGHT_SUFFIXES:
        raise FileNotFoundError(
            f"The file {path} does not exist: expected a weight file, a directory or a Hub id. Check the path."
        )
    if os.path.lexists(path) and not path.is_dir():
        return _open_weights(path, {"source": str(source)}, ema, prefix)
    resolved = hub._resolve(source, weights=_TORCH_WEIGHT_FILES, files=(_CONFIG_FILE, _PROCESSOR_FILE), options=options)
    return _open_resolved(source, resolved, ema, prefix)


def _open_resolved(source: str | Path, resolved: _Resolved, ema: bool = False, prefix: str | None = None) -> _Source:
    """Open the weights found in a directory or a Hub repository; `source` is the user's name for it."""
    provenance = {"source": str(source)} | ({"revision": resolved.revision} if resolved.revision else {})
    return _open_weights(cast(Path, resolved.weights), provenance, ema, prefix)


def _open_weights(path: Path, provenance: dict[str, Any], ema: bool, prefix: str | None) -> _Source:
    """Open a weight file, or the shards that an index lists."""
    files = _list_shards(path) if path.suffix == ".json" else {path: None}
    notes = tuple(filter(None, map(_check_hash, files)))
    parts = []
    for file, names in files.items():
        weights = _read_weights(file, ema)
        for name in () if names is None else names:
            if name not in weights.tensors:
                raise ConversionError(
                    f"{path} lists {name} in {file.name}, which does not contain it. Copy or download both again."
                )
        parts.append((weights, names))
    if ema:
        provenance["weights"] = "averaged over the training (EMA)"
    return _gather(provenance["source"], parts, tuple(files), provenance, prefix, notes)


def _gather(
    where: str,
    parts: list[tuple["_Weights", list[str] | None]],
    files: tuple[Path, ...],
    provenance: dict[str, Any],
    prefix: str | None,
    notes: tuple[str, ...] = (),
) -> _Source:
    """Combine the weights of one or several files, and keep those of the LeViT without the prefixes of their names."""
    directory = files[0].parent if files else None
    origins: dict[str, tuple[_Weights, str]] = {}
    others: dict[str, str] = {}
    for weights, names in parts:
        others |= weights.others
        for name in weights.tensors if names is None else names:
            origins[name] = (weights, name)
    found = _find_prefix(origins, where, prefix)
    left_out = [name for name in (*origins, *others) if not name.startswith(found)]
    origins = {name.removeprefix(found): origin for name, origin in origins.items() if name.startswith(found)}
    others = {name.removeprefix(found): kind for name, kind in others.items() if name.startswith(found)}
    wrappers = [wrapper for weights, _ in parts for wrapper in weights.wrappers] + [found] * bool(found)
    while origins and all(name.startswith(_BACKBONE) for name in origins):
        wrappers.append(_BACKBONE)
        origins = {name.removeprefix(_BACKBONE): origin for name, origin in origins.items()}
    left_out += [name for name in others if name not in origins]
    return _Source(
        where=where,
        tensors=_Renamed({name: (weights.tensors, old) for name, (weights, old) in origins.items()}),
        shapes={name: weights.shapes[old] for name, (weights, old) in origins.items()},
        wrappers=tuple(wrappers),
        notes=(
            *(note for weights, _ in parts for note in weights.notes),
            *notes,
            *([_describe_left_out(found, left_out)] if left_out else []),
        ),
        others=others,
        config=None if directory is None else _read_config(directory),
        directory=directory,
        files=files,
        provenance=provenance,
    )


def _check_hash(path: Path) -> str | None:
    """Warn if a file does not match the hash in its name, and return the warning."""
    match = _HASH_IN_NAME.search(path.name)
    if match is None or (digest := _sha256(path)).startswith(match[1]):
        return None
    note = (
        f"{path.name} does not match the hash in its name: expected a SHA-256 that begins with {match[1]}, found"
        f" {digest[:8]}. The file may be damaged, or differ from the one published under this name."
    )
    warnings.warn(note, stacklevel=4)
    return note


def _list_shards(index: Path) -> dict[Path, list[str]]:
    """Return the files that an index lists, with the names of the tensors in each."""
    entries = _read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ConversionError(
            f"{index} has no weight_map: expected the index of a sharded checkpoint. Copy or download it again."
        )
    if len(entries) > _MOST_TENSORS:
        raise ConversionError(
            f"{index} lists too many tensors: expected at most {_MOST_TENSORS}, found {len(entries)}. Check that it is"
            " the index of a LeViT."
        )
    files: dict[Path, list[str]] = {}
    for name, file_name in entries.items():
        if Path(str(file_name)).name != file_name:
            raise ConversionError(
                f"{index} lists a shard outside its directory: expected a file name, found {file_name!r}. Move"
                " the shard next to the index."
            )
        if index.parent / file_name not in files and not os.path.lexists(index.parent / file_name):
            raise ConversionError(f"{index} lists {file_name}, which does not exist: copy or download it too.")
        files.setdefault(index.parent / file_name, []).append(name)
    return files


class _Weights(NamedTuple):
    """The content of one file or mapping; the attributes are those of `_Source`."""

    tensors: _Tensors
    shapes: Mapping[str, _Shape]
    wrappers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    others: Mapping[str, str] = {}


def _read_weights(path: Path, ema: bool) -> _Weights:
    """Open one weight file; its content determines its format."""
    with local_files._open_regular(path) as file:
        start = file.read(9)
    if not start:
        raise ConversionError(f"{path} is empty: copy or download it again.")
    if path.suffix == ".safetensors" or start[8:] == b"{":
        if ema:
            raise _no_average(str(path))
        tensors = _SafetensorsFile(path)
        return _Weights(tensors, tensors.shapes)
    return _check_tensors(_read_pickle(path), str(path), ema)


def _no_average(where: str) -> ConversionError:
    return ConversionError(
        f"{where} has no averaged weights: expected {' or '.join(_EMA_WRAPPERS)}. Remove ema=True to convert the last"
        " ones."
    )


def _check_tensors(value: object, where: str, ema: bool = False) -> _Weights:
    """Return the state dict inside a training checkpoint, or raise ConversionError if there is none."""
    value, wrappers, notes = _unwrap(_as_mapping(value), where, ema)
    if ema and not any(wrapper in _EMA_WRAPPERS for wrapper in wrappers):
        raise _no_average(where)
    if not isinstance(value, Mapping):
        raise ConversionError(
            f"{where} is not a state dict: expected a mapping from names to tensors, found an object of type"
            f" {_type_name(value)}. Save the state dict of the model with torch.save(model.state_dict(), path)."
        )
    arrays: dict[str, np.ndarray] = {}
    others: dict[str, str] = {}
    for name, entry in _flattened(value):
        try:
            if not hasattr(entry, "shape"):
                others[name] = _type_name(entry)
            else:
                arrays[name] = _as_numpy(entry)
        except (TypeError, RuntimeError, NotImplementedError):  # PyTorch's answers for float8, sparse and meta tensors
            others[name] = f"a tensor of {entry.dtype} with the layout {entry.layout} on {entry.device}"
    if others and not arrays:
        name, found = next(iter(others.items()))
        raise ConversionError(
            f"{where} is not a state dict: expected tensors, found an object of type {found} under {name!r}. Save the"
            " state dict of the model with torch.save(model.state_dict(), path)."
        )
    shapes = {name: array.shape for name, array in arrays.items()}
    return _Weights(arrays, shapes, tuple(wrappers), tuple(notes), others)


def _as_mapping(value: Any) -> Any:
    """Return the items of a dictionary of an unknown class, or the value itself."""
    return value.items if isinstance(value, _Inert) and value.items else value


def _flattened(value: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a mapping and of the mappings in it, with names joined by dots."""
    for key, entry in value.items():
        entry = _as_mapping(entry)
        if isinstance(entry, Mapping) and entry and depth < _MOST_LEVELS:
            yield from _flattened(entry, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", entry


def _type_name(value: object) -> str:
    return value.name if isinstance(value, _Inert) else type(value).__name__


def _unwrap(value: object, where: str, ema: bool) -> tuple[object, list[str], list[str]]:
    """Return the innermost mapping below the keys of training scripts, these keys, and notes."""
    wrappers: list[str] = []
    notes: list[str] = []
    while isinstance(value, Mapping):
        present = [key for key in (*_WRAPPERS, *_EMA_WRAPPERS) if isinstance(_as_mapping(value.get(key)), Mapping)]
        averaged = [key for key in present if key in _EMA_WRAPPERS]
        plain = [key for key in present if key in _WRAPPERS]
        if not present:
            break
        if averaged and not plain and not ema:
            raise ConversionError(
                f"{where} has only averaged weights: expected {' or '.join(_WRAPPERS)}, found {averaged[0]}. Pass"
                " ema=True to convert those."
            )
        if averaged and not ema:
            notes.append(f"The checkpoint also has averaged weights ({averaged[0]}): pass ema=True to convert those.")
        chosen = (averaged or plain if ema else plain)[0]
        wrappers.append(chosen)
        value = _as_mapping(value[chosen])
    return value, wrappers, notes


def _read_config(directory: Path) -> dict[str, Any] | None:
    """Return the parsed config.json of a directory, or None if there is none."""
    path = directory / _CONFIG_FILE
    return _read_json(path) if os.path.lexists(path) else None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise a ConversionError that names the file."""
    try:
        return local_files._read_json(path)
    except ValueError as error:
        raise ConversionError(f"{error} Copy or download it again.") from None


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with local_files._open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
