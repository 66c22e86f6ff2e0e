"""Open a PyTorch checkpoint, wherever it is, as a mapping from tensor names to arrays that are read when asked for."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes  # registers bfloat16 with NumPy, which safetensors then finds by name
import numpy as np
from safetensors import SafetensorError, safe_open

from levit_flax import hub
from levit_flax.checkpoint import CONFIG_FILE, TORCH_WEIGHT_FILES
from levit_flax.hub import HubOptions, Resolved
from levit_flax.image_processing import PROCESSOR_FILE

from .errors import ConversionError
from .layouts import Shape
from .pickles import read_pickle

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".json")

# Under these keys training scripts save the weights, and an average of them over the training (EMA).
WRAPPERS = ("model", "state_dict")
EMA_WRAPPERS = ("model_ema", "state_dict_ema")
# What DistributedDataParallel and torch.compile put before every name; and what transformers puts before every name but
# the heads', so that only a model with a place for heads and none in it (num_labels=0) has it everywhere.
NAME_PREFIXES = ("module.", "_orig_mod.", "levit.")

# torch.hub's convention for published files: the first eight digits of the SHA-256.
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.[a-z]+")

Tensors = Mapping[str, np.ndarray]


class Source(NamedTuple):
    """An opened checkpoint.

    Attributes:
        where: what to call it in messages.
        tensors: arrays by name, read when asked for.
        shapes: their shapes by name, for which nothing is read.
        wrappers: the keys and name prefixes that the tensors were taken out of.
        notes: sentences that whoever reads a report should see.
        config: the parsed config.json beside the weights, or None.
        directory: where the weights and what belongs to them lie; None for a mapping.
        files: the files that hold the tensors; none for a mapping.
        provenance: what a reader of the result needs to find the source again, JSON-ready.
    """

    where: str
    tensors: Tensors
    shapes: Mapping[str, Shape]
    wrappers: tuple[str, ...]
    notes: tuple[str, ...]
    config: dict[str, Any] | None
    directory: Path | None
    files: tuple[Path, ...]
    provenance: dict[str, Any]


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one safetensors file, each read when asked for.

    They are read, not mapped: what was read of a mapping stays in memory until all of it is closed.

    Raises:
        ConversionError: the file is not whole, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = safe_open(path, framework="np", backend="pread")
            self.shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in self.file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{path} is not a whole safetensors file ({error}): copy or download it again."
            ) from None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        try:
            return self.file.get_tensor(name)
        except (SafetensorError, OSError, TypeError) as error:
            raise ConversionError(f"The tensor {name} of {self.path} cannot be read: {error}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Gathered(Mapping[str, np.ndarray]):
    """Tensors from wherever they are, under other names: of several files, or with prefixes taken off."""

    def __init__(self, homes: dict[str, tuple[Tensors, str]]) -> None:
        self.homes = homes

    def __getitem__(self, name: str) -> np.ndarray:
        tensors, their_name = self.homes[name]
        return tensors[their_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)


def open_source(
    source: str | Path | Mapping[str, Any],
    *,
    ema: bool = False,
    options: HubOptions = hub.DEFAULTS,
) -> Source:
    """Open a weight file, a directory, a Hub repository or a mapping.

    Args:
        source: a path, a Hub id, or a mapping from tensor names to arrays or tensors.
        ema: of a training checkpoint, take the averaged weights (`model_ema`) instead of the last ones (`model`).
        options: how to access the Hub.

    Raises:
        ConversionError: what is there is not a checkpoint.
        OSError: nothing is there, or it cannot be read or fetched.
    """
    if isinstance(source, Mapping):
        weights = check_tensors(source, "the mapping", ema)
        return gather("the mapping", [(weights, None)], (), {"source": "a mapping of tensors"})
    path = Path(source).expanduser()
    if not path.exists() and path.suffix in WEIGHT_SUFFIXES:
        raise FileNotFoundError(f"There is no file {path}: expected a weight file, a directory or a Hub id.")
    if path.is_file():
        return open_weights(path, {"source": str(source)}, ema)
    resolved = hub.resolve(source, weights=TORCH_WEIGHT_FILES, files=(CONFIG_FILE, PROCESSOR_FILE), options=options)
    return open_resolved(source, resolved, ema)


def open_resolved(source: str | Path, resolved: Resolved, ema: bool = False) -> Source:
    """Open the weights that were found for a directory or a Hub repository; `source` is what the user called it."""
    provenance = {"source": str(source)} | ({"revision": resolved.revision} if resolved.revision else {})
    return open_weights(cast(Path, resolved.weights), provenance, ema)


def open_weights(path: Path, provenance: dict[str, Any], ema: bool) -> Source:
    """Open a weight file, or the index of several."""
    files = list_shards(path) if path.suffix == ".json" else {path: None}
    notes = tuple(filter(None, map(check_hash, files)))
    parts = []
    for file, names in files.items():
        weights = read_weights(file, ema)
        for name in () if names is None else names:
            if name not in weights.tensors:
                raise ConversionError(f"{path} says that {file.name} holds {name}, which it does not.")
        parts.append((weights, names))
    if ema:
        provenance["weights"] = "averaged over the training (EMA)"
    return gather(provenance["source"], parts, tuple(files), provenance, notes)


def gather(
    where: str,
    parts: list[tuple["Weights", list[str] | None]],
    files: tuple[Path, ...],
    provenance: dict[str, Any],
    notes: tuple[str, ...] = (),
) -> Source:
    """Put what was read of the files together, without the prefixes that all names have."""
    directory = files[0].parent if files else None
    homes, shapes = {}, {}
    for weights, names in parts:
        for name in weights.tensors if names is None else names:
            homes[name], shapes[name] = (weights.tensors, name), weights.shapes[name]
    wrappers = [wrapper for weights, _ in parts for wrapper in weights.wrappers]
    while homes and (prefix := next((p for p in NAME_PREFIXES if all(n.startswith(p) for n in homes)), None)):
        wrappers.append(prefix)
        homes = {name.removeprefix(prefix): home for name, home in homes.items()}
        shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    return Source(
        where=where,
        tensors=Gathered(homes),
        shapes=shapes,
        wrappers=tuple(wrappers),
        notes=tuple(note for weights, _ in parts for note in weights.notes) + notes,
        config=None if directory is None else read_config(directory),
        directory=directory,
        files=files,
        provenance=provenance,
    )


def check_hash(path: Path) -> str | None:
    """Warn where a file's name carries eight digits of another hash than its own, and return the warning."""
    match = HASH_IN_NAME.search(path.name)
    if match is None or (digest := sha256(path)).startswith(match[1]):
        return None
    note = (
        f"{path.name} carries the hash {match[1]} in its name, but its SHA-256 begins with {digest[:8]}: it may be"
        " damaged, or another file than the one published under this name."
    )
    warnings.warn(note, stacklevel=4)
    return note


def list_shards(index: Path) -> dict[Path, list[str]]:
    """Return the files that an index names, with the tensors that each should hold."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ConversionError(f"{index} has no weight_map: expected the index of a checkpoint in several files.")
    files: dict[Path, list[str]] = {}
    for name, file_name in entries.items():
        if Path(str(file_name)).name != file_name:
            raise ConversionError(f"{index} names {file_name!r}: a shard must lie beside its index.")
        if not (index.parent / file_name).is_file():
            raise ConversionError(f"{index} names {file_name}, which is missing: copy or download it too.")
        files.setdefault(index.parent / file_name, []).append(name)
    return files


class Weights(NamedTuple):
    """What one file or mapping holds; the attributes are as in `Source`."""

    tensors: Tensors
    shapes: Mapping[str, Shape]
    wrappers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_weights(path: Path, ema: bool) -> Weights:
    """Open one weight file, by its content."""
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ConversionError(f"{path} is empty: copy or download it again.")
    if path.suffix == ".safetensors" or start[8:] == b"{":
        if ema:
            raise no_average(str(path))
        tensors = SafetensorsFile(path)
        return Weights(tensors, tensors.shapes)
    return check_tensors(read_pickle(path), str(path), ema)


def no_average(where: str) -> ConversionError:
    """Return the error to raise where averaged weights are asked for and there are none."""
    return ConversionError(
        f"{where} holds no averaged weights ({' or '.join(EMA_WRAPPERS)}): leave out --ema (ema=True)."
    )


def check_tensors(value: object, where: str, ema: bool = False) -> Weights:
    """Take the state dict out of what a training script saved around it, or say what is there instead."""
    wrappers: list[str] = []
    notes: list[str] = []
    while isinstance(value, Mapping):
        held = [key for key in (*WRAPPERS, *EMA_WRAPPERS) if isinstance(value.get(key), Mapping)]
        averaged = [key for key in held if key in EMA_WRAPPERS]
        plain = [key for key in held if key in WRAPPERS]
        if not held:
            break
        if averaged and not plain and not ema:
            raise ConversionError(f"{where} holds averaged weights alone ({averaged[0]}): ask for them with --ema.")
        if averaged and not ema:
            notes.append(f"The checkpoint holds averaged weights too ({averaged[0]}): --ema converts those instead.")
        chosen = (averaged or plain if ema else plain)[0]
        wrappers.append(chosen)
        value = value[chosen]
    if ema and not any(wrapper in EMA_WRAPPERS for wrapper in wrappers):
        raise no_average(where)
    if not isinstance(value, Mapping):
        raise ConversionError(f"{where} holds a {type(value).__name__}: expected a mapping from names to tensors.")
    tensors = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not hasattr(tensor, "shape"):
            raise ConversionError(
                f"{where} is no state dict: expected a tensor under every name, found a {type(tensor).__name__} under"
                f" {name!r}."
            )
        tensors[name] = as_numpy(tensor)
    return Weights(tensors, {name: array.shape for name, array in tensors.items()}, tuple(wrappers), tuple(notes))


def as_numpy(tensor: Any) -> np.ndarray:
    """Return a NumPy array of a tensor, without importing the library that it comes from."""
    if hasattr(tensor, "detach"):  # PyTorch's: NumPy knows no bfloat16, which float32 holds exactly
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            return tensor.float().numpy().astype(ml_dtypes.bfloat16)
        return tensor.numpy()
    return np.asarray(tensor)


def read_config(directory: Path) -> dict[str, Any] | None:
    """Return the parsed config.json of a directory, or None where there is none."""
    path = directory / CONFIG_FILE
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds, or raise a ConversionError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON ({error}): copy or download it again.") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a JSON {type(value).__name__}: expected an object.")
    return value


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
